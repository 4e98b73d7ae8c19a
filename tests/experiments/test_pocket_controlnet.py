"""Control images of the pocket show where objects are and nothing else; its ControlNet is one for `generate`."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import pocket_controlnet
from experiments.pocket_controlnet import (
    control_image,
    drawn,
    print_table,
    silhouette,
    train_controlnet,
    write_controls,
)
from secondcast.models.teacher.controlnet import ControlNetFolder
from secondcast.models.teacher.folder import find_teacher
from secondcast.pocket import TEACHER_FOLDER
from secondcast.pocket.lexicon import SHAPES
from secondcast.pocket.training.pictures import BOARD_HEIGHT
from secondcast.pocket.world import Composition, Landscape, Sign, Thing, bitmap, captions

DISC = Thing(colour="red", shape=next(iter(SHAPES)))
PIXELS = int(bitmap(SHAPES[DISC.shape]).sum())


@pytest.mark.parametrize(
    ("scene", "pixels"),
    [
        (Composition(first=DISC, count=3), 3 * PIXELS),
        (Landscape(thing=DISC, place="sky", sky="night", ground="stone"), PIXELS),
        # The whole board: the letters are for the text encoder to tell.
        (Sign(text="AB", colour="blue"), BOARD_HEIGHT * (4 * 2 + 3)),
    ],
)
def test_a_silhouette_has_the_pixels_of_the_objects_whatever_their_colours(scene, pixels):
    picture = drawn(scene, np.random.default_rng(0))
    assert silhouette(picture, scene).sum() == pixels
    control = control_image(picture, scene)
    assert set(np.unique(control)) == {0, 255} and (control[..., 0] > 0).sum() == pixels


def test_control_images_are_the_same_each_time_and_named_by_number(tmp_path):
    prompts = captions(3, seed=0, split="heldout")
    for name in ("a", "b"):
        write_controls(tmp_path / name, prompts)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes() and Image.open(file).size == (24, 24)


@pytest.mark.slow
def test_a_trained_controlnet_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pocket_controlnet, "DRAWN", 8)
    train_controlnet(tmp_path / "net", steps=2, seed=0)
    found = ControlNetFolder.read(tmp_path / "net", find_teacher(str(TEACHER_FOLDER), ("transformer",)), 1.0)
    network = found.load(dtype=torch.float32, device=torch.device("cpu")).network
    # It begins as zeros.
    assert network.controlnet_blocks[0].weight.abs().max() > 0
    prompts = captions(4, seed=0, split="heldout")
    write_controls(tmp_path / "control", prompts)
    print_table([pocket_controlnet.measure(tmp_path, "teacher", prompts, controlled=on) for on in (False, True)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("| teacher | no | ") and lines[-1].startswith("| teacher | yes | ")
