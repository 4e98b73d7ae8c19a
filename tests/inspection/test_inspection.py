"""Looking into a cache: the numbers are those of the records."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from secondcast.api.terminal import Terminal
from secondcast.inspection.images import each_film_strip, shown_steps
from secondcast.inspection.sheet import stacked
from secondcast.inspection.show import describe, find_prompts
from secondcast.inspection.summary import summarise
from secondcast.inspection.summary_text import summary_lines
from secondcast.models.teacher.folder import DECODE_PARTS, find_teacher
from secondcast.storage_schemas.errors import NotInCacheError
from secondcast.storage_schemas.progress import duration_text, size_text
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.prompts import Prompt, prompt_id
from tests.cache_builder.building import build_cache
from tests.commands.test_cli import secondcast
from tests.storage_schemas.caches import write_keyed_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory, dev_teacher):
    folder = tmp_path_factory.mktemp("cache")
    (folder / "animals.txt").write_text("a red dog\ntwo cats\na dog on the left of a cat\n")
    build_cache(folder / "c", dev_teacher, folder / "animals.txt", samples_per_prompt=2)
    return Cache.open(folder / "c")


def test_the_summary_counts_what_is_there(cache):
    facts = summarise(cache)
    assert facts["trajectories"] == {"committed": 6, "planned": 6} and facts["state"] == "finished"
    assert facts["prompts"]["sources"] == {"animals": 3}
    on_disk = sum(
        p.stat().st_size
        for name in ("trajectories.zarr", "embeddings.zarr")
        for p in (cache.folder.path / name).rglob("c/**/*")
        if p.is_file()
    )
    assert facts["storage"]["bytes"] == on_disk
    # Per trajectory 4 predictions, noise and final latent of 16 x 16 bf16, one fp32 guidance; per prompt 12 x 24.
    assert facts["storage"]["raw_bytes"] == 6 * (6 * 512 + 4) + 3 * 12 * 24 * 2
    assert json.loads(json.dumps(facts)) == facts
    text = "\n".join(value for _, value in summary_lines(facts))
    assert "6 of 6 committed" in text and "3 (animals 3)" in text and "16 x 16 pixels" in text


def test_a_cache_still_being_built_says_how_far_it_is(cache, tmp_path):
    import shutil

    shutil.copytree(cache.folder.path, tmp_path / "c")
    (tmp_path / "c/commits/index.json").unlink()
    (tmp_path / "c/commits/trajectories-000001.json").unlink()
    facts = summarise(Cache.open(tmp_path / "c"))
    assert facts["state"] == "being built" and facts["trajectories"] == {"committed": 3, "planned": 6}


def test_a_trajectory_is_shown_with_its_own_numbers(cache):
    facts = describe(cache, 4)
    trajectory = cache.trajectory(4)
    assert (facts["prompt"], facts["sample_index"], facts["guidance"]) == ("two cats", 1, trajectory.guidance)
    assert facts["tokens"][-1] == "</s>" and facts["tokens"][0] == "▁two"
    velocity = trajectory.velocity_KSC[2].astype(np.float64)
    assert facts["steps"][2]["velocity_rms"] == pytest.approx(np.sqrt((velocity**2).mean()))
    assert facts["steps"][0]["clean_latent_moved"] is None and facts["steps"][1]["clean_latent_moved"] > 0
    assert [step["non_finite"] for step in facts["steps"]] == [0] * 4


def test_prompts_are_found_by_a_word_whatever_its_case(cache):
    assert [(index, text) for index, _, text in find_prompts(cache, "DOG", limit=9)] == [
        (0, "a red dog"),
        (2, "a dog on the left of a cat"),
    ]
    # One more than the limit: there are more.
    assert len(find_prompts(cache, "a", limit=1)) == 2


def test_a_prompt_is_printed_as_its_letters_whatever_a_terminal_would_make_of_them(tmp_path, capsys):
    text = "a :dog: sign [bold] \x1b[31mred\nnext"
    write_keyed_cache(tmp_path / "c", [Prompt(id=prompt_id(text), text=text, sources=("s",), token_ids=(5, 1))])
    code, said, heard = secondcast("inspect", "show", tmp_path / "c", "--grep", "sign", capsys=capsys)
    assert code == 0, heard
    assert said.splitlines()[1].endswith(r"a :dog: sign [bold] \x1b[31mred\nnext")


def test_keys_numbers_and_beginnings_of_keys_lead_to_a_trajectory(cache):
    key = cache.trajectory(5).key
    assert cache.key_index("5") == cache.key_index(key) == 5
    with pytest.raises(NotInCacheError, match="begin with '²'"):
        cache.key_index("²")


def test_film_strips_need_the_vae_alone_and_show_the_steps(cache, dev_teacher, tmp_path):
    import shutil

    shutil.copytree(dev_teacher / "vae", tmp_path / "t/vae")
    teacher = find_teacher(str(tmp_path / "t"), DECODE_PARTS)
    steps = shown_steps(cache.manifest.sampling.steps, 3)
    strips = each_film_strip(cache, teacher, [0, 3], steps, device=torch.device("cpu"))
    sheet = stacked([strip for _, strip in strips])
    assert sheet.width == 90 + 4 * 100 and sheet.height == 2 * (22 + 16 + 200 + 8)
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 50


def test_a_log_gets_plain_lines_and_quiet_gets_none():
    for quiet in (False, True):
        stream = io.StringIO()
        terminal = Terminal(Console(file=stream), quiet=quiet)
        terminal.say("hello")
        with terminal.bar("sample", total=4, done=1, unit="trajectories") as bar:
            bar.advance(3)
        written = stream.getvalue()
        assert written == "" if quiet else written.startswith("hello\nsample: 4 of 4 trajectories, ")
        assert written.count("\n") == (0 if quiet else 2)


def test_a_terminal_gets_a_bar_with_rate_and_time_left():
    stream = io.StringIO()
    terminal = Terminal(Console(file=stream, force_terminal=True, width=120))
    with terminal.bar("sample", total=4, done=1, unit="trajectories") as bar:
        bar.advance(2)
    assert "3/4" in stream.getvalue() and "/s" in stream.getvalue() and "left" in stream.getvalue()


def test_a_terminal_of_80_columns_shows_all_numbers_of_a_bar_and_cuts_the_note():
    stream = io.StringIO()
    terminal = Terminal(Console(file=stream, force_terminal=True, color_system=None, width=80))
    with terminal.bar("train", total=120_000, done=50_000, unit="steps") as bar:
        bar.advance(1, "vision loss 1.493 (replay error 0.00123), stage text-rendering of a long name")
    last = [line for line in stream.getvalue().replace("\r", "\n").splitlines() if "vision loss" in line][-1]
    assert " 50001/120000 steps " in last
    assert "vision loss" in last and "…" in last and last.index("left") < last.index("vision loss")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_title_a_note_and_a_message_are_plain_text_in_any_encoding(encoding, is_terminal):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    terminal = Terminal(Console(file=stream, force_terminal=is_terminal, width=200, color_system=None))
    terminal.say("said \x1b[31mred\x9b 中")
    with terminal.bar("run[/red]\x1b]0;x\x07 中", total=2, done=0, unit="steps") as bar:
        bar.advance(2, "note \x1b[2J 中")
    written = stream.buffer.getvalue().decode(encoding)
    assert r"said \x1b[31mred\x9b" in written and r"run[/red]\x1b]0;x\x07" in written and r"note \x1b[2J" in written
    assert not {"\x1b[31m", "\x1b]0;", "\x1b[2J", "\x9b", "\x07"} & {written[i : i + n] for n in (1, 4, 5)
                                                                   for i in range(len(written))}  # fmt: skip


def test_times_for_people():
    assert [duration_text(n) for n in (0.4, 46, 119, 120, 7199, 45_519, 72 * 3600)] == [
        "0 s",
        "46 s",
        "119 s",
        "2 min",
        "120 min",
        "12.6 h",
        "72 h",
    ]


def test_sizes_for_people():
    assert [size_text(n) for n in (0, 1023, 1536, 5 * 2**20, 3 * 2**40)] == [
        "0 bytes",
        "1,023 bytes",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]
