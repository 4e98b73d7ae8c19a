"""The verdict of `secondcast plan recipe`: whether each phase fits its GPU, and the hours, money and bytes of both."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from secondcast.commands.plan.cards import GpuChoice, figure_table, hours_text, print_figures, verdict_style
from secondcast.commands.plan.train_rows import AS_ASKED, FITTED
from secondcast.commands.shell.console import print_wrapped
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import duration_text, size_text

_GIB = 2**30
_TRAINING = "train"


@dataclass(frozen=True, kw_only=True)
class RentedGpu:
    """The GPU of a phase and its price.

    usd_per_hour: as given; None for the assumed price of the named GPU.
    """

    gpu: GpuChoice
    usd_per_hour: float | None

    def __post_init__(self) -> None:
        """Raise SettingsError for a price that is no number."""
        if self.usd_per_hour is not None and not 0 <= self.usd_per_hour < inf:
            raise SettingsError(
                f"{self.gpu.flag('price')} is {self.usd_per_hour}, expected a number of USD per hour, 0 or more"
            )

    def facts(self) -> dict[str, Any]:
        """Name and price as JSON types; the price is None where neither is given."""
        from secondcast.models.cost.cards import PRICES_ASSUMED

        card = self.gpu.card()
        assumed = self.usd_per_hour is None and card is not None
        return {
            "name": card.name if card else None,
            "usd_per_hour": card.usd_per_hour if card and self.usd_per_hour is None else self.usd_per_hour,
            "price_assumed": PRICES_ASSUMED if assumed else None,
        }


def both_phases(
    facts: Mapping[str, Any],
    copied: Collection[str],
    build_gpu: RentedGpu,
    train_gpu: RentedGpu,
    max_gpu_memory: str | None = None,
) -> dict[str, Any]:
    """Hours, money and bytes of a recipe, in all and by phase, as JSON types; None: unknown.

    facts: plans of the builds by name, of the run, and of any initial student.
    copied: builds whose caches the run reads.
    max_gpu_memory: the option that the training is given, which is part of its figures.
    """
    gpus = {"build": build_gpu.facts(), _TRAINING: train_gpu.facts()}
    phases = [_build_phase(name, plan, gpus["build"]) for name, plan in facts["build"].items()]
    build_hours = _sum([phase["hours"] for phase in phases])
    build_usd = _sum([phase["usd"] for phase in phases])
    training = _train_phase(facts["train"], gpus[_TRAINING])
    phases.append(training)
    student_bytes = facts["init_student"]["bytes"] if "init_student" in facts else 0
    disks = {name: plan["disk"] for name, plan in facts["build"].items()}
    fits = [phase["fits"] for phase in phases]
    return {
        "fits": False if False in fits else None if None in fits else True,
        "gpus": gpus,
        "max_gpu_memory": max_gpu_memory,
        "hours": _sum([build_hours, training["hours"]]),
        "build_hours": build_hours,
        "train_hours": training["hours"],
        "usd": _sum([build_usd, training["usd"]]),
        "build_usd": build_usd,
        "train_usd": training["usd"],
        **{end: sum(disk[end] for disk in disks.values()) for end in ("stored_low_bytes", "stored_high_bytes")},
        # The initial student is made of the teacher's text encoder, which the training machine does not need.
        "copy_low_bytes": student_bytes + sum(disks[name]["stored_low_bytes"] for name in copied),
        "copy_high_bytes": student_bytes + sum(disks[name]["stored_high_bytes"] for name in copied),
        "phases": phases,
    }


def _build_phase(name: str, plan: Mapping[str, Any], gpu: Mapping[str, Any]) -> dict[str, Any]:
    compute = plan["compute"]
    hours = _sum([compute[each] for each in ("text_hours", "sample_hours") if each in compute])
    needed = max(memory["needed_bytes"] for memory in plan["gpu_memory"].values())
    ends = {end: plan["disk"][end] for end in ("stored_low_bytes", "stored_high_bytes")}
    return _phase(f"build {name}", plan, gpu, hours, needed, plan["host_memory_bytes"]) | ends


def _train_phase(plan: Mapping[str, Any], gpu: Mapping[str, Any]) -> dict[str, Any]:
    """Its hours and host memory are those of the options that fit, if they differ from the given ones."""
    asked, fitted = plan["ways"][AS_ASKED], plan["ways"].get(FITTED, plan["ways"][AS_ASKED])
    needed = plan["fits"][0]["needed_bytes"] if plan["fits"] else asked["gpu_memory"]["needed_bytes"]
    return _phase(_TRAINING, plan, gpu, fitted["hours"], needed, fitted["host_memory_bytes"])


def _phase(
    name: str, plan: Mapping[str, Any], gpu: Mapping[str, Any], hours: float | None, needed: int, host_bytes: int
) -> dict[str, Any]:
    price, fits = gpu["usd_per_hour"], plan["fits"]
    of_gpu = None if plan["gpu"]["memory_gib"] is None else int(plan["gpu"]["memory_gib"] * _GIB)
    return {
        "phase": name,
        "gpu": gpu["name"],
        "hours": hours,
        "usd": None if hours is None or price is None else hours * price,
        "needed_bytes": needed,
        "available_bytes": fits[0]["available_bytes"] if fits else None,
        "limited": bool(fits) and fits[0]["available_bytes"] != of_gpu,
        "host_memory_bytes": host_bytes,
        "fits": all(one["fits"] for one in fits) if fits else None,
        "missing": [
            {"stage": one["what"], "bytes": one["needed_bytes"] - one["available_bytes"], "fix": one["fix"]}
            for one in fits
            if not one["fits"]
        ],
    }


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def verdict_text(both: Mapping[str, Any]) -> str:
    """Whether a recipe fits its GPUs, and what it takes; where it does not fit: the phase, by how much, and the fix."""
    costs = f"{_hours_text(both)}, {_usd_text(both['usd'])}, {_copy_text(both)}"
    if included := both["max_gpu_memory"]:
        costs += f"; with --max-gpu-memory {included} in training"
    if both["fits"]:
        return f"fits: {costs}"
    if both["fits"] is None:
        names = {"--train-gpu" if phase["phase"] == _TRAINING else "--build-gpu": phase["fits"]
                 for phase in both["phases"]}  # fmt: skip
        unnamed = " and ".join(sorted(flag for flag, fits in names.items() if fits is None))
        return f"not checked: give {unnamed} to learn whether it fits; {costs}"
    missing = [(phase, one) for phase in both["phases"] for one in phase["missing"]]
    texts = "; ".join(_missing_text(phase, one) for phase, one in missing)
    if all(one["fix"] for _, one in missing):
        return f"does not fit: {texts}. With these options: {costs}"
    return f"does not fit: {texts}"


def _missing_text(phase: Mapping[str, Any], missing: Mapping[str, Any]) -> str:
    training = phase["phase"] == _TRAINING
    what = "training" if training else f"the {missing['stage']} of {phase['phase']}"
    smaller = "a larger GPU, a smaller student, or a cache with fewer pixels or text tokens"
    fix = f"use {smaller if training else 'a larger GPU'}"
    if missing["fix"]:
        fix = f"{'train' if training else 'build'} with {missing['fix']}"
    there = f"one {phase['gpu']} has"
    if phase["limited"]:
        there = f"the limit of {size_text(phase['available_bytes'])}"
    return f"{what} needs {size_text(missing['bytes'])} more than {there}: {fix}"


def _hours_text(both: Mapping[str, Any]) -> str:
    if both["build_hours"] is both["train_hours"] is None:
        return "hours unknown"
    gpus = both["gpus"]
    builds, training = (
        f"{name} {_time_text(both[f'{phase}_hours'])}"
        + (f" on one {gpus[phase]['name']}" if gpus[phase]["name"] else "")
        for name, phase in (("builds", "build"), ("training", _TRAINING))
    )
    total = "hours unknown" if both["hours"] is None else f"{_time_text(both['hours'])} in all"
    return f"{total} ({builds}, {training})"


def _time_text(hours: float | None) -> str:
    return "unknown" if hours is None else duration_text(3600 * hours)


def _usd_text(usd: float | None) -> str:
    if usd is None:
        return "money unknown"
    return "0 USD" if usd == 0 else f"about {usd:,.0f} USD" if usd >= 10 else f"about {usd:.2g} USD"


def _copy_text(both: Mapping[str, Any]) -> str:
    low, high = (size_text(both[f"copy_{end}_bytes"]) for end in ("low", "high"))
    return f"{low if low == high else f'{low} to {high}'} to copy to the training machine (estimated)"


def print_both(facts: Mapping[str, Any]) -> None:
    """Print the verdict, then a row for each phase, and what the figures are based on."""
    both = facts["both_phases"]
    print_wrapped(both["verdict"], style=verdict_style(both["verdict"]) or "bold")
    table = figure_table(
        "phase", "hours", "USD", "GPU GiB with a\nmargin, calculated", "host GiB,\ncalculated",
        "on disk GiB,\nestimated",
    )  # fmt: skip
    for phase in both["phases"]:
        there = "" if phase["available_bytes"] is None else f" of {phase['available_bytes'] / _GIB:.1f}"
        table.add_row(
            phase["phase"], hours_text(phase["hours"]), hours_text(phase["usd"]),
            f"{phase['needed_bytes'] / _GIB:.1f}{there}", f"{phase['host_memory_bytes'] / _GIB:.1f}",
            _disk_text(phase) if "stored_low_bytes" in phase else "-", end_section=phase is both["phases"][-1],
        )  # fmt: skip
    table.add_row("total", hours_text(both["hours"]), hours_text(both["usd"]), "", "", _disk_text(both), style="bold")
    print_figures(table)
    own = "init-student, " if "init_student" in facts else ""
    print_wrapped(f"not in these hours: {own}loading weights, copying the caches")
    if prices := _prices_text(both["gpus"]):
        print_wrapped(prices)
    print_wrapped(f"evidence for the student's quality: {facts['evidence'] or 'none is stated by the recipe'}")


def _disk_text(facts: Mapping[str, Any]) -> str:
    return f"{facts['stored_low_bytes'] / _GIB:,.1f} to {facts['stored_high_bytes'] / _GIB:,.1f}"


def _prices_text(gpus: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The prices behind the money; None if no GPU has one."""
    texts = [
        f"{gpu['usd_per_hour']:.2f} USD per hour of {gpu['name'] or f'the GPU of the {phase} phase'}"
        + (f" (assumed, {gpu['price_assumed']}; --{phase}-price X replaces it)" if gpu["price_assumed"] else "")
        for phase, gpu in gpus.items()
        if gpu["usd_per_hour"] is not None
    ]
    return f"prices: {', '.join(texts)}" if texts else None
