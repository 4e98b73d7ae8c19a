"""Weights of the networks that score: whatever is wrong with them is one line that names it, and nothing is scored."""

import shutil

import pytest
import torch
from transformers import BlipForQuestionAnswering, CLIPModel, VisionEncoderDecoderModel

from secondcast.evaluation.image_metrics.weights import Weights
from secondcast.storage_schemas.errors import MissingWeightsError
from tests.models.weights.damaged_weights import DAMAGES, rewrite

CPU = torch.device("cpu")
# Class, model_type, and the key of config.json that counts layers.
NETWORKS = {
    "clip": (CLIPModel, "clip", "text_config.num_hidden_layers"),
    "blip": (BlipForQuestionAnswering, "blip", "vision_config.num_hidden_layers"),
    "trocr": (VisionEncoderDecoderModel, "vision-encoder-decoder", "decoder.decoder_layers"),
}
CHOSEN = (
    *("dropped", "renamed", "prefixed", "flattened", "one stored as integers", "all stored as fp8"),
    *("one layer more in the config", "one layer fewer in the config", "cut by a byte", "a shard missing"),
)


@pytest.mark.parametrize("damage", CHOSEN)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_damaged_network_is_refused_in_one_line_that_names_what_is_wrong(name, damage, request, tmp_path):
    kind, model_type, layers = NETWORKS[name]
    folder = shutil.copytree(request.getfixturevalue(name), tmp_path / name)
    wrong = DAMAGES[damage](folder, layers)
    with pytest.raises(MissingWeightsError) as caught:
        Weights.find(str(folder), flag="--model", model_type=model_type).network(kind, device=CPU)
    said = str(caught.value)
    assert said.startswith(f"{folder} cannot be loaded: ") and "\n" not in said
    for part in wrong:
        assert part in said, (part, said)


def test_saved_buffers_and_an_unread_pooler_of_published_networks_are_known(clip, trocr, tmp_path):
    old = shutil.copytree(clip, tmp_path / "clip")
    rewrite(old, lambda tensors: {**tensors, "text_model.embeddings.position_ids": torch.arange(20)[None]})
    found = Weights.find(str(old), flag="--model", model_type="clip").network(CLIPModel, device=CPU)
    expected = CLIPModel.from_pretrained(clip).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    without = shutil.copytree(trocr, tmp_path / "trocr")
    rewrite(without, lambda tensors: {name: tensor for name, tensor in tensors.items() if "encoder.pooler" not in name})
    Weights.find(str(without), flag="--model", model_type="vision-encoder-decoder").network(
        VisionEncoderDecoderModel, device=CPU
    )
