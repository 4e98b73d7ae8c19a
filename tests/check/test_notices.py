"""A check notices what is wrong: each test breaks the product, and one row reports it."""

import sys

import pytest
import torch

from secondcast.check.resume import resume_row
from secondcast.check.training import modes
from secondcast.models import backbone
from secondcast.models.families.flux import Flux
from tests.check.conftest import recorded, training_rows

# Masks that count from the start of the process, in place of the step of the run.
REDRAWN = """
from itertools import count
from secondcast.models.memory.optional_packages import hidden_packages
with hidden_packages():
    from secondcast.cli import main
    from secondcast.trainer import loop
    number = count()
    loop.mix = lambda seed, step: next(number)
    main()
"""
ALL = ("embedding", "weights", "pipeline", "latents", "replay")


def broken(rows) -> list[str]:
    return [name for name in ALL if rows[name].result == "broken"]


def test_an_intact_product_has_no_broken_row(tmp_path):
    rows = recorded(tmp_path / "cache")
    assert {rows[name].result for name in ALL} == {"holds"}


def test_a_changed_sigma_is_another_sampling_than_the_pipelines(tmp_path, monkeypatch):
    real = Flux.schedule

    def changed(*arguments, **named):
        schedule = real(*arguments, **named)
        sigmas = (schedule.sigmas[0], schedule.sigmas[1] * 0.999, *schedule.sigmas[2:])
        return type(schedule)(sigmas=sigmas, timesteps=schedule.timesteps, timestep_dtype=schedule.timestep_dtype)

    monkeypatch.setattr(Flux, "schedule", changed)
    rows = recorded(tmp_path / "cache")
    assert broken(rows) == ["pipeline"]
    assert "violated: final latents are FluxPipeline's" in rows["pipeline"].detail


def test_a_wrong_dtype_is_another_sampling_than_the_pipelines(tmp_path, monkeypatch):
    monkeypatch.setattr(Flux, "timestep_dtype", lambda self, dtype: torch.bfloat16)
    assert broken(recorded(tmp_path / "cache")) == ["pipeline"]


def test_a_transposed_weight_is_named(tmp_path, monkeypatch):
    real, name = backbone.load_checked, "transformer_blocks.0.attn.to_q.weight"

    def transposed(*arguments, **named):
        model = real(*arguments, **named)
        weight = model.get_parameter(name)
        weight.data = weight.data.T.contiguous()
        return model

    monkeypatch.setattr(backbone, "load_checked", transposed)
    rows = recorded(tmp_path / "cache")
    assert broken(rows) == ["weights"]
    assert rows["weights"].detail == f"1 of 151 tensors differ, the first is {name}"


def test_a_memory_mode_that_drops_a_gradient_is_not_the_plain_one(check_cache, monkeypatch):
    real = backbone.activation_checkpointing

    def dropping(transformer, every):
        real(transformer, every)
        if every:
            block = transformer.transformer_blocks[0]
            # The gradient through the image tokens is lost, that through the text tokens is not.
            block.register_forward_hook(lambda module, given, outputs: (outputs[0], outputs[1].detach()))

    rows = training_rows(check_cache)
    held = {mode.name: mode for mode in modes(rows.costs.blocks, table=True)}
    *_, plain = rows.mode(held["plain"])
    monkeypatch.setattr(backbone, "activation_checkpointing", dropping)
    *_, row = rows.mode(held["blocks recomputed"])
    assert plain.result == "measured"
    assert row.result == "broken" and row.detail.startswith("losses differ by ")


@pytest.mark.slow
def test_a_resume_that_redraws_dropout_is_not_the_unbroken_run(tmp_path):
    row = resume_row(tmp_path, device="cpu", program=(sys.executable, "-P", "-c", REDRAWN))
    assert row.result == "broken" and row.detail.endswith(" and 1 more differ")
