"""Shared parts of the plans: the GPU and its rate, the teacher's configuration files, tables of figures."""

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD

from secondcast.cache_builder.settings import PlannedBuild
from secondcast.commands.shell.console import TEXT_COLUMNS, PlainTable, print_table, print_wrapped
from secondcast.commands.shell.resolve import POCKET, quiet_imports, resolve_teacher
from secondcast.models.memory.limit import named_bytes
from secondcast.storage_schemas.errors import SettingsError

_GIB = 2**30

if TYPE_CHECKING:
    from secondcast.models.cost.cards import Card
    from secondcast.models.teacher.folder import TeacherFolder
    from secondcast.storage_schemas.schema.manifest import Manifest


def card_names(incomplete: str) -> list[str]:
    """Completion of --gpu, with short names that find_card accepts."""
    from secondcast.models.cost.cards import CARDS

    names = ["-".join(card.name.lower().removeprefix("rtx ").split()) for card in CARDS]
    return [name for name in names if name.startswith(incomplete.lower())]


Gpu = Annotated[str | None, typer.Option(autocompletion=card_names, help="GPU by name, such as 4090 or h100.")]
Tflops = Annotated[float | None, typer.Option(help="Achieved TFLOP/s, instead of the estimate.")]


def outline(name: str, count: int | None, asked: PlannedBuild) -> tuple["Manifest", "TeacherFolder", str]:
    """The cache that the options of `plan build` describe, its teacher, and the source of the configuration files."""
    from secondcast.cache_builder.opening.new_manifest import outline_manifest

    if (count is None) == (not asked.prompts):
        raise SettingsError("plan build needs one of --prompts FILE and --num-prompts N")
    samples_per_prompt = None
    if count is None:
        from secondcast.cache_builder.prompts.files import read_prompts

        texts = read_prompts(asked.prompts, limit=asked.limit).texts
        count, samples_per_prompt = len(texts), [asked.samples_per_prompt * text.repeat for text in texts]
    quiet_imports()
    from secondcast.models.teacher.folder import BUILD_PARTS
    from secondcast.models.teacher.planned import planned_teacher

    if name == POCKET:
        folder, configs = (
            resolve_teacher(name, BUILD_PARTS, weights=False),
            "configuration files of the embedded pocket",
        )
    else:
        folder, configs = planned_teacher(name)
    count = min(count, asked.limit or count)
    return outline_manifest(asked, folder, prompt_count=count, samples_per_prompt=samples_per_prompt), folder, configs


@dataclass(frozen=True, kw_only=True)
class GpuChoice:
    """A GPU and its rate, as options give them.

    phase: the word that these options begin with, such as build for --build-gpu; None for --gpu and --tflops.
    """

    name: str | None = None
    tflops: float | None = None
    phase: str | None = None

    def flag(self, name: str) -> str:
        """The option of this GPU."""
        return f"--{name}" if self.phase is None else f"--{self.phase}-{name}"

    def card(self) -> "Card | None":
        """The named GPU; SettingsError for an unknown one, and for a rate that is none."""
        from secondcast.models.cost.cards import find_card

        rate_flag = self.flag("tflops")
        if self.tflops is not None and not 0 < self.tflops < inf:
            raise SettingsError(f"{rate_flag} is {self.tflops}, expected the achieved TFLOP/s, above 0")
        return None if self.name is None else find_card(self.name, gpu_flag=self.flag("gpu"), tflops_flag=rate_flag)

    def limit_bytes(self, max_gpu_memory: str | None) -> float | None:
        """--max-gpu-memory in bytes; SettingsError for more than the named GPU has."""
        limit, card = named_bytes(max_gpu_memory), self.card()
        # Plans name a GPU's memory with two decimals.
        if card is not None and limit is not None and round(limit / _GIB, 2) > card.memory_gib:
            raise SettingsError(
                f"--max-gpu-memory is {max_gpu_memory}, but {self.flag('gpu')} {card.name} has {card.memory_gib:g} "
                f"GiB: give no more than that, or remove the option"
            )
        return limit


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The expected rate of the transformer on a GPU.

    flops_per_s: None if unknown.
    bytes_per_flop: that its kernels without matrix products move; None if the rate is not calculated from it.
    """

    flops_per_s: float | None
    bytes_per_flop: float | None = None


def rate_of(gpu: GpuChoice, manifest: "Manifest", dtype: str | None = None) -> Rate:
    """The rate of a (planned) cache's transformer at its size; dtype: of its calls, None for the cache's."""
    if gpu.tflops is not None:
        return Rate(flops_per_s=gpu.tflops * 1e12)
    card = gpu.card()
    # The table is for bf16: float32 is slower by a factor that depends on the GPU.
    if card is None or (dtype or manifest.dtype) != "bfloat16":
        return Rate(flops_per_s=None)
    if manifest.is_text:
        # The text encoder's traffic between its matrix products is not counted.
        return Rate(flops_per_s=card.flops_per_s(0.0), bytes_per_flop=0.0)
    from secondcast.models.cost.counted import backbone_cost
    from secondcast.models.cost.shapes import CallShapes

    backbone = backbone_cost(CallShapes.of(manifest))
    bytes_per_flop = backbone.moved_bytes / backbone.forward_flops
    return Rate(flops_per_s=card.flops_per_s(bytes_per_flop), bytes_per_flop=bytes_per_flop)


def gpu_facts(gpu: GpuChoice, rate: Rate, gpus: int) -> dict[str, Any]:
    """The GPU as JSON types. rate_basis: what the rate is calculated from, or why it is unknown."""
    from secondcast.models.cost.cards import BANDWIDTH_FRACTION

    card = gpu.card()
    return {
        "name": card.name if card else None,
        "count": gpus,
        "memory_gib": card.memory_gib if card else None,
        "peak_bf16_flop_per_second": card.bf16_tflops * 1e12 if card and card.bf16_tflops else None,
        "peak_source": card.source + ("" if card.checked else " (not checked)") if card else None,
        "bandwidth_gb_per_second": card.bandwidth_gb_per_s if card else None,
        "achieved_flop_per_second": rate.flops_per_s,
        "bytes_per_flop": rate.bytes_per_flop,
        "matrix_fraction": card.matrix_fraction if card else None,
        "bandwidth_fraction": BANDWIDTH_FRACTION,
        "rate_basis": _why_no_rate(gpu, card) if rate.flops_per_s is None else _rate_basis(gpu, card, rate),
    }


def fit_facts(what: str, needed_bytes: float, there_bytes: float, fix: str | None = None) -> dict[str, Any]:
    """Whether something fits, as JSON types. fix: the option with which it fits, where it does not."""
    fits = needed_bytes <= there_bytes
    facts = {"what": what, "fits": fits, "needed_bytes": int(needed_bytes), "available_bytes": int(there_bytes)}
    return {**facts, "fix": None if fits else fix}


def figure_table(first: str, *figures: str, title: str | None = None) -> PlainTable:
    """A table of names and right-aligned figures."""
    table = PlainTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first)
    for name in figures:
        table.add_column(name, justify="right")
    return table


def print_figures(table: PlainTable) -> None:
    """Print a table in the width of the text."""
    print_table(table, columns=TEXT_COLUMNS)


def print_gpu(facts: dict[str, Any]) -> None:
    """Print the rate behind the hours, and the verdicts."""
    gpu = facts["gpu"]
    if gpu["achieved_flop_per_second"] is None:
        print_wrapped(f"hours: unknown, {gpu['rate_basis']}")
    else:
        rate = f"{gpu['achieved_flop_per_second'] / 1e12:.1f} TFLOP/s"
        print_wrapped(f"hours: at {rate} on each of {gpu['count']} x {gpu['name'] or 'GPU'}; {gpu['rate_basis']}")
    for verdict in facts["verdicts"]:
        print_wrapped(verdict, style=verdict_style(verdict))


def verdict_style(verdict: str) -> str | None:
    """The colour of a line that begins with a verdict."""
    return {"fits": "green", "does not fit": "bold red"}.get(verdict.split(":")[0])


def _rate_basis(gpu: GpuChoice, card: "Card | None", rate: Rate) -> str:
    from secondcast.models.cost.cards import BANDWIDTH_FRACTION

    if card is None or card.bf16_tflops is None or rate.bytes_per_flop is None:
        return f"from {gpu.flag('tflops')}"
    source = card.source + ("" if card.checked else ", not checked")
    return (
        f"matrix products at {100 * card.matrix_fraction:.0f} % of {card.bf16_tflops:.1f} dense bf16 TFLOP/s "
        f"({source}), other kernels ({1000 * rate.bytes_per_flop:.2f} bytes per kFLOP) at "
        f"{100 * BANDWIDTH_FRACTION:.0f} % of {card.bandwidth_gb_per_s:,.0f} GB/s; the percentages are assumed, or "
        f"fitted to a published time"
    )


def _why_no_rate(gpu: GpuChoice, card: "Card | None") -> str:
    if card is None:
        return f"no GPU is given; give {gpu.flag('gpu')} NAME or {gpu.flag('tflops')} X"
    if card.bf16_tflops is None:
        return f"{card.name} has no bf16 tensor cores; give {gpu.flag('tflops')} X"
    return f"the rate of {card.name} is for bfloat16; give {gpu.flag('tflops')} X for float32"


def count_text(count: int) -> str:
    """A number of parameters, such as 4.762 B."""
    return f"{count / 1e9:.3f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def hours_text(hours: float | None) -> str:
    """Hours, or a dash."""
    return "-" if hours is None else f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"


def number_text(value: float | None, form: str, unit: float = 1.0) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value / unit:{form}}"
