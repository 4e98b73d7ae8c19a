"""Classifier-free guidance is rounded as a pipeline's with a number, whatever the scale of each row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secondcast.models.families.text import Text
from secondcast.models.sampler import guided


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(scales=st.lists(st.floats(1, 20, width=32), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_each_row_is_what_the_pipelines_expression_gives_for_its_number(dtype, scales, seed):
    torch.manual_seed(seed)
    negative_BSC, conditional_BSC = (torch.randn(len(scales), 6, 4).to(dtype) for _ in range(2))
    found_BSC = guided(negative_BSC, conditional_BSC, torch.tensor(scales))
    assert found_BSC.dtype == dtype
    for row, scale in enumerate(scales):
        # As StableDiffusion3Pipeline writes it.
        expected = negative_BSC[row] + scale * (conditional_BSC[row] - negative_BSC[row])
        assert torch.equal(found_BSC[row], expected)


def test_one_negative_row_is_in_front_of_every_text():
    negative = Text(embedding_BTD=torch.zeros(1, 2, 3), conditioning={"pooled_projections": torch.zeros(1, 4)})
    text = Text(embedding_BTD=torch.ones(3, 2, 3), conditioning={"pooled_projections": torch.ones(3, 4)})
    both = text.after(negative)
    assert both.embedding_BTD.sum((1, 2)).tolist() == [0, 0, 0, 6, 6, 6]
    assert both.conditioning["pooled_projections"].sum(1).tolist() == [0, 0, 0, 4, 4, 4]
