"""A LoRA is merged as the pipeline fuses it; a file of another model is refused in one line."""

import re

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from secondcast.models.families.registry import family_named
from secondcast.models.teacher.lora import Lora
from secondcast.storage_schemas.errors import SettingsError


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory, dev_teacher):
    folder = tmp_path_factory.mktemp("lora")
    trained = FluxTransformer2DModel.from_pretrained(dev_teacher, subfolder="transformer")
    torch.manual_seed(0)
    trained.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(trained))
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def with_metadata(tmp_path_factory, dev_teacher):
    """A LoRA of alpha 8 and rank 2, as training scripts save it: the alpha is in the file's metadata alone."""
    folder = tmp_path_factory.mktemp("lora")
    trained = FluxTransformer2DModel.from_pretrained(dev_teacher, subfolder="transformer")
    torch.manual_seed(0)
    trained.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False))
    metadata = _collate_lora_metadata({"transformer": trained})
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(trained), **metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("fixture", ["lora_file", "with_metadata"])
def test_merged_weights_are_those_that_the_pipeline_fuses(fixture, dev_teacher, request):
    lora_file = request.getfixturevalue(fixture)
    pipeline = FluxPipeline.from_pretrained(
        dev_teacher, text_encoder_2=None, text_encoder=None, tokenizer=None, tokenizer_2=None, vae=None
    )
    merged = FluxTransformer2DModel.from_pretrained(dev_teacher, subfolder="transformer")
    before = merged.transformer_blocks[0].attn.to_q.weight.clone()
    pipeline.load_lora_weights(lora_file)
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()

    Lora.read(lora_file, family_named("flux"), 0.5).merge_into(merged)

    assert not torch.equal(merged.transformer_blocks[0].attn.to_q.weight, before)
    expected = pipeline.transformer.state_dict()
    assert merged.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


def refused(file, family="flux", *, into=None):
    with pytest.raises(SettingsError) as caught:
        lora = Lora.read(file, family_named(family), 1.0)
        lora.merge_into(FluxTransformer2DModel.from_pretrained(into, subfolder="transformer"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_lora_of_the_transformer_are_refused(tmp_path, dev_teacher, lora_file):
    other, broken, text, deep, kohya = (
        tmp_path / f"{name}.safetensors" for name in ("other", "broken", "text", "deep", "kohya")
    )
    names = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({names.format("A"): torch.ones(2, 7), names.format("B"): torch.ones(7, 2)}, other)
    save_file({"text_encoder.layer.lora_A.weight": torch.ones(2, 7)}, text)
    deeper = names.replace("blocks.0", "blocks.7")
    save_file({deeper.format("A"): torch.ones(2, 7), deeper.format("B"): torch.ones(7, 2)}, deep)
    save_file({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(2, 7)}, kohya)
    broken.write_bytes(b"no tensors")
    assert refused(tmp_path / "missing", into=dev_teacher).startswith(f"--lora {tmp_path / 'missing'} cannot be read")
    assert "cannot be read (it is a folder): expected a safetensors file" in refused(tmp_path, into=dev_teacher)
    assert re.match(rf"--lora {broken} cannot be read \(.+\): expected a safetensors", refused(broken))
    assert refused(text) == (
        f"--lora {text} has no weights of the transformer of FluxPipeline, but text_encoder.layer.lora_A.weight: "
        f"expected a LoRA of this model"
    )
    assert f"--lora {other} does not fit the transformer (" in refused(other, into=dev_teacher)
    assert refused(deep, into=dev_teacher) == (
        f"--lora {deep} changes transformer_blocks.7.attn.to_q, which this transformer does not have (1 of 1 modules): "
        f"expected a LoRA of this model"
    )
    assert f"--lora {kohya} cannot be read (" in refused(kohya)
    assert "PixArtSigmaPipeline does not load LoRAs" in refused(lora_file, "pixart-sigma")
