"""What a simulated run needed, and what the product plans for it."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from secondcast.models.cost.cards import CARDS
from secondcast.models.cost.gpu_memory import GpuMemory

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Calculated memory without that of CUDA itself, and the smallest GPU that the plan fits into."""

    gib: float
    card: str
    card_gib: float

    @classmethod
    def of(cls, memory: GpuMemory) -> Self:
        """Of a plan."""
        cards = [card for card in CARDS if memory.needed_bytes <= card.memory_gib * GIB]
        card = min(cards, key=lambda card: card.memory_gib)
        return cls(gib=(memory.total_bytes - memory.cuda_bytes) / GIB, card=card.name, card_gib=card.memory_gib)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Peaks of a run; waits: the places where the host waited for the device, with their counts."""

    allocated_gib: float
    reserved_gib: float
    waits: dict[str, int]


def as_json(value: Any) -> Any:
    """Dataclasses as JSON objects."""
    return asdict(value)
