"""How long does a host take for the modulation vectors of a batch? `python -m benchmarks.host_modulation --rows 1 4`.

Linears of FLUX.1-dev's sizes with random weights, of a few blocks; the time of all of them is calculated from it, by
parameters.
"""

import argparse
import time

import torch
from diffusers import FluxTransformer2DModel

from secondcast.models.families.flux import FLUX
from secondcast.models.memory.host_modulation import HostModulation, take_to_host
from secondcast.models.memory.modulation_table import modulated_norms
from secondcast.models.teacher.planned import planned_teacher

FLUX_DEV_PARAMETERS = 3_247_448_064


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--blocks", type=int, default=1, help="double blocks, and twice as many single ones")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--calls", type=int, default=5, help="the median of so many counts")
    flags = parser.parse_args()
    dtype = getattr(torch, flags.dtype)
    host, parameters = some_of_flux_dev(flags.blocks, dtype)
    whole = FLUX_DEV_PARAMETERS / parameters
    print(f"{parameters:,} of {FLUX_DEV_PARAMETERS:,} parameters, {flags.dtype}, one process\n")
    print("| threads | rows | seconds of all, calculated | weights read, GB/s |")
    print("|---|---|---|---|")
    for threads in flags.threads:
        torch.set_num_threads(threads)
        for rows in flags.rows:
            seconds = median_seconds(host, rows, flags.calls)
            rate = host.weights_bytes / seconds / 1e9
            print(f"| {threads} | {rows} | {whole * seconds:.2f} | {rate:.1f} |", flush=True)


def some_of_flux_dev(blocks: int, dtype: torch.dtype) -> tuple[HostModulation, int]:
    config = planned_teacher("FLUX.1-dev")[0].config("transformer")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(
            {**config, "num_layers": blocks, "num_single_layers": 2 * blocks}
        ).to(dtype)
    linears = [norm.linear for norm in modulated_norms(transformer, FLUX.anatomy)]
    for module in (transformer.time_text_embed, *linears):
        # Pages that nothing was written to would not be read from memory.
        for weight in module.to_empty(device="cpu").requires_grad_(False).parameters():
            weight.uniform_(-0.02, 0.02)
    parameters = sum(weight.numel() for linear in linears for weight in linear.parameters())
    return take_to_host(transformer), parameters


def median_seconds(host: HostModulation, rows: int, calls: int) -> float:
    pooled_BP, timestep_B, guidance_B = torch.randn(rows, 768), torch.rand(rows), torch.full((rows,), 3.5)
    seconds = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        host.rows(timestep_B, guidance_B, pooled_BP)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[calls // 2]


if __name__ == "__main__":
    main()
