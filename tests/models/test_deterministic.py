"""Deterministic kernels are chosen within the context and nowhere else."""

import os

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from secondcast.models.attention import attention_kernel
from secondcast.models.device import deterministic_algorithms

CPU = torch.device("cpu")


def test_the_context_chooses_deterministic_kernels_and_restores_the_others(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = _cur_sdpa_kernel_backends()
    assert SDPBackend.EFFICIENT_ATTENTION in before
    with deterministic_algorithms():
        assert torch.are_deterministic_algorithms_enabled()
        # Memory-efficient attention adds up gradients with atomics, and cuDNN's promises nothing.
        assert set(_cur_sdpa_kernel_backends()) == {SDPBackend.FLASH_ATTENTION, SDPBackend.MATH}
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert set(_cur_sdpa_kernel_backends()) == set(before)


def test_the_context_is_left_after_an_error():
    with pytest.raises(KeyError), deterministic_algorithms():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_context_that_is_not_enabled_changes_nothing():
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_the_kernel_of_attention_is_named():
    with deterministic_algorithms():
        assert attention_kernel(CPU, torch.float32, heads=2, tokens=4, head_width=8) in ("flash_attention", "math")
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        assert attention_kernel(CPU, torch.float32, heads=2, tokens=4, head_width=8) == "math"
