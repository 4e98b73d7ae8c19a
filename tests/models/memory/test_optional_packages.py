"""Quantizers and peft: a command imports none that it does not need; another program keeps them."""

import importlib.util
import logging
import subprocess
import sys

import pytest

from secondcast.models.memory.optional_packages import QUANTIZERS, hidden_packages, installed_version, show_quantizer

PACKAGES = ("bitsandbytes", "torchao", "peft")
PLAN = """
import sys
from secondcast import cli
sys.argv = ["secondcast", "plan", "build", "--teacher", "pocket", "--num-prompts", "9"]
try:
    cli.main()
except SystemExit as stop:
    assert stop.code == 0
assert "diffusers.models.transformers.transformer_flux" in sys.modules
for name in ("bitsandbytes", "torchao", "peft", "diffusers.pipelines.flux.pipeline_flux"):
    assert not [module for module in sys.modules if module.split(".")[0] == name or module == name], name
"""


@pytest.mark.slow
def test_a_plan_imports_no_quantizer_and_no_pipeline():
    done = subprocess.run([sys.executable, "-c", PLAN], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_was_hidden_can_be_imported_again(monkeypatch):
    for package in PACKAGES:
        monkeypatch.delitem(sys.modules, package, raising=False)
    there = {package: importlib.util.find_spec(package) is not None for package in PACKAGES}
    with hidden_packages():
        assert [importlib.util.find_spec(package) for package in PACKAGES] == [None] * 3
        for kind, package in QUANTIZERS.items():
            show_quantizer(kind)
            assert (importlib.util.find_spec(package) is not None) == there[package]
            assert (installed_version(kind) is not None) == there[package]
    assert {package: importlib.util.find_spec(package) is not None for package in PACKAGES} == there


def test_bitsandbytes_and_torchao_print_no_warnings_of_their_own_parts():
    # On processors with AVX512-BF16 bitsandbytes warns, when it is imported, that a kernel was not downloaded.
    for name in ("bitsandbytes.backends.cpu.ops", "torchao"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING), name
        assert logging.getLogger(name).isEnabledFor(logging.ERROR), name
