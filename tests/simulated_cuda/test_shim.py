import shutil

import pytest

from tests.simulated_cuda.device import shim


@pytest.fixture
def complete(monkeypatch, tmp_path):
    """A folder of torch in which nothing is missing."""
    monkeypatch.setattr(shim, "version", lambda package: f"{shim.PINNED}+cpu")
    monkeypatch.setattr(shim, "torch_folder", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    for file in ("lib/libtorch_cpu.so", "include/ATen/detail/CUDAHooksInterface.h"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert shim.missing() is None
    return tmp_path


def test_another_version_of_torch_is_named(complete, monkeypatch):
    monkeypatch.setattr(shim, "version", lambda package: "2.6.0")
    assert shim.missing() == f"torch is 2.6.0, the simulation of CUDA is made for {shim.PINNED} (constraints.txt)"


def test_a_cuda_build_of_torch_is_named(complete):
    (complete / "lib/libtorch_cuda.so").touch()
    assert shim.missing() == "torch is a CUDA build, the simulation of CUDA needs a CPU build"


def test_missing_headers_are_named(complete):
    (complete / "include/ATen/detail/CUDAHooksInterface.h").unlink()
    assert shim.missing() == f"the C++ headers of torch are missing in {complete}"


def test_a_missing_compiler_is_named(complete, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert shim.missing() == "g++ is not installed: it compiles the simulated CUDA device"
