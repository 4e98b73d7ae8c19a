"""Weights in .pth are read without running what a pickle may hold."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.hub import load_state_dict_from_url

from secondcast.evaluation.pictures.restricted_pickles import restricted_pickles


class Harmful:
    def __reduce__(self):
        return os.getcwd, ()


def test_what_a_library_would_unpickle_is_refused_and_tensors_are_read(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.save({"weight": Harmful()}, tmp_path / "harmful.pth")
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pth")

    def fetched(name):
        return load_state_dict_from_url(f"file://{tmp_path / name}", model_dir=str(tmp_path / "hub"), progress=False)

    # As torch-fidelity and torchvision load: it runs.
    assert fetched("harmful.pth") == {"weight": str(Path.cwd())}
    with restricted_pickles():
        with pytest.raises(pickle.UnpicklingError):
            fetched("harmful.pth")
        assert fetched("weights.pth")["weight"].tolist() == [1, 1]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
