"""`secondcast prompts` and `build --prompts` as a user meets them."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.prompts import prompt_id
from tests.commands.test_cli import secondcast

ROOT = Path(__file__).resolve().parents[2]
CATEGORIES = ("color", "complex", "non_spatial", "shape", "spatial", "texture")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a red circle\n\na blue square\na red circle\n")
    Path("b.csv").write_text("id,caption\n1,a blue square\n2,a green cross\n")


@pytest.fixture
def bench():
    Path("bench").mkdir()
    for category in (*CATEGORIES, "3d_spatial", "numeracy", "complex_train_action"):
        name = category if category.startswith("complex_train") else f"{category}_train"
        Path(f"bench/{name}.txt").write_text(f"{category} one\nshared\n{category} one")


def test_list_prints_the_prompts_in_the_order_of_a_build(capsys):
    code, said, _ = secondcast("prompts", "list", "a.txt", "b.csv:repeat=2", capsys=capsys)
    assert (code, said) == (0, "a blue square\na green cross\na red circle\n")
    said = secondcast("prompts", "list", "a.txt", "b.csv", "--limit", 2, "--json", capsys=capsys)[1]
    assert json.loads(said) == [
        {"text": "a red circle", "sources": ["a"], "repeat": 1},
        {"text": "a blue square", "sources": ["a", "b"], "repeat": 1},
    ]


def test_count_says_what_each_source_gives(capsys):
    code, said, _ = secondcast("prompts", "count", "a.txt", "b.csv", capsys=capsys)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert code == 0 and rows == [
        ["a.txt", "4", "2", "2", "1", "1", "0"],
        ["b.csv", "2", "2", "1", "0", "1", "0"],
    ]
    assert said.splitlines()[-1] == "3 distinct prompts (1 empty and 2 repeated lines skipped)"


def test_count_with_a_teacher_says_how_many_tokens_there_are_and_what_is_cut(capsys, dev_teacher):
    Path("long.txt").write_text(f"a dog\n{'a red car ' * 40}\n")
    words = ["prompts", "count", "long.txt", "--teacher", dev_teacher]
    tokens = json.loads(secondcast(*words, "--json", capsys=capsys)[1])["tokens"]
    assert (tokens["cut"], tokens["text_length"]) == (1, 12) and tokens["longest"] > 100
    assert tokens["longest_text"].startswith("a red car a red car")
    said = secondcast(*words, capsys=capsys)[1]
    assert f"tokens: mean {tokens['mean']:.1f}, longest {tokens['longest']} ('a red car" in said
    assert said.endswith("; longer than 12 and truncated: 1\n")


def test_count_with_a_teacher_says_how_many_prompts_it_does_not_tell_apart(capsys):
    # Two characters that the vocabulary lacks; the last two lines are one prompt, not two that look alike.
    Path("p.txt").write_text("a \u2603\na red circle\na \u265e\na  red circle\n")
    words = ["prompts", "count", "p.txt", "--teacher", "pocket"]
    facts = json.loads(secondcast(*words, "--json", capsys=capsys)[1])
    assert (facts["distinct"], facts["repeated"]) == (3, 1)
    assert (facts["tokens"]["same"], facts["tokens"]["same_texts"]) == (2, ["a \u2603", "a \u265e"])
    code, said, _ = secondcast(*words, capsys=capsys)
    assert code == 0 and said.endswith(
        "2 prompts with the same tokens as another, such as 'a \u2603' and 'a \u265e': the teacher cannot distinguish "
        "them\n"
    )
    said = secondcast("prompts", "count", "a.txt", "--teacher", "pocket", capsys=capsys)[1]
    assert "same tokens" not in said


@pytest.mark.parametrize(
    ("name", "content", "listed"),
    [
        ("p.csv", b"prompt;category\na red car;color\n", "a red car\n"),
        ("p.tsv", b'Prompt\tCategory\n"OPEN"\tx\n"G I G" on a wall\ty\n', '"OPEN"\n"G I G" on a wall\n'),
        ("p.ndjson", b'{"prompt": "a", "source": ["x"]}\n{"prompt": "b", "source": 1}\n', "a\nb\n"),
        ("p.JSONL", b'{"prompt": "a", "source": {"x": 1}}\n', "a\n"),
        ("p.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', "a\nb\n"),
        ("p.txt", b"a\rb\r\xef\xbb\xbfc\r\xe2\x80\x8b\ra \xe2\x80\x8b\r", "a\nb\nc\n"),
        ("p.txt", "a\r\nb".encode("utf-16"), "a\nb\n"),
    ],
)
def test_published_forms_of_prompt_files_are_read(name, content, listed, capsys):
    Path(name).write_bytes(content)
    assert secondcast("prompts", "list", name, capsys=capsys)[:2] == (0, listed)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"words;category\na;b\n", "p.csv line 1 has the columns words, category and none of prompt, text,"),
        ("p.csv", b"words\na red car\n", "p.csv line 1 is 'words', expected a header with one of prompt, text,"),
        (
            "p.txt",
            b"prompt;category\na;b\n",
            "p.txt line 1 is 'prompt;category', the header of a table: append :column=",
        ),
        ("p.txt", b"a\ncaf\xe9\n", "p.txt line 2 is not UTF-8 text (byte 0xe9): expected one prompt per line"),
        ("p.csv", b"prompt,id\na,1\n\xef\xbb\xbfprompt,id\nb,2\n", "p.csv line 3 repeats the header (prompt, id):"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 2}\n', "p.jsonl line 2, column 'prompt', is int, expected text"),
    ],
)
def test_prompt_files_that_cannot_be_read_are_one_line_with_its_number(name, content, message, capsys):
    Path(name).write_bytes(content)
    code, said, heard = secondcast("prompts", "list", name, capsys=capsys)
    assert (code, said, heard.count("\n")) == (1, "", 1) and heard.startswith(f"secondcast: {message}"), heard


@pytest.mark.slow
def test_prompts_come_from_stdin_and_from_process_substitution():
    def listed(command):
        run = f'"{sys.executable}" -c "from secondcast import cli; cli.main()" prompts'
        done = subprocess.run(["bash", "-c", command.replace("prompts", run, 1)], capture_output=True, text=True)
        assert done.stderr == "", done.stderr
        return done.stdout

    assert listed("prompts list - < a.txt") == "a red circle\na blue square\n"
    assert listed("prompts list <(tail -n 2 a.txt) a.txt") == "a blue square\na red circle\n"
    assert json.loads(listed("prompts list /dev/stdin:column=caption --json < b.csv"))[0]["sources"] == ["stdin"]


@pytest.mark.thorough
def test_a_build_reads_stdin_once_and_a_twin_of_a_prompt_is_no_second_one(monkeypatch, capsys):
    lines = "a red  circle\n\u200b\na blue square\na red circle\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    words = ["build", "c", "--teacher", "pocket", "--prompts", "-", "--steps", 1]
    code, said, heard = secondcast(*words, capsys=capsys)
    assert code == 0 and "2 trajectories of 2 prompts" in said
    assert "2 distinct prompts x 1 sample = 2 trajectories (1 empty and 1 repeated lines skipped)" in heard
    cache = Cache.open("c")
    assert [prompt.text for prompt in cache.prompts] == ["a red  circle", "a blue square"]
    assert cache.prompts[0].id == prompt_id("a red circle") and cache.manifest.prompts.sources == {"stdin": 2}


@pytest.mark.parametrize(("categories", "count"), [("paper", 6), ("all", 8)])
def test_compbench_takes_whole_categories_and_keeps_their_names(bench, categories, count, capsys):
    words = ["prompts", "compbench", "bench", "out.jsonl", "--categories", categories]
    code, said, _ = secondcast(*words, capsys=capsys)
    assert code == 0 and f"{count + 1} distinct prompts of {3 * count} lines in {count} categories" in said
    facts = json.loads(secondcast("prompts", "count", "out.jsonl", "--json", capsys=capsys)[1])
    assert facts["distinct"] == count + 1
    assert facts["names"] == dict.fromkeys(facts["names"], 2) and len(facts["names"]) == count
    assert {"color_train", "complex_train"} <= facts["names"].keys() and "complex_train_action" not in facts["names"]


def test_the_papers_compbench_has_4200_lines_and_4159_distinct_prompts(shared_prompts, capsys):
    code, said, _ = secondcast("prompts", "compbench", shared_prompts / "T2I-CompBench", "out.jsonl", capsys=capsys)
    assert code == 0 and "4,159 distinct prompts of 4,200 lines in 6 categories" in said
    said = secondcast("prompts", "count", "out.jsonl", "--json", capsys=capsys)[1]
    assert json.loads(said)["names"] == {
        "color_train": 679, "complex_train": 700, "non_spatial_train": 700, "shape_train": 685, "spatial_train": 700,
        "texture_train": 695,
    }  # fmt: skip


@pytest.fixture
def bench_val(bench):
    for category in CATEGORIES:
        text = f"{category} one\n\n{category} Two\n{category}  one\n" if category != "complex" else "z\ny\nx\nw\n"
        Path(f"bench/{category}_val.txt").write_text(text)
    for kind, text in (("spatial", "x\n"), ("action", "x\ny\n"), ("spatialaction", "z\n")):
        Path(f"bench/complex_val_{kind}.txt").write_text(text)


def test_the_validation_split_has_a_line_per_prompt_with_its_category_in_the_order_of_the_files(bench_val, capsys):
    code, said, _ = secondcast("prompts", "compbench", "bench", "out.jsonl", "--split", "val", capsys=capsys)
    assert code == 0 and said == (
        "out.jsonl: 14 distinct prompts of 24 lines in 6 categories (5 empty and 5 repeated lines skipped)\n"
    )
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert lines[:6] == [
        {"text": "color one", "source": "color"},
        {"text": "color Two", "source": "color"},
        {"text": "z", "source": ["complex", "complex_spatialaction"]},
        {"text": "y", "source": ["complex", "complex_action"]},
        {"text": "x", "source": ["complex", "complex_spatial"]},
        {"text": "w", "source": "complex"},
    ]
    assert {line["source"] for line in lines[6:]} == {"non_spatial", "shape", "spatial", "texture"}
    code, _, heard = secondcast(
        "prompts", "compbench", "bench", "o.jsonl", "--split", "val", "--categories", "all", capsys=capsys
    )
    assert code == 1 and heard.startswith("secondcast: bench has no 3d_spatial_val.txt, numeracy_val.txt: expected the")


def test_the_benchmarks_validation_sets_have_2395_distinct_prompts(shared_prompts, capsys):
    words = ["prompts", "compbench", shared_prompts / "T2I-CompBench", "out.jsonl", "--split", "val"]
    code, said, _ = secondcast(*words, "--categories", "all", capsys=capsys)
    assert code == 0 and "2,395 distinct prompts of 2,400 lines in 8 categories (0 empty and 5 repeated lines" in said
    said = secondcast("prompts", "count", "out.jsonl", "--json", capsys=capsys)[1]
    assert json.loads(said)["names"] == {
        **dict.fromkeys(("3d_spatial", "non_spatial", "numeracy", "shape", "spatial", "texture"), 300),
        "color": 295, "complex": 300, "complex_spatial": 58, "complex_action": 212, "complex_spatialaction": 30,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["signs.txt", "signs.json", "signs.jsonl"])
def test_signs_are_read_back_from_every_ending(name, capsys):
    assert secondcast("prompts", "commontext", name, "--num-prompts", 50, capsys=capsys)[1] == f"50 prompts in {name}\n"
    facts = json.loads(secondcast("prompts", "count", name, "--json", capsys=capsys)[1])
    assert (facts["distinct"], facts["repeated"], facts["names"]) == (50, 0, {"signs": 50})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["count", "nix.txt"], "no prompt file nix.txt: expected a text file"),
        (["count", "a.txt:limit=x"], "prompt source 'a.txt:limit=x' has limit=x, expected an integer from 1 to"),
        (["list", "b.csv:column=text"], "b.csv line 1 has no column 'text': found id, caption"),
        (
            ["count", "bench"],
            "bench is a folder, expected a file: convert a T2I-CompBench folder with `secondcast prompts compbench "
            "bench FILE.jsonl`,",
        ),
        (["compbench", "nix", "out.jsonl"], "nix has no color_train.txt, complex_train.txt, non_spatial_train.txt"),
        (["compbench", "bench", "out.csv"], "out.csv has the suffix '.csv', expected .jsonl: a build goes by"),
        (["commontext", "out"], "out has the suffix '', expected .txt or .json or .jsonl"),
        (
            ["commontext", "o.txt", "--words", "1", "--num-prompts", "9999"],
            "--num-prompts 9999: 1 word can make at most 1614 distinct prompts",
        ),
        (["count", "a.txt", "--teacher", "nobody"], "no teacher 'nobody': there is no such folder; give 'pocket'"),
    ],
)
def test_bad_input_is_one_clear_line(words, message, bench, capsys):
    code, said, heard = secondcast("prompts", *words, capsys=capsys)
    assert (code, said, heard.count("\n")) == (1, "", 1)
    assert heard.startswith(f"secondcast: {message}"), heard


def test_without_wordfreq_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    code, _, heard = secondcast("prompts", "commontext", "o.txt", capsys=capsys)
    assert code == 1 and heard == (
        "secondcast: words for signs come from wordfreq, which is not installed: pip install 'secondcast[prompts]'\n"
    )


@pytest.mark.thorough
def test_these_commands_start_without_torch(bench):
    lines = ("list a.txt", "count b.csv", "compbench bench o.jsonl", "commontext o.txt --num-prompts 9")
    commands = [line.split() for line in lines]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "for name in ('torch', 'transformers', 'diffusers', 'datasets', 'pyarrow'): sys.modules[name] = None\n"
        "from secondcast import cli\n"
        f"for words in {commands!r}: cli.app(['prompts', *words], standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "9 prompts in o.txt" in done.stdout


@pytest.mark.parametrize("words", [["list"], ["count"], ["compbench"], ["commontext"], ["pocket"]])
def test_every_help_text_has_an_example_of_its_own_command(words, capsys):
    code, said, _ = secondcast("prompts", *words, "--help", capsys=capsys)
    assert code == 0 and f"Example: secondcast prompts {words[0]}" in " ".join(said.split())


@pytest.mark.thorough
def test_a_build_takes_sources_with_keys_from_flags_and_from_a_settings_file(capsys):
    Path("build.toml").write_text(
        'teacher = "pocket"\nprompts = ["a.txt:limit=1", "b.csv:repeat=2:name=notes"]\nsteps = 1\nquiet = true\n'
    )
    code, said, _ = secondcast("build", "c", "--config", "build.toml", capsys=capsys)
    assert code == 0 and "5 trajectories of 3 prompts" in said
    assert Cache.open("c").manifest.prompts.sources == {"a": 1, "notes": 2}
    code, _, heard = secondcast("build", "d", "--teacher", "pocket", "--prompts", "a.txt:limit=x", capsys=capsys)
    assert code == 1 and heard.startswith("secondcast: prompt source 'a.txt:limit=x' has limit=x, expected an integer")
    code, said, _ = secondcast("build", "--help", capsys=capsys)
    assert code == 0 and ":limit= :repeat= (multiplies --samples-per-prompt) :column=" in " ".join(
        said.replace("│", " ").split()
    )
