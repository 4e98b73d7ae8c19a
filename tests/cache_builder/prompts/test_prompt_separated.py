"""Tables in text: which separator, which column, which quotes; what does not fit is refused with its line."""

import pytest

from secondcast.cache_builder.prompts.separated import header_of_a_table, separated_rows
from secondcast.storage_schemas.errors import PromptsError


def texts(text, *, ending=".csv", column=None):
    return [row.text for row in separated_rows(text, name="p", ending=ending, column=column)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_the_separator_is_the_one_by_which_the_header_has_a_known_column(separator, ending):
    table = "id,prompt,kind\n1,a red car,colour\n2,a dog,animal\n".replace(",", separator)
    assert texts(table, ending=ending) == ["a red car", "a dog"]
    assert texts(table, ending=ending, column="kind") == ["colour", "animal"]


def test_other_separators_inside_a_text_do_not_cut_it():
    assert texts("prompt;kind\na red car, a dog | a cat;x\n") == ["a red car, a dog | a cat"]


def test_the_lines_of_a_table_of_one_column_are_never_cut():
    assert texts('prompt\na red car, and a dog; both | old\n"a ""b"", c"\n') == [
        "a red car, and a dog; both | old",
        'a "b", c',
    ]


@pytest.mark.parametrize("header", ["Prompt,id", "PROMPT,id", " prompt ,id", '"Prompt","id"', "id2,Prompt"])
def test_column_names_are_read_in_any_case(header):
    assert texts(f"{header}\na,a\n") == ["a"]
    assert texts(f"{header}\na,a\n", column="pRompt") == ["a"]


def test_a_name_that_is_the_same_in_every_letter_goes_first():
    assert texts("PROMPT,prompt\na,b\n", column="prompt") == ["b"]


def test_a_quoted_text_keeps_its_quotes_separators_and_line_ends():
    table = 'id,caption\r\n1,"a red car, and ""a"" dog"\r\n2,\r\n\r\n3,"two\nlines"\r\n'
    assert texts(table) == ['a red car, and "a" dog', "", "", "two\nlines"]


@pytest.mark.parametrize("separator", ["\t", "|"])
def test_quotes_are_content_where_the_file_quotes_nothing(separator):
    table = 'Prompt\tKind\n"OPEN"\tsign\n"G I G" painted on a wall\tx\na 12" pizza\ty\n'.replace("\t", separator)
    assert texts(table) == ['"OPEN"', '"G I G" painted on a wall', 'a 12" pizza']
    assert texts(table.replace('"G I G" painted', "painted")) == ['"OPEN"', "painted on a wall", 'a 12" pizza']


@pytest.mark.parametrize(
    "table",
    [
        '"Prompt"\t"Kind"\n"OPEN"\t"x"\n',
        'Prompt\tKind\n"OPEN"\t"a ""b"""\n',
        'Prompt\tKind\n"OPEN"\t"a\tb"\n',
        'Prompt\tKind\n"OPEN"\t"a\nb"\n',
    ],
)
def test_quotes_are_quoting_where_the_file_shows_that_it_quotes(table):
    assert texts(table, ending=".tsv") == ["OPEN"]


def test_quotes_that_can_be_read_both_ways_are_refused_with_the_line():
    with pytest.raises(
        PromptsError, match=r"^p line 3 is ambiguous: it begins a row, or continues a quoted text of several"
    ):
        texts('prompt\n"a\nb"\n', ending=".tsv")


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        (
            "prompt,x;text\na,b;c\n",
            None,
            r"^p line 1 has a prompt column whether split at commas or at semicol",
        ),
        (
            "p;q\n1;2\n",
            None,
            r"^p line 1 has the columns p, q and none of prompt, text, caption: name one with :column=",
        ),
        ("p;q\n1;2\n", "r", r"^p line 1 has no column 'r': found p, q$"),
        (
            "words\na\n",
            None,
            r"^p line 1 is 'words', expected a header with one of prompt, text, caption: add one, nam",
        ),
        ("\n\na red car\nb\n", None, r"^p line 3 is 'a red car', expected a header"),
        ("text,text\na,b\n", None, r"^p line 1 has a column twice \(text, text\): expected one column 'text'$"),
        ("text,id\na,1\na, b,2\n", None, r"^p line 3 has 3 columns, its header 2 \(text, id\): put a text with"),
        ('text,id\n"a\n\nb",1\nc\n', None, r"^p line 5 has 1 column, its header 2 \(text, id\)"),
        ('text,id\r"a\r', None, r"^p line 2 cannot be split into columns \(unexpected end of data\): close each quote"),
        ('text\tid\n"a\nb"\t1\n"c\n', None, r"^p line 4 cannot be split into columns \(unexpected end of data\)"),
        ("text,id\na,1\nText,ID\nb,2\n", None, r"^p line 3 repeats the header \(Text, ID\): files were concat"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_line(table, column, message):
    with pytest.raises(PromptsError, match=message):
        texts(table, column=column)


def test_trailing_columns_without_a_name_do_no_harm():
    assert texts("prompt,kind,,\na,b,,\n") == ["a"]


def test_other_columns_of_a_row_are_read_by_their_names_in_small_letters():
    (row,) = separated_rows("File;Prompt\nx.png;a\n", name="p", ending=".csv", column=None)
    assert (row.text, row.where, row.others) == ("a", "p line 2", {"file": "x.png"})


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("prompt", "prompt"),
        ("Caption", "Caption"),
        ("id;prompt", "prompt"),
        ('"id"|"TEXT"', "TEXT"),
        ("a red car", None),
        ("portrait, text, watermark", None),
        ("a sign with the text, large", None),
    ],
)
def test_a_header_is_known_by_a_cell_that_is_a_usual_name(line, name):
    assert header_of_a_table(line) == name
