"""GPUs by name: memory, dense bf16 rate and bandwidth, what a transformer reaches of both, and an assumed price."""

import re
from dataclasses import dataclass

from secondcast.storage_schemas.errors import SettingsError

# Fraction of the dense bf16 rate that matrix products reach. Hopper and B200: what FLUX.1-dev's published time on an
# H100 SXM leaves (28 steps at 1024 px and 512 tokens in 6.71 s, eager: 310 of 989 TFLOP/s in all). The others: assumed;
# the rate of consumer GPUs, which is halved for fp32 accumulation, is reached more easily.
_HOPPER, _AMPERE_SERVER, _OTHER = 0.40, 0.70, 0.88
# Fraction of the bandwidth that elementwise kernels reach: assumed.
BANDWIDTH_FRACTION = 0.85

# From pinned host memory over PCIe 4.0 x16: assumed (31.5 GB/s by the standard). GPUs with 8 lanes reach half of it.
COPY_BYTES_PER_SECOND = 25e9

PRICES_ASSUMED = "May 2026"
"""When the prices of the cards were assumed: rounded from offers for rent, which differ by a factor of two and more."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU.

    memory_gib: as drivers report it, for a few cards as programs find it free.
    bf16_tflops: dense, with fp32 accumulation; None without bf16 tensor cores.
    checked: whether the rate is confirmed by a second source; otherwise it is quoted from memory of `source`.
    matrix_fraction: part of bf16_tflops that matrix products reach.
    usd_per_hour: what renting one costs, assumed (PRICES_ASSUMED).
    """

    name: str
    memory_gib: float
    bf16_tflops: float | None
    bandwidth_gb_per_s: float
    source: str
    checked: bool
    matrix_fraction: float
    usd_per_hour: float

    def flops_per_s(self, bytes_per_flop: float) -> float | None:
        """The expected rate in eager mode of a network that moves bytes_per_flop outside of matrix products.

        Kernels run one after another: the times of matrix products and of the others add up.
        """
        if self.bf16_tflops is None:
            return None
        matrix = 1 / (self.matrix_fraction * self.bf16_tflops * 1e12)
        return 1 / (matrix + bytes_per_flop / (BANDWIDTH_FRACTION * self.bandwidth_gb_per_s * 1e9))


def _card(
    name: str,
    gib: float,
    tflops: float | None,
    bandwidth: float,
    usd_per_hour: float,
    source: str,
    checked: bool,
    fraction: float = _OTHER,
) -> Card:
    return Card(
        name=name,
        memory_gib=gib,
        bf16_tflops=tflops,
        bandwidth_gb_per_s=bandwidth,
        source=source,
        checked=checked,
        matrix_fraction=fraction,
        usd_per_hour=usd_per_hour,
    )


_ADA = "tensor cores x boost clock, by NVIDIA's Ada whitepaper (2022)"
_AMPERE = "tensor cores x boost clock, by NVIDIA's GA102 whitepaper (2021)"
_BLACKWELL = "tensor cores x boost clock, by NVIDIA's RTX Blackwell whitepaper (2025)"
CARDS = (
    _card("RTX 3060 12GB", 12.0, 25.5, 360, 0.10, _AMPERE, False),
    _card("RTX 3080 10GB", 10.0, 59.5, 760, 0.12, _AMPERE, False),
    _card("RTX 3090", 24.0, 71.2, 936, 0.25, "NVIDIA Ampere GA102 whitepaper (2021)", True),
    _card("RTX 4060", 7.75, 30.2, 272, 0.10, _ADA, False),
    _card("RTX 4060 Ti 16GB", 16.0, 44.1, 288, 0.12, _ADA, False),
    _card("RTX 4070", 12.0, 58.3, 504, 0.15, _ADA, False),
    _card("RTX 4070 Super", 12.0, 71.0, 504, 0.16, _ADA, False),
    _card("RTX 4070 Ti", 12.0, 80.2, 504, 0.18, _ADA, False),
    _card("RTX 4070 Ti Super", 16.0, 88.2, 672, 0.20, _ADA, False),
    _card("RTX 4080", 16.0, 97.5, 717, 0.25, "NVIDIA Ada whitepaper (2022)", False),
    _card("RTX 4090", 23.64, 165.2, 1008, 0.40, "NVIDIA Ada whitepaper (2022)", True),
    _card("RTX 5060 Ti 16GB", 16.0, 47.4, 448, 0.12, _BLACKWELL, False),
    _card("RTX 5070", 12.0, 61.7, 672, 0.15, _BLACKWELL, False),
    _card("RTX 5070 Ti", 16.0, 87.9, 896, 0.20, _BLACKWELL, False),
    _card("RTX 5080", 16.0, 112.6, 960, 0.25, _BLACKWELL, False),
    _card("RTX 5090", 31.8, 209.5, 1792, 0.70, "NVIDIA RTX Blackwell whitepaper (2025)", True),
    _card("A10G", 22.5, 70.0, 600, 0.80, "NVIDIA A10G datasheet (2021)", False),
    _card("L4", 22.5, 121.0, 300, 0.50, "NVIDIA L4 datasheet (2023)", True),
    _card("L40S", 45.0, 362.0, 864, 0.90, "NVIDIA L40S datasheet (2023)", True),
    _card("RTX A4000", 15.61, 76.7, 448, 0.15, _AMPERE, False),
    _card("RTX A5000", 24.0, 111.1, 768, 0.25, _AMPERE, False),
    _card("RTX A6000", 48.0, 154.8, 768, 0.45, "NVIDIA Ampere GA102 whitepaper (2021)", False),
    _card("RTX 6000 Ada", 48.0, 364.2, 960, 0.75, "NVIDIA RTX 6000 Ada datasheet (2022)", False),
    _card("V100 32GB", 32.0, None, 900, 0.30, "NVIDIA V100 datasheet (2020): fp16 only", True),
    _card("A100 40GB", 39.6, 312.0, 1555, 1.00, "NVIDIA A100 datasheet (2021)", True, _AMPERE_SERVER),
    _card("A100 80GB", 79.2, 312.0, 2039, 1.40, "NVIDIA A100 datasheet (2021), SXM", True, _AMPERE_SERVER),
    _card("H100 PCIe", 79.2, 756.0, 2000, 2.20, "NVIDIA H100 datasheet (2022)", True, _HOPPER),
    _card("H100 SXM", 79.2, 989.0, 3350, 2.50, "NVIDIA H100 datasheet (2022)", True, _HOPPER),
    _card("H200", 139.8, 989.0, 4800, 3.50, "NVIDIA H200 datasheet (2023)", True, _HOPPER),
    _card("B200", 178.0, 2250.0, 7700, 5.50, "NVIDIA HGX B200 datasheet (2024)", True, _HOPPER),
)
# Common names, and the GPU that they refer to.
_ALSO = {
    "h100": "H100 SXM",
    "h100sxm5": "H100 SXM",
    "h100sxm80gb": "H100 SXM",
    "h100pcie80gb": "H100 PCIe",
    "a100": "A100 80GB",
    "a100sxm80gb": "A100 80GB",
    "a100sxm40gb": "A100 40GB",
    "6000adageneration": "RTX 6000 Ada",
    "h10080gbhbm3": "H100 SXM",
    "a100sxm480gb": "A100 80GB",
    "a100sxm440gb": "A100 40GB",
    "a10080gbpcie": "A100 80GB",
    "a100pcie40gb": "A100 40GB",
    "v100sxm232gb": "V100 32GB",
    "3060": "RTX 3060 12GB",
    "3080": "RTX 3080 10GB",
    "5060ti": "RTX 5060 Ti 16GB",
    "4060ti": "RTX 4060 Ti 16GB",
    "v100": "V100 32GB",
    "h200sxm": "H200",
}


def find_card(name: str, *, gpu_flag: str = "--gpu", tflops_flag: str = "--tflops") -> Card:
    """A GPU by a name such as 4090, rtx4090, "NVIDIA GeForce RTX 4090" or h100; SettingsError lists the known ones.

    gpu_flag, tflops_flag: the options that its error names.
    """
    wanted = _key(name)
    by_key = {_key(card.name): card for card in CARDS} | {
        key: card for key, known in _ALSO.items() for card in CARDS if card.name == known
    }
    if wanted in by_key:
        return by_key[wanted]
    raise SettingsError(
        f"{gpu_flag} {name!r} is unknown, expected one of {', '.join(card.name for card in CARDS)}; or give its "
        f"achieved rate with {tflops_flag}, and for training its memory with --max-gpu-memory"
    )


def _key(name: str) -> str:
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia)?(geforce|tesla)?(rtx)?", "", letters)
