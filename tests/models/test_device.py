"""A device by name."""

import pytest
import torch

from secondcast.models.device import usable_device
from secondcast.storage_schemas.errors import SettingsError
from tests.commands.test_cli import secondcast


@pytest.mark.parametrize("name", ["mps", "mps:0", "xpu", "meta", "meta:-1", "gpu", "CUDA", ""])
def test_a_kind_of_device_that_was_never_checked_is_refused_in_one_line(name):
    with pytest.raises(SettingsError) as raised:
        usable_device(name)
    assert str(raised.value) == (
        f"--device {name!r} is not supported, expected auto, cpu, cuda or, for example, cuda:1"
    )


def test_a_device_that_is_not_there_is_named_with_the_reason():
    with pytest.raises(SettingsError) as raised:
        usable_device("cpu:x")
    assert str(raised.value) == (
        "--device 'cpu:x' cannot be used here (Invalid device string: 'cpu:x'): use auto, cpu or cuda"
    )
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match=r"^--device 'cuda:1' cannot be used here \([^\n]{3,80}\): use"):
            usable_device("cuda:1")


@pytest.mark.parametrize(
    "words",
    [
        ["build", "c", "--teacher", "pocket", "--prompts", "p.txt"],
        ["generate", "teacher", "--teacher", "pocket", "--prompts", "p.txt", "--out", "o"],
        ["evaluate", "images", "."],
    ],
    ids=lambda words: words[0],
)
def test_every_command_refuses_mps_in_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a dog\n")
    (tmp_path / "a.png").write_bytes(b"")
    code, said, heard = secondcast(*words, "--device", "mps", capsys=capsys)
    assert (code, said) == (1, "")
    assert heard == ("secondcast: --device 'mps' is not supported, expected auto, cpu, cuda or, for example, cuda:1\n")
    assert sorted(file.name for file in tmp_path.iterdir()) in (["a.png", "p.txt"],)
