"""The command line as a user meets it: one line per error, exit code not 0, no traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secondcast import cli

ROOT = Path(__file__).resolve().parents[2]


def secondcast(*words: str | Path, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Run the command line in this process; exit code, stdout, stderr."""
    argv, sys.argv = sys.argv, ["secondcast", *map(str, words)]
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def pocket_prompts(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    assert secondcast("prompts", "pocket", file, "--num-prompts", "70", capsys=capsys)[0] == 0
    return file


@pytest.mark.thorough
def test_the_whole_road_on_the_pocket_teacher(tmp_path, pocket_prompts, capsys):
    cache, run, out = tmp_path / "cache", tmp_path / "run", tmp_path / "student"
    code, said, _ = secondcast(
        "build",
        cache,
        "--teacher",
        "pocket",
        "--prompts",
        pocket_prompts,
        "--steps",
        4,
        "--batch-size",
        32,
        capsys=capsys,
    )
    assert code == 0 and "70 trajectories of 70 prompts" in said
    code, said, _ = secondcast("inspect", "summary", cache, capsys=capsys)
    assert code == 0 and "70 of 70 committed" in said and "pocket" in said
    train = [
        "train",
        run,
        "--cache",
        cache,
        "--student",
        "pocket-tiny",
        "--pretrain-steps",
        4,
        "--steps",
        2,
        "--batch-size",
        4,
    ]
    code, said, heard = secondcast(*train, capsys=capsys)
    assert code == 0 and "trained for 6 steps" in said and "replay error" in heard
    assert re.search(r"lowest validation loss \d\S*, of the checkpoint named in best\.json", heard)
    assert secondcast("export", run, out, capsys=capsys)[0] == 0
    code, said, _ = secondcast(
        "evaluate",
        "score",
        out,
        "--pocket",
        "--num-prompts",
        6,
        "--steps",
        2,
        "--sample-grid",
        tmp_path / "p.png",
        "--json",
        capsys=capsys,
    )
    assert code == 0 and '"untrained"' in said and (tmp_path / "p.png").stat().st_size > 1000
    code, _, heard = secondcast(*train, "--seed", 1, capsys=capsys)
    assert code == 1 and "was started with seed = 0, not 1" in heard


@pytest.mark.thorough
def test_every_flag_of_the_teacher_goes_the_whole_road(tmp_path, pocket_prompts, dev_teacher, capsys):
    cache = tmp_path / "cache"
    words = ["build", cache, "--teacher", dev_teacher, "--prompts", pocket_prompts, "--limit", 3, "--steps", 2]
    words += ["--text-length", 30, "--pooled", "clip", "--schedule", "distillt5", "--height", 16, "--width", 24]
    code, said, _ = secondcast(*words, "--attention-backend", "_native_math", capsys=capsys)
    assert code == 0 and re.fullmatch(rf"{cache}: 3 trajectories of 3 prompts, [0-9.]+ KiB\n", said)
    said = secondcast("inspect", "summary", cache, capsys=capsys)[1]
    assert "pooled clip" in said and "distillt5, 2 steps" in said and "24 x 16 pixels" in said
    (cache / "embeddings.zarr/pooled_projections/c/0/0").unlink()
    code, said, _ = secondcast("repair", cache, "--teacher", dev_teacher, capsys=capsys)
    assert code == 0 and "embeddings shard 0: rebuilt" in said
    (tmp_path / "t5").mkdir()
    config = json.loads((dev_teacher / "text_encoder_2/config.json").read_bytes())
    (tmp_path / "t5/config.json").write_text(json.dumps(config))
    train = ["train", tmp_path / "run", "--cache", cache, "--student", tmp_path / "t5", "--steps", 1, "--batch-size", 3]
    code, _, heard = secondcast(*train, capsys=capsys)
    assert code == 0 and "replay error" in heard


@pytest.mark.thorough
def test_real_prompts_build_a_cache_of_the_pocket(tmp_path, shared_prompts, capsys):
    prompts = shared_prompts / "T2I-CompBench/color_train.txt"
    words = ["build", tmp_path / "c", "--teacher", "pocket", "--prompts", prompts, "--limit", 20, "--steps", 2]
    code, said, _ = secondcast(*words, capsys=capsys)
    assert code == 0 and "20 trajectories of 20 prompts" in said
    code, said, _ = secondcast(
        "inspect", "show", tmp_path / "c", "--prompt", "a green bench and a red car", capsys=capsys
    )
    assert code == 0 and "color_train" in said


BUILD = ["build", "c", "--teacher", "pocket", "--prompts", "p.txt"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["build", "c"], 2, r"Missing option '--teacher'"),
        (["bild"], 2, r"No such command 'bild'"),
        (["build", "c", "--teacher", "pocket", "--prompts", "nix.txt"], 1, r"no prompt file nix.txt"),
        (
            ["build", "c", "--teacher", "nix", "--prompts", "p.txt"],
            1,
            r"no teacher 'nix': there is no such folder; give 'pocket', an ex",
        ),
        ([*BUILD, "--guidance", "x"], 1, r"--guidance is 'x', expected"),
        ([*BUILD, "--steps", "0"], 1, "--steps is 0, expected at least 1"),
        ([*BUILD, "--steps", "many"], 2, "--steps is .many., expected an integer"),
        ([*BUILD, "--device", "cuda:9"], 1, r"--device 'cuda:9' cannot"),
        ([*BUILD, "--format", "npz"], 2, r"'npz' is not one of 'zarr'"),
        (
            [*BUILD, "--text-length", "600"],
            1,
            "--text-length is 600, expected at most 512, the most that FluxPipeline takes or "
            "its models were trained with: give a smaller one",
        ),
        (
            [*BUILD, "--pooled", "clip", "--no-store-embeddings"],
            1,
            r": --pooled clip is incompatible with --no-store-embeddings",
        ),
        ([*BUILD, "--pooled", "real"], 2, r"'real' is not one of 'zero', 'clip'"),
        ([*BUILD, "--height", "16"], 1, r"--height is given without --width: give both"),
        ([*BUILD, "--height", "17", "--width", "16"], 1, r"height is 17, expected a multiple of 4: .*; use 16 or 20"),
        ([*BUILD, "--attention-backend", "flush"], 1, r"--attention-backend 'flush' is unknown to diffusers, expect"),
        ([*BUILD, "--revision", "v1"], 1, r"--revision is 'v1', but .* is a folder, and only hub repositories have"),
        (["build", "taken", *BUILD[2:]], 1, r"taken has 'x' and 0 more, but no manifest"),
        (["build", "p.txt", *BUILD[2:]], 1, r"p.txt is a file, expected a new or empty folder"),
        (["build", "p.txt/x", *BUILD[2:]], 1, r"p.txt/x: Not a directory: committed work is kept; fix the cau"),
        (["train", "r", "--cache", "taken", "--student", "pocket-tiny"], 1, r"taken has no manifest.json"),
        (
            ["train", "r", "--cache", "cache", "--student", "pocket-huge"],
            1,
            r"--student 'pocket-huge' is not an embedded student, expected one of",
        ),
        (["inspect", "summary", "nix"], 1, r"nix is not a folder"),
        (["inspect", "show", "taken"], 1, r"inspect show needs one of KEY, --prompt TEXT and --grep WORD"),
        (["evaluate", "score", "nix", "--pocket"], 1, r"no student nix: there is no such folder; give a run folder"),
        (["evaluate", "score", "taken", "--pocket"], 1, r"taken has no student: it has no config.json"),
        (["export", "nix", "out"], 1, r"no student nix"),
        (
            ["prompts", "pocket", "x/y.txt", "--num-prompts", "0"],
            2,
            "--num-prompts is .?0.?, expected at least 1",
        ),
    ],
)
def test_bad_input_is_one_clear_line(words, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken/x").write_text("")
    Path("p.txt").write_text("a red circle\n")
    found, _, heard = secondcast(*words, capsys=capsys)
    last = heard.strip().splitlines()[-1]
    assert (found, last.startswith("secondcast: ")) == (code, True)
    assert re.search(message, last), last
    assert "Traceback" not in heard and not Path("c").exists()


@pytest.mark.thorough
def test_flags_may_come_from_a_toml_file_and_the_command_line_goes_first(tmp_path, pocket_prompts, capsys):
    settings = tmp_path / "build.toml"
    settings.write_text(f'teacher = "pocket"\nprompts = "{pocket_prompts}"\nlimit = 3\nsteps = 2\nshard-size = 2\n')
    code, said, _ = secondcast("build", tmp_path / "c", "--config", settings, "--limit", "5", capsys=capsys)
    assert code == 0 and "5 trajectories of 5 prompts" in said
    assert "2 steps" in secondcast("inspect", "summary", tmp_path / "c", capsys=capsys)[1]
    settings.write_text('teacher = "pocket"\nstep = 2\n')
    code, _, heard = secondcast("build", tmp_path / "d", "--config", settings, capsys=capsys)
    assert code == 1 and "has the unknown key 'step': did you mean steps?" in heard


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_keep_what_was_committed_and_say_so(tmp_path, dev_teacher, number):
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"a red dog and {i} cats\n" for i in range(60)))
    words = [
        "build",
        "c",
        "--teacher",
        str(dev_teacher),
        "--prompts",
        str(prompts),
        "--shard-size",
        "2",
        "--batch-size",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "from secondcast import cli; cli.main()", *words],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell that starts the tests in the background has them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list((tmp_path / "c/commits").glob("trajectories-*.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    heard = process.communicate()[1]
    assert process.returncode == 130
    assert heard.strip().splitlines()[-1] == (
        "secondcast: interrupted: committed work is kept; run the same command again to resume"
    )
    assert "Traceback" not in heard
    assert list((tmp_path / "c/commits").glob("trajectories-*.json"))
