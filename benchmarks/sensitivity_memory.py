"""Memory of training with the sensitivity loss at FLUX's sizes: T5-base, 77 x 4096, batch 32. On a CPU, minutes.

python -m benchmarks.sensitivity_memory [--batch-size 32] [--steps 3]

Random weights and embeddings, a random metric: memory does not depend on values. Peak of the process, less what it has
with the libraries imported.
"""

import argparse
import resource
import time

import numpy as np
import torch
from transformers import T5Config, T5EncoderModel

from trainer.surrogate import Surrogate, sensitivity_loss

TEXT, WIDTH = 77, 4096


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    asked = parser.parse_args()
    device = torch.device("cpu")
    before = peak_gib()
    generator = np.random.default_rng(0)
    factor = generator.standard_normal((WIDTH, 64), dtype=np.float32)
    began = time.monotonic()
    root_DD = Surrogate(metric_DD=factor @ factor.T / WIDTH, weights={}, digests={}).root_DD(0.01, device)
    print(f"the root of the metric: {time.monotonic() - began:.0f} s, peak {peak_gib() - before:.2f} GiB", flush=True)
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    encoder = T5EncoderModel(config)
    projection = torch.nn.Sequential(torch.nn.Linear(768, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH))
    parameters = [*encoder.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    print(f"{sum(parameter.numel() for parameter in parameters) / 1e6:.0f} M parameters in float32", flush=True)
    for step in range(asked.steps):
        began = time.monotonic()
        ids_BT = torch.randint(0, 32128, (asked.batch_size, TEXT))
        teacher_BTD = torch.randn(asked.batch_size, TEXT, WIDTH).bfloat16()
        student_BTD = projection(encoder(ids_BT)[0])
        weights_BT = torch.rand(asked.batch_size, TEXT)
        loss = sensitivity_loss(student_BTD, teacher_BTD, root_DD, weights_BT, floor=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seconds = time.monotonic() - began
        print(f"step {step}: {seconds:.0f} s, peak {peak_gib() - before:.2f} GiB beside the libraries", flush=True)


if __name__ == "__main__":
    main()
