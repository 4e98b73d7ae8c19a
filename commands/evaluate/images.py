"""`secondcast evaluate images`: published metrics on folders of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secondcast.commands.evaluate.cache import refuse_idle, told_when_interrupted
from secondcast.commands.shell.config_file import Config
from secondcast.commands.shell.console import PlainTable, print_json, print_line, print_notice, print_table
from secondcast.commands.shell.flags import is_given
from secondcast.commands.shell.resolve import Device, Json, Quiet, quiet_device, terminal
from secondcast.evaluation.settings.networks import Networks
from secondcast.storage_schemas.errors import PromptsError, SettingsError

if TYPE_CHECKING:
    from secondcast.evaluation.image_metrics.metric import MetricName, Picture, Scored
    from secondcast.evaluation.image_metrics.pictures import PictureText
    from secondcast.evaluation.image_metrics.scoring import Report
    from secondcast.storage_schemas.progress import Progress


ImagePrompts = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE", help="Prompts of the images, as for build, with optional columns file, text, phrases, source."
    ),
]


def evaluate_images(
    context: typer.Context,
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER", help="Folders of images, from generate or elsewhere.")
    ],
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Metrics to compute: some of clip-score,fid,vqa,text,compbench,pocket. Default: the first four; fid "
            "(with kid) needs --reference, compbench needs T2I-CompBench's prompts, pocket needs the pocket's captions."
        ),
    ] = None,
    reference: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Reference images for fid and kid.")] = None,
    prompts: ImagePrompts = None,
    networks: Networks = Networks(),
    batch_size: Annotated[int, typer.Option(min=1, help="Number of pictures scored at once.")] = 16,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Score images with CLIP-Score, FID, KID, BLIP-VQA and OCR; a metric that cannot run is skipped with a reason.

    Example: secondcast evaluate images student-pictures teacher-pictures --reference teacher-pictures
    """
    names = _metric_names(metrics, reference)
    given = [name for name in _OF_METRICS if is_given(context, name)]
    for flag, wanted in _OF_METRICS.items():
        refuse_idle(given, (flag,), f"{' or '.join(wanted)} in --metrics", there=any(name in names for name in wanted))
    _refuse_other_networks(given, names, networks)
    progress = terminal(quiet)
    pictures = read_folders(folders, prompts, progress)
    from secondcast.evaluation.image_metrics.pictures import read_pictures

    compared = [] if reference is None else read_pictures(reference)
    torch_device = quiet_device(device)
    from secondcast.evaluation.image_metrics.chosen import metric_of
    from secondcast.evaluation.image_metrics.scoring import score_folders

    chosen = (metric_of(name, networks, compared, batch_size=batch_size, device=torch_device) for name in names)
    with told_when_interrupted(lambda: "nothing is kept, and the same command starts over"):
        report = score_folders(chosen, pictures, progress)
    _print_report(report, as_json)
    if not report.names:
        raise typer.Exit(1)


_OF_METRICS: "dict[str, tuple[MetricName, ...]]" = {
    "reference": ("fid",),
    "clip_model": ("clip-score", "fid"),
    "vqa_model": ("vqa", "compbench"),
    "compbench_clip_model": ("compbench",),
    "ocr": ("text",),
    "ocr_model": ("text",),
    "fid_features": ("fid",),
    "fid_weights": ("fid",),
}


def read_folders(folders: Sequence[Path], prompts: str | None, progress: "Progress") -> "dict[str, list[Picture]]":
    """The pictures of each folder; reports how pictures and prompts were paired where names do not tell."""
    from secondcast.evaluation.image_metrics.pictures import paired_by_order, pairing_lines, read_pictures

    texts = None if prompts is None else picture_texts(prompts)
    pictures = {str(folder): read_pictures(folder, texts) for folder in folders}
    for folder in folders:
        if paired_by_order(folder, texts):
            for line in pairing_lines(folder, pictures[str(folder)]):
                progress.say(line)
    return pictures


def picture_texts(given: str) -> "list[PictureText]":
    """Every prompt of a source, including repeated ones: each belongs to a picture."""
    from secondcast.cache_builder.prompts.rows import plain_rows
    from secondcast.evaluation.image_metrics.pictures import picture_text
    from secondcast.storage_schemas.schema.prompts import identity_form

    texts = []
    for row in plain_rows(given):
        if identity_form(row.text):
            texts.append(picture_text(row.text, row.others, row.where, categories=row.sources))
        elif row.others.get("file"):
            raise PromptsError(f"{row.where} names {row.others['file']} but has no prompt: add one, or remove the row")
    if not texts:
        raise PromptsError(f"--prompts {given} has no prompts, expected one per picture")
    return texts


def _refuse_other_networks(given: Sequence[str], names: "Sequence[MetricName]", networks: Networks) -> None:
    by_clip = "clip-score" in names or networks.fid_features == "clip"
    refuse_idle(given, ("clip_model",), "clip-score in --metrics or --fid-features clip", there=by_clip)
    refuse_idle(given, ("ocr_model",), "--ocr trocr", there=networks.ocr == "trocr")
    refuse_idle(given, ("fid_weights",), "--fid-features inception", there=networks.fid_features == "inception")


def _metric_names(asked: str | None, reference: Path | None) -> "list[MetricName]":
    known: tuple[MetricName, ...] = ("clip-score", "fid", "vqa", "text", "compbench", "pocket")
    if asked is None:
        return [name for name in known[:4] if name != "fid" or reference is not None]
    words = {word.strip() for word in asked.split(",")} - {""}
    if unknown := sorted(words - set(known)):
        raise SettingsError(f"--metrics has {unknown[0]!r}, expected some of {','.join(known)}")
    if not words:
        raise SettingsError(f"--metrics is empty, expected some of {','.join(known)}")
    return [name for name in known if name in words]


def _print_report(report: "Report", as_json: bool) -> None:
    for skipped in report.skipped:
        where = "" if skipped.folder is None else f" for {skipped.folder}"
        print_notice(f"no {skipped.metric}{where}: {skipped.why}")
    if as_json:
        print_json(report.json_value())
        return
    if not report.names:
        return
    table = PlainTable("folder", "pictures", title="means and 95 % intervals")
    for name in report.names:
        table.add_column(name, no_wrap=True)
    for folder, count in report.pictures.items():
        table.add_row(folder, str(count), *_cells(report, report.scored[folder], count))
        for category, scores in report.categories.get(folder, {}).items():
            # Of the metric that scores most images; a metric may leave some out.
            most = max(score.count for score in scores)
            table.add_row(f"  {category}", str(most), *_cells(report, scores, most))
    print_table(table)
    every = [score for scores in report.scored.values() for score in scores]
    for line in dict.fromkeys(line for score in every for line in _lines_about(score)):
        print_line(line)


def _cells(report: "Report", scores: "Sequence[Scored]", count: int) -> list[str]:
    by_name = {score.name: score for score in scores}
    return [_cell(by_name.get(name), count) for name in report.names]


def _lines_about(score: "Scored") -> list[str]:
    lines = [_made_by(score)]
    if score.parts:
        lines.append(f"{score.name} is the mean of {', '.join(score.parts)}, not the benchmark's average: it lacks")
        reasons = dict.fromkeys(score.missing.values())
        lines += [
            f"  {', '.join(name for name, why in score.missing.items() if why == reason)}: {reason}"
            for reason in reasons
        ]
    return lines


def _made_by(score: "Scored") -> str:
    library = "" if score.library is None else f", by {score.library}"
    phrases = "" if score.phrases is None else f"; phrases by {score.phrases}"
    return f"{score.name}: {score.model} at {score.revision}{library}{phrases}"


def _cell(score: "Scored | None", pictures: int) -> str:
    if score is None:
        return "-"
    digits = 2 if score.name.startswith(("clip-score", "fid", "kid")) else 3
    interval = "" if score.low is None else f"\n{score.low:.{digits}f}-{score.high:.{digits}f}"
    return f"{score.mean:.{digits}f}{interval}" + ("" if score.count == pictures else f"\nof {score.count}")
