"""Masks of dropout belong to the rows of a batch, whoever computes them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from secondcast.trainer.dropout import BatchInvariantDropout

SIZES = {"dropout_rate": 0.3, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
BERT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3,
}  # fmt: skip


def encoder(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "t5":
        return T5EncoderModel(T5Config(**SIZES, attn_implementation="eager")).train()
    return BertModel(BertConfig(**BERT, attn_implementation="eager"), add_pooling_layer=False).train()


def embedded(model: torch.nn.Module, ids_BT: torch.Tensor, *, first: int, rows: int) -> torch.Tensor:
    torch.manual_seed(7)
    with BatchInvariantDropout(first=first, rows=rows), torch.no_grad():
        return model(input_ids=ids_BT).last_hidden_state


@given(rows=st.integers(1, 9), p=st.floats(0, 0.9), data=st.data())
def test_a_part_gets_the_masks_of_its_rows_and_the_whole_gets_torchs_own(rows, p, data):
    first = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(first + 1, rows))
    batch = torch.arange(1.0, rows * 6 + 1).reshape(rows, 2, 3)
    torch.manual_seed(1)
    wanted = torch.nn.functional.dropout(batch, p)
    torch.manual_seed(1)
    with BatchInvariantDropout(first=first, rows=rows):
        found = torch.nn.functional.dropout(batch[first:end], p)
    assert torch.equal(found, wanted[first:end])


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_the_masks_inside_an_encoder_are_those_of_the_rows_attention_included(kind):
    model, ids_BT = encoder(kind), torch.randint(1, 40, (6, 5))
    whole = embedded(model, ids_BT, first=0, rows=6)
    parts = [embedded(model, ids_BT[first : first + 2], first=first, rows=6) for first in (0, 2, 4)]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(embedded(model, ids_BT[2:4], first=0, rows=6), whole[2:4], rtol=1e-2, atol=1e-2)


def test_whole_batches_in_it_are_what_they_are_outside_bit_for_bit():
    model, ids_BT = encoder("t5"), torch.randint(1, 40, (4, 5))
    torch.manual_seed(7)
    with torch.no_grad():
        outside = model(input_ids=ids_BT).last_hidden_state
    assert torch.equal(embedded(model, ids_BT, first=0, rows=4), outside)


def test_nothing_is_drawn_in_eval_mode():
    model, ids_BT = encoder("t5").eval(), torch.randint(1, 40, (4, 5))
    with torch.no_grad():
        assert torch.equal(embedded(model, ids_BT, first=0, rows=4), model(input_ids=ids_BT).last_hidden_state)
