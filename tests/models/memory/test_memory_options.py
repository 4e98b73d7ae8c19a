"""What of the memory options does not go together is refused in one line."""

import re

import pytest

from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.errors import SettingsError


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_quantized_blocks_are_not_streamed(kind):
    message = (
        f"quantize is {kind} with gpu-blocks 4, expected one of the two: streaming is only for exact weights; remove "
        "one of them"
    )
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        MemoryOptions.from_flags(quantize=kind, gpu_blocks=4, activation_checkpointing=1)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("every", [0, 2])
def test_eight_bits_want_every_block_checkpointed(kind, every):
    message = (
        f"quantize is {kind} with activation-checkpointing {every}, expected 1: each linear keeps an unquantized copy "
        "of its weight until its backward pass, more than quantization saves; give "
        f"--activation-checkpointing 1, or --quantize nf4"
    )
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        MemoryOptions.from_flags(quantize=kind, activation_checkpointing=every)


@pytest.mark.parametrize("every", [0, 1, 3])
def test_four_bits_go_with_any_checkpointing(every):
    assert MemoryOptions.from_flags(quantize="nf4", activation_checkpointing=every).quantize == "nf4"


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(SettingsError, match=r"^--quantize is 'q4', expected 'none', 'int8', 'fp8' or 'nf4'$"):
        MemoryOptions.from_flags(quantize="q4")
