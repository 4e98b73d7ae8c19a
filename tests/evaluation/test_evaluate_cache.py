"""`secondcast evaluate score --cache`: tables, JSON and a file of the same numbers; each error is one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import typer

from secondcast import cli
from secondcast.commands.evaluate.cache import CACHE_FLAGS, POCKET_FLAGS
from secondcast.evaluation.results import Evaluation
from secondcast.evaluation.tables.aggregates import summary
from secondcast.models.student.student import load_student
from secondcast.pocket import STUDENTS_FOLDER, TEACHER_FOLDER
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.run.export import export
from tests.commands.test_cli import secondcast
from tests.evaluation.recorded import ROWS, STEPS, build_recorded, make_student
from tests.models.families.random_teacher import make_teacher
from tests.models.student.encoders import make_encoder_folder, rewrite_config

pytest.importorskip("skimage")


@pytest.fixture
def words(student, recorded, dev_teacher):
    batch = ["--batch-size", ROWS, "--device", "cpu"]
    return ["evaluate", "score", student, "--cache", recorded, "--backbone", dev_teacher, *batch]


def one_line(said: tuple[int, str, str]) -> str:
    code, out, heard = said
    last = heard.strip().splitlines()[-1]
    assert code == 1 and not out and last.startswith("secondcast: ") and "Traceback" not in heard
    return last.removeprefix("secondcast: ")


@pytest.mark.thorough
def test_tables_json_and_file_hold_the_same_numbers(tmp_path, words, student, recorded, capsys):
    file = tmp_path / "results/student.json"
    asked = [*words, "--num-trajectories", 4, "--closed-loop", 2, "--random-baseline", "--quiet", "--out", file]
    code, said, _ = secondcast(*asked, "--json", capsys=capsys)
    found = Evaluation.read(file)
    facts = json.loads(said)["cache"]
    assert code == 0 and facts == summary(found)
    assert (found.student, found.cache, found.steps) == (str(student), str(recorded), tuple(range(STEPS)))
    assert (found.committed, found.held_out, len(found.trajectories)) == (12, 8, 4)
    assert facts["open_loop"]["overall"]["records"] == 4 * STEPS and len(facts["open_loop"]["hardest_prompts"]) == 4
    assert [row["text_encoder"] for row in facts["closed_loop"]] == ["student", "teacher", "untrained"]
    code, said, heard = secondcast(*asked, capsys=capsys)
    assert code == 0 and heard.count("no LPIPS") == 0
    overall = facts["open_loop"]["overall"]
    for told in (f"{100 * overall['error_fraction']:.2f} %", f"{overall['error_mean_square']:.3g}", "0.00 %"):
        assert told in said
    assert all(one.prompt in said for one in found.trajectories) and "few" in said and "3.5" in said
    led = facts["closed_loop"][0]
    assert (
        "closed loop, 2 trajectories sampled with student: error of the final latent "
        f"{100 * led['latent_fraction']:.2f} %, PSNR {led['psnr_db']:.2f} dB, SSIM {led['ssim']:.4f}"
    ) in said
    assert (
        "closed loop, 2 trajectories sampled with teacher: error of the final latent 0.00 %, all pictures identical"
        in said
    )


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_export_is_evaluated(tmp_path, student, recorded, dev_teacher, kind, capsys):
    export(student, tmp_path / kind, quantize=kind)
    words = ["evaluate", "score", tmp_path / kind, "--cache", recorded, "--backbone", dev_teacher, "--device", "cpu"]
    code, said, _ = secondcast(*words, "--batch-size", ROWS, "--closed-loop", 0, "--json", "--quiet", capsys=capsys)
    assert code == 0 and json.loads(said)["cache"]["open_loop"]["overall"]["error_fraction"] > 0


@pytest.mark.thorough
def test_the_record_survives_a_round_trip_and_other_files_are_refused(tmp_path, words, capsys):
    file = tmp_path / "a.json"
    assert secondcast(*words, "--num-trajectories", 1, "--closed-loop", 1, "--out", file, capsys=capsys)[0] == 0
    found = Evaluation.read(file)
    found.write(tmp_path / "b.json")
    assert Evaluation.read(tmp_path / "b.json") == found and (tmp_path / "b.json").read_bytes() == file.read_bytes()
    body = found.json_value()
    # Given again it replaces its own record, and no other file.
    assert secondcast(*words, "--num-trajectories", 2, "--closed-loop", 0, "--out", file, capsys=capsys)[0] == 0
    assert len(Evaluation.read(file).trajectories) == 2
    for foreign in (found.model_copy(update={"student_digest": "of before"}).encode(), b"mine", b"{}"):
        (tmp_path / "mine.json").write_bytes(foreign)
        told = secondcast(
            *words, "--num-trajectories", 1, "--closed-loop", 0, "--out", tmp_path / "mine.json", capsys=capsys
        )
        assert one_line(told) == (
            f"{tmp_path}/mine.json exists and would be lost: give another --out, or --overwrite to replace it"
        )
        assert (tmp_path / "mine.json").read_bytes() == foreign
    for change, said in (
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"steps": [0]}, "settings: found 1 step and 3 sigmas, expected equal numbers"),
        ({"sigmas": body["sigmas"][:1], "steps": [0]}, "errors are not of 1 trajectory times 1 step"),
        (
            {"closed_loop": body["closed_loop"] | {"trajectories": [7]}},
            "closed_loop has a trajectory outside the 1 of the evaluation",
        ),
        ({"closed_loop": body["closed_loop"] | {"trajectories": [0, 0]}}, ": expected one value for each of 2"),
        ({"more": 1}, "more is an unknown key"),
    ):
        (tmp_path / "c.json").write_text(json.dumps(body | change))
        with pytest.raises(
            SettingsError, match=rf"c.json is not an evaluation that this version can read .*{said}.*again"
        ):
            Evaluation.read(tmp_path / "c.json")
    with pytest.raises(
        SettingsError, match=r"no file .*/nix.json: expected the output of `secondcast evaluate score --out`"
    ):
        Evaluation.read(tmp_path / "nix.json")
    (tmp_path / "c.json").write_text("[")
    with pytest.raises(
        SettingsError, match=r"c.json is not readable JSON: expected the output of `secondcast evaluate "
    ):
        Evaluation.read(tmp_path / "c.json")


def test_a_file_that_cannot_be_written_is_told_before_anything_is_opened(tmp_path, capsys):
    (tmp_path / "there").write_text("")
    for place, reason in ((tmp_path / "there/x.json", "File exists"), (tmp_path, "Is a directory")):
        words = ["evaluate", "score", "no-student", "--cache", "no-cache", "--out", place]
        assert one_line(secondcast(*words, capsys=capsys)) == (
            f"{place} cannot be written ({reason}): give another --out"
        )


@pytest.mark.thorough
def test_a_cache_that_is_still_being_built_is_evaluated_as_far_as_it_goes(tmp_path, words, recorded, capsys):
    shutil.copytree(recorded, tmp_path / "c")
    (tmp_path / "c/commits/index.json").unlink()
    (tmp_path / "c/commits/trajectories-000000.json").unlink()
    words[words.index(recorded)] = tmp_path / "c"
    left = [Cache.open(tmp_path / "c").layout.place(int(i)).prompt for i in Cache.open(tmp_path / "c").indices()]
    held_out = sum(Cache.open(tmp_path / "c").prompts[prompt].held_out for prompt in left)
    code, said, heard = secondcast(*words, "--closed-loop", 0, capsys=capsys)
    assert code == 0 and f"on {held_out} of {held_out} held-out trajectories" in said
    assert (
        f"{tmp_path}/c is not finished: 8 of its 12 trajectories are committed; only the {held_out} held-out ones "
        f"among them are evaluated"
    ) in heard


@pytest.mark.thorough
def test_a_student_with_its_own_tokenizer_is_evaluated_on_its_own_tokens(tmp_path, words, student, recorded, capsys):
    source = make_encoder_folder(tmp_path / "roberta", "roberta")
    own = make_student(tmp_path / "own", source, recorded)
    length = load_student(own).config.text_length
    words[words.index(student)] = own
    code, said, heard = secondcast(*words, "--num-trajectories", 2, "--closed-loop", 1, "--json", capsys=capsys)
    facts = json.loads(said)["cache"]
    assert code == 0 and length == 10
    assert "the student has positions for 10 text tokens, but the cache's embeddings have 12" in heard
    assert facts["open_loop"]["overall"]["error_fraction"] > 0 == facts["open_loop"]["overall"]["replay_error_fraction"]
    assert facts["closed_loop"][0]["latent_fraction"] > 0


@pytest.mark.thorough
def test_what_does_not_fit_together_is_one_line(tmp_path, words, student, recorded, dev_teacher, capsys):
    def said(*more, **instead) -> str:
        swapped = [instead.get(str(word), word) for word in words]
        return one_line(secondcast(*swapped, *more, capsys=capsys))

    other = make_teacher(tmp_path / "other", seed=5)
    found = said(**{str(dev_teacher): other})
    assert re.fullmatch(
        rf"{other}/transformer/\S+ has sha256 \w{{16}}, but the cache was recorded with \w{{16}}, another model: give "
        rf"the recorded one with --backbone",
        found,
    )
    wide = shutil.copytree(student, tmp_path / "longer")
    rewrite_config(Path(wide), text_length=13)
    found = said(**{str(student): wide})
    assert found == (
        f"{wide} was trained with 13 text tokens, the prompts of {recorded} have 12: evaluate it on a cache with its "
        f"text length, such as its training cache"
    )
    assert said("--timesteps", "0,9") == (
        f"--timesteps has step 9, but the trajectories of {recorded} have steps 0 to 2"
    )
    assert said("--timesteps", "one") == "--timesteps is 'one', expected step numbers such as 0,5,10"
    assert "quantize is int8 with gpu-blocks 0" in said("--quantize", "int8", "--gpu-blocks", 0)
    bare = shutil.copytree(dev_teacher, tmp_path / "bare")
    shutil.rmtree(Path(bare) / "vae")
    assert f"{bare} has no vae/" in said(**{str(dev_teacher): bare})
    assert secondcast(
        *[bare if word == dev_teacher else word for word in words], "--closed-loop", 0, "--num-trajectories", 1,
        capsys=capsys,
    )[0] == 0  # fmt: skip


@pytest.mark.thorough
def test_a_student_of_another_width_is_refused(tmp_path, words, student, t5_config, capsys):
    wide = build_recorded(
        tmp_path / "wide", make_teacher(tmp_path / "t", joint_attention_dim=32, d_model=32), held_out=1, trained=1
    )
    words[words.index(student)] = make_student(tmp_path / "s", t5_config, wide)
    assert one_line(secondcast(*words, capsys=capsys)) == (
        f"{tmp_path}/s has embeddings of width 32, but this teacher reads 24: a student only fits the teacher it was "
        "trained for; train one from this cache"
    )


@pytest.mark.thorough
def test_a_cache_without_held_out_prompts_is_told_so(tmp_path, words, recorded, dev_teacher, capsys):
    words[words.index(recorded)] = build_recorded(tmp_path / "c", dev_teacher, held_out=0, trained=3)
    assert one_line(secondcast(*words, capsys=capsys)) == (
        f"{tmp_path}/c has 3 committed trajectories, none of them of the 0 held-out prompts among its 3: one prompt in "
        f"50 is held out, by a hash of its text, and training uses all others; build more prompts, or give another "
        f"cache of this teacher"
    )


def test_flags_that_do_nothing_are_refused_and_nothing_is_too(words, student, capsys):
    assert one_line(secondcast("evaluate", "score", student, capsys=capsys)).startswith(
        "evaluate score needs --cache (held-out trajectories of a cache) or --pocket "
    )
    found = one_line(secondcast("evaluate", "score", student, "--pocket", "--out", "x.json", capsys=capsys))
    assert found == "--out has no effect without --cache: remove it, or give both"
    found = one_line(secondcast(*words, "--steps", 4, capsys=capsys))
    assert found == "--steps has no effect without --pocket: remove it, or give both"


def test_the_flags_that_are_of_a_cache_or_of_the_pocket_are_flags():
    command = typer.main.get_command(cli.app).commands["evaluate"].commands["score"]
    assert {*CACHE_FLAGS, *POCKET_FLAGS} <= {parameter.name for parameter in command.params}


@pytest.mark.slow
def test_the_pocket_world_and_a_cache_of_its_teacher_together(tmp_path, capsys):
    cache = build_recorded(tmp_path / "c", TEACHER_FOLDER, held_out=2, trained=0, steps=2)
    student = make_student(tmp_path / "s", STUDENTS_FOLDER / "tiny", cache)
    flags = [
        "--num-prompts",
        1,
        "--num-trajectories",
        1,
        "--closed-loop",
        1,
        "--steps",
        1,
        "--batch-size",
        1,
        "--device",
        "cpu",
        "--json",
    ]
    code, said, _ = secondcast("evaluate", "score", student, "--cache", cache, "--pocket", *flags, capsys=capsys)
    facts = json.loads(said)
    assert code == 0 and list(facts) == ["cache", "pocket"]
    assert facts["cache"]["trajectories"] == 1 and {"teacher", "student", "untrained"} <= facts["pocket"][0].keys()
