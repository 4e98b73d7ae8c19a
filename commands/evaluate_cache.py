"""`understudy evaluate score --cache`: a student against held-out trajectories of a cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from commands.resolve import out, quiet_device, resolve_teacher, terminal
from storage_schemas.errors import BadSettings

if TYPE_CHECKING:
    from evaluation.results import Evaluation

CACHE_FLAGS = (
    "backbone", "steps_of", "closed_loop", "untrained", "batch_size", "backbone_dtype", "quantize", "modulation",
    "resident_blocks", "attention_backend", "verify", "out_file",
)  # fmt: skip
POCKET_FLAGS = ("steps", "guidance", "picture")
_NAMES = {"out_file": "out"}


def check_flags(given: Sequence[str], *, cache: bool, pocket: bool) -> None:
    """Raise BadSettings for a flag that does nothing with what is asked for, and where nothing is."""
    if not cache and not pocket:
        raise BadSettings(
            "evaluate score needs --cache or --pocket: held-out trajectories of a cache, or captions of the pocket "
            "world, which are scored exactly"
        )
    refuse_idle(given, CACHE_FLAGS, "--cache", there=cache)
    refuse_idle(given, POCKET_FLAGS, "--pocket", there=pocket)


def refuse_idle(given: Sequence[str], flags: Sequence[str], needed: str, *, there: bool) -> None:
    """Raise BadSettings for one of the flags that do nothing without `needed`, unless that is there."""
    if not there and (idle := [name for name in flags if name in given]):
        name = _NAMES.get(idle[0], idle[0]).replace("_", "-")
        raise BadSettings(f"--{name} is given without {needed}: it does nothing there; leave it out, or give both")


def score_on_cache(
    student: Path,
    location: str,
    flags: dict[str, Any],
    *,
    backbone: str | None,
    verify: Any,
    out_file: Path | None,
    device: str,
    quiet: bool,
) -> "Evaluation":
    """Evaluate on a cache, and write the record to out_file where there is one."""
    from evaluation.results import check_writable
    from storage_schemas.reader import Cache

    if out_file is not None:
        check_writable(out_file)
    cache = Cache.open(location, verify=verify)
    torch_device = quiet_device(device)
    from evaluation.on_cache import CacheScoring, evaluate_on_cache
    from models.teacher_folder import DECODE_PARTS, REPLAY_PARTS

    settings = CacheScoring.from_flags(**flags)
    parts = (*REPLAY_PARTS, *DECODE_PARTS) if settings.closed_loop else REPLAY_PARTS
    teacher = resolve_teacher(backbone or cache.manifest.source, parts)
    found = evaluate_on_cache(student, cache, teacher, settings, device=torch_device, progress=terminal(quiet))
    if out_file is not None:
        found.write(out_file)
    return found


def steps_of_text(text: str | None) -> tuple[int, ...] | None:
    """Numbers of steps from "0,5,10"; BadSettings if it is something else."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise BadSettings(f"--steps-of is {text!r}, expected numbers of steps such as 0,5,10") from error


def print_evaluation(facts: dict[str, Any]) -> None:
    """Print what evaluation.aggregates.summary gives."""
    opened = facts["open_loop"]
    out.print(
        f"{facts['student']} on {facts['trajectories']} of {facts['held_out']} held-out trajectories of "
        f"{facts['cache']}; errors are parts of the velocity's norm",
        markup=False,
    )
    _print_means("step, sigma", [{"name": f"{row['step']:>4}  {row['sigma']:.3f}", **row} for row in opened["by_step"]])
    _print_means("source", [{"name": row["source"], **row} for row in opened["by_source"]])
    if opened["by_guidance"][0]["guidance"] is not None:
        _print_means("guidance", [{"name": f"{row['guidance']:g}", **row} for row in opened["by_guidance"]])
    _print_means("overall", [{"name": "all", **opened["overall"]}])
    out.print(f"the {len(opened['hardest_prompts'])} prompts with the largest errors:", markup=False)
    for row in opened["hardest_prompts"]:
        out.print(f"  {_percent(row['error_fraction']):>9}  {row['prompt']}", markup=False)
    for row in facts["closed_loop"]:
        out.print(_closed_line(row), markup=False)


def _print_means(title: str, rows: Sequence[dict[str, Any]]) -> None:
    from rich.text import Text

    table = Table(title, "records", "student", "floor", "ratio", "mean square")
    for row in rows:
        ratio = row["error_per_floor_ratio"]
        # Names of sources may hold what rich takes for markup.
        table.add_row(
            Text(row["name"]), str(row["records"]), _percent(row["error_fraction"]), _percent(row["floor_fraction"]),
            "" if ratio is None else f"{ratio:.3g}", f"{row['error_mean_square']:.3g}",
        )  # fmt: skip
    out.print(table)


def _closed_line(row: dict[str, Any]) -> str:
    psnr = "all pictures identical" if row["psnr_db"] is None else f"PSNR {row['psnr_db']:.2f} dB"
    if row["psnr_db"] is not None and row["identical_images"]:
        psnr += f" ({row['identical_images']} identical ones left out)"
    lpips = "" if row["lpips"] is None else f", LPIPS {row['lpips']:.4f}"
    return (
        f"closed loop, {row['leader']} leading {row['trajectories']} trajectories: final latent off by "
        f"{_percent(row['latent_fraction'])}, {psnr}, SSIM {row['ssim']:.4f}{lpips}"
    )


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f} %"
