"""spaCy's noun chunks as T2I-CompBench takes them, from a small pipeline that is saved and loaded like any other."""

import json
import sys

import pytest

from secondcast.evaluation.image_metrics.phrases import NounChunks
from tests.commands.test_cli import secondcast
from tests.evaluation.image_metrics.conftest import make_pictures

DETERMINERS = ("a", "the", "The")
ADJECTIVES = ("red", "blue")
NOUNS = ("book", "cup", "left", "top", "side", "right", "Left")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """English with a component in place of the trained tagger and parser: it knows a few words."""
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed")
    from spacy.language import Language
    from spacy.tokens import Doc

    @Language.component("few_words", assigns=["token.dep", "token.pos", "token.head"])
    def few_words(doc):
        words = [token.text for token in doc]
        nouns = [place for place, word in enumerate(words) if word in NOUNS]
        heads, parts, dependencies = [], [], []
        for place, word in enumerate(words):
            mine = next((noun for noun in nouns if noun > place), None)
            if word in NOUNS:
                heads.append(nouns[0])
                parts.append("NOUN")
                dependencies.append("ROOT" if place == nouns[0] else "dobj")
            else:
                inside = mine is not None and word in (*DETERMINERS, *ADJECTIVES)
                heads.append(mine if inside else (nouns[0] if nouns else 0))
                parts.append("ADJ" if word in ADJECTIVES else "DET" if word in DETERMINERS else "ADP")
                dependencies.append("amod" if inside else "dep")
        spaces = [bool(token.whitespace_) for token in doc]
        return Doc(doc.vocab, words=words, spaces=spaces, heads=heads, deps=dependencies, pos=parts)

    nlp = spacy.blank("en")
    nlp.add_pipe("few_words")
    nlp.meta["name"], nlp.meta["version"] = "few_words", "1.2.3"
    folder = tmp_path_factory.mktemp("spacy") / "few"
    nlp.to_disk(folder)
    return folder


def test_phrases_are_noun_chunks_without_the_four_that_name_nothing(pipeline):
    chunks = NounChunks.load(str(pipeline))
    assert chunks.phrases("The red book on the left of a blue cup") == ("The red book", "a blue cup")
    assert chunks.phrases("a book on top of the side and the right") == ("a book",)
    # As in the original: in this spelling only, and not 'the top' or 'left'.
    assert chunks.phrases("a cup on the top and left") == ("a cup", "the top", "left")
    assert chunks.phrases("a book , " * 10) == ("a book",) * 8
    assert chunks.name.endswith(", en_few_words 1.2.3") and chunks.name.startswith("spaCy ")


def test_adjectives_are_left_out_of_the_text_for_clip(pipeline):
    assert NounChunks.load(str(pipeline)).without_adjectives("The red book by a blue cup.") == "The book by a cup ."


def test_compbench_prompts_carry_them_and_vqa_says_who_found_them(pipeline, blip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for category in ("color", "non_spatial", "shape", "spatial", "texture"):
        (tmp_path / f"{category}_val.txt").write_text("a red book\n" if category == "color" else f"{category} of it\n")
    (tmp_path / "complex_val.txt").write_text("the red cup on the left\n")
    words = ["prompts", "compbench", ".", "out.jsonl", "--split", "val", "--phrases", pipeline]
    assert secondcast(*words, capsys=capsys)[0] == 0
    lines = {entry["source"]: entry for entry in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    name = NounChunks.load(str(pipeline)).name
    assert lines["color"] == {"text": "a red book", "source": "color", "phrases": ["a red book"], "phrases_by": name}
    assert lines["complex"] == {
        "text": "the red cup on the left", "source": "complex", "phrases": ["the red cup"], "phrases_by": name,
        "without_adjectives": "the cup on the left",
    }  # fmt: skip
    folder = tmp_path / "pictures"
    make_pictures(folder, count=6, index=False)
    words = ["evaluate", "images", folder, "--prompts", "out.jsonl", "--metrics", "vqa", "--vqa-model", blip]
    code, said, _ = secondcast(*words, "--device", "cpu", "--quiet", capsys=capsys)
    # The four prompts without a noun have an empty list of phrases: word rules do not take their place.
    assert code == 0 and f"; phrases by {name}\n" in said and "of 2" in said


def test_without_spacy_or_a_pipeline_one_line_says_what_to_install(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for category in ("color", "complex", "non_spatial", "shape", "spatial", "texture"):
        (tmp_path / f"{category}_val.txt").write_text("a red book\n")
    import spacy

    spacy.blank("en").to_disk(tmp_path / "blank")
    words = ["prompts", "compbench", ".", "out.jsonl", "--split", "val", "--phrases"]
    install = "run python -m spacy download en_core_web_sm and give --phrases en_core_web_sm, or give the folder of a"
    for name, reason in (("no_such_pipeline", "[E050] Can't find model 'no_such_pipeline'."), ("blank", "[E029]")):
        code, _, heard = secondcast(*words, name, capsys=capsys)
        assert code == 1 and heard.count("\n") == 1 and not (tmp_path / "out.jsonl").exists()
        assert heard.startswith(f"secondcast: --phrases {name} is not a spaCy pipeline with noun chunks ({reason}")
        assert install in heard
    monkeypatch.setitem(sys.modules, "spacy", None)
    code, _, heard = secondcast(*words, "en_core_web_sm", capsys=capsys)
    assert (code, heard) == (
        1,
        "secondcast: --phrases en_core_web_sm needs spaCy, which is not installed: pip install "
        "'secondcast[phrases]', then python -m spacy download en_core_web_sm\n",
    )
