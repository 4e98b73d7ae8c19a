"""A ControlNet that does not fit the transformer is refused in one line, before its weights are loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel

from secondcast.models.teacher.controlnet import ControlNetFolder
from secondcast.models.teacher.folder import find_teacher
from secondcast.storage_schemas.errors import SettingsError
from tests.models.families.random_pixart import make_pixart


def make_controlnet(folder: Path, teacher: Path, *, seed: int = 0, layers: tuple[int, int] = (1, 1)) -> Path:
    transformer = FluxTransformer2DModel.from_pretrained(teacher, subfolder="transformer")
    config = transformer.config
    torch.manual_seed(seed)
    controlnet = FluxControlNetModel.from_transformer(
        transformer, num_layers=layers[0], num_single_layers=layers[1], attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
    )  # fmt: skip
    for parameter in controlnet.parameters():
        # Its own outputs begin as zeros.
        torch.nn.init.normal_(parameter, std=0.2)
    controlnet.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def controlnet(tmp_path_factory, dev_teacher) -> Path:
    return make_controlnet(tmp_path_factory.mktemp("controlnets") / "net", dev_teacher)


def refused(folder: Path, teacher: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        ControlNetFolder.read(folder, find_teacher(str(teacher), ("transformer",)), 1.0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(controlnet: Path, folder: Path, **config: object) -> Path:
    shutil.copytree(controlnet, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | config))
    return folder


def test_a_controlnet_states_its_size_and_whether_it_takes_guidance(controlnet, dev_teacher):
    found = ControlNetFolder.read(controlnet, find_teacher(str(dev_teacher), ("transformer",)), 0.5)
    network = found.load(dtype=torch.float32, device=torch.device("cpu")).network
    assert found.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert found.takes_guidance and not any(parameter.requires_grad for parameter in network.parameters())
    width = network.config.num_attention_heads * network.config.attention_head_dim
    assert found.added_bytes(image_tokens=16, itemsize=2) == 3 * 2 * 16 * width * 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 64}, "has in_channels = 64, expected 16 as in the transformer"),
        ({"joint_attention_dim": 4096}, "has joint_attention_dim = 4096, expected 24 as in the transformer"),
        ({"pooled_projection_dim": 768}, "has pooled_projection_dim = 768, expected 8 as in the transformer"),
        (
            {"num_attention_heads": 4},
            "has num_attention_heads * attention_head_dim = 64, expected 32 as in the transformer",
        ),
        ({"num_mode": 10}, "has num_mode = 10, expected null: it is a union ControlNet, which needs a mode for each"),
        (
            {"conditioning_embedding_channels": 16},
            "has conditioning_embedding_channels = 16, expected null: it is one ",
        ),
        ({"num_layers": 2}, "cannot be loaded: "),
    ],
)
def test_another_configuration_is_refused_by_its_key(controlnet, dev_teacher, tmp_path, config, message):
    folder = changed(controlnet, tmp_path / "net", **config)
    assert refused(folder, dev_teacher).startswith(f"--controlnet {folder} {message}")


def test_a_folder_that_is_no_controlnet_is_refused(controlnet, dev_teacher, tmp_path):
    assert refused(tmp_path / "none", dev_teacher) == (
        f"--controlnet {tmp_path / 'none'} has no config.json: expected the folder of a FluxControlNetModel, with "
        f"config.json and safetensors"
    )
    other = changed(controlnet, tmp_path / "other", _class_name="SD3ControlNetModel")
    assert refused(other, dev_teacher).startswith(
        f"--controlnet {other / 'config.json'} has _class_name = 'SD3ControlNetModel', expected 'FluxControlNetModel': "
    )
    damaged = changed(controlnet, tmp_path / "damaged", num_layers="two")
    assert f"{damaged / 'config.json'} is not the configuration of a FluxControlNetModel (" in refused(
        damaged, dev_teacher
    )
    (damaged / "config.json").write_text("[")
    assert "is not the configuration of a FluxControlNetModel (" in refused(damaged, dev_teacher)
    bare = changed(controlnet, tmp_path / "bare")
    (bare / "diffusion_pytorch_model.safetensors").unlink()
    assert "cannot be loaded: it has no diffusion_pytorch_model.safetensors" in refused(bare, dev_teacher)


def test_a_family_without_controlnets_refuses_one(controlnet, tmp_path):
    teacher = make_pixart(tmp_path / "pixart")
    assert refused(controlnet, teacher).startswith("--controlnet is given, but PixArt-Sigma takes none here: omit it, ")
