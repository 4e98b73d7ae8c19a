"""What a simulated run needed, and what the product plans for it."""

from dataclasses import dataclass
from typing import Self

from secondcast.models.cost.cards import CARDS
from secondcast.models.cost.gpu_memory import GpuMemory

GIB = 2**30
# Of a GPU's memory, for CUDA itself: assumed.
CONTEXT_GIB = 0.5


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Calculated memory without that of CUDA itself, and the smallest GPU that the plan fits into."""

    gib: float
    activations_gib: float
    card: str
    card_gib: float

    @classmethod
    def of(cls, memory: GpuMemory) -> Self:
        """Of a plan."""
        cards = [card for card in CARDS if memory.needed_bytes <= card.memory_gib * GIB]
        card = min(cards, key=lambda card: card.memory_gib)
        return cls(
            gib=(memory.total_bytes - memory.cuda_bytes) / GIB,
            activations_gib=memory.activations_bytes / GIB,
            card=card.name,
            card_gib=card.memory_gib,
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Peaks of a run.

    emptied: how often torch gave cached memory back to the device because there was too little left.
    waits: the places where the host waited for the device, with their counts.
    """

    allocated_gib: float
    reserved_gib: float
    emptied: int
    waits: dict[str, int]
