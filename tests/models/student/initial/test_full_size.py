"""An initial student of T5-XXL's real shape, with random weights, is made within the memory of a usual host."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secondcast.models.memory.host_memory import free_host_bytes
from secondcast.models.student.student import load_student
from tests.models.families.random_teacher import WORDS, make_teacher

ROOT = Path(__file__).resolve().parents[4]
CONFIG = ROOT / "models/configs/FLUX.1-dev/text_encoder_2/config.json"
HOST_BYTES, WEIGHT_BYTES = 24e9, 9.6e9


def write_random_encoder(folder: Path) -> None:
    """T5-XXL's tensors in bf16 at the scales of T5's own initialization, a file per layer."""
    config = json.loads(CONFIG.read_text())
    width, inner, units = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    generator, files = torch.Generator().manual_seed(0), {}

    def tensor(*shape: int, scale: float) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=scale, generator=generator)

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}-of-00025.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    for layer in range(config["num_layers"]):
        prefix = f"encoder.block.{layer}.layer"
        attention = {
            "q": tensor(inner, width, scale=(width * config["d_kv"]) ** -0.5),
            "k": tensor(inner, width, scale=width**-0.5),
            "v": tensor(inner, width, scale=width**-0.5),
            "o": tensor(width, inner, scale=inner**-0.5),
        }
        if layer == 0:
            attention["relative_attention_bias"] = tensor(32, config["num_heads"], scale=1.0)
        feed_forward = {
            "wi_0": tensor(units, width, scale=width**-0.5),
            "wi_1": tensor(units, width, scale=width**-0.5),
            "wo": tensor(width, units, scale=units**-0.5),
        }
        tensors = {f"{prefix}.0.SelfAttention.{name}.weight": found for name, found in attention.items()}
        tensors |= {f"{prefix}.1.DenseReluDense.{name}.weight": found for name, found in feed_forward.items()}
        norms = {f"{prefix}.{part}.layer_norm.weight": torch.ones(width, dtype=torch.bfloat16) for part in (0, 1)}
        write(layer + 1, tensors | norms)
    last = {"shared.weight": tensor(config["vocab_size"], width, scale=1.0)}
    write(25, last | {"encoder.final_layer_norm.weight": torch.ones(width, dtype=torch.bfloat16)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_bytes(CONFIG.read_bytes())


@pytest.mark.slow
def test_t5_xxl_goes_through_a_host_of_24_gb(tmp_path):
    if (free_host_bytes() or 0) < 0.75 * HOST_BYTES or shutil.disk_usage(tmp_path).free < 2 * WEIGHT_BYTES:
        pytest.skip("needs 18 GB of free memory and 20 GB of free disk")
    teacher = make_teacher(
        tmp_path / "t", text_length=77, joint_attention_dim=4096, d_model=4096, d_ff=16, num_layers=1, num_heads=1
    )
    encoder = teacher / "text_encoder_2"
    shutil.rmtree(encoder)
    encoder.mkdir()
    write_random_encoder(encoder)
    draws = random.Random(0)
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(" ".join(draws.choices(WORDS, k=70)) + "\n" for _ in range(16)))
    code = "from secondcast import cli; cli.main()"
    words = ["init-student", tmp_path / "out", "--teacher", teacher, "--prompts", prompts, "--size", "small"]
    flags = ["--kind", "cut", "--device", "cpu", "--text-length", "40"]
    process = subprocess.Popen([sys.executable, "-c", code, *words, *flags], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    # Linux counts in KiB, pages of mapped weight files included.
    print(f"peak {usage.ru_maxrss * 1024 / 1e9:.1f} GB, {usage.ru_utime + usage.ru_stime:.0f} s of CPU time")
    assert usage.ru_maxrss * 1024 < HOST_BYTES
    config = load_student(tmp_path / "out").config
    assert (config.d_model, config.num_layers, config.num_heads, config.d_ff) == (512, 8, 6, 1024)
    shutil.rmtree(teacher)
