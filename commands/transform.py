"""The commands that write caches from caches: convert, subset, merge."""

from typing import TYPE_CHECKING, Annotated

import typer

from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.resolve import Quiet, terminal
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.schema.recording import CodecName, Format, Latents

if TYPE_CHECKING:
    from secondcast.storage_schemas.maintenance.rewrite import Rewritten

Target = Annotated[str, typer.Argument(metavar="DST", help="New folder, or s3://bucket/prefix.")]
SourceCache = Annotated[str, typer.Argument(metavar="SRC", help="Folder of a cache, or s3://bucket/prefix.")]


def convert(
    source: SourceCache,
    target: Target,
    format: Annotated[Format | None, typer.Option(help="File format of DST. Default: as in SRC.")] = None,
    compression: Annotated[CodecName | None, typer.Option(help="Compression of DST. Default: as in SRC.")] = None,
    latents: Annotated[
        Latents | None, typer.Option(help="Whether DST stores latents or derives them. Default: as in SRC.")
    ] = None,
    store_embeddings: Annotated[
        bool, typer.Option("--store-embeddings/--no-store-embeddings", help="Copy the teacher's embeddings as well.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Copy a cache into another format; converting back restores the same bytes. Run the same command again to resume.

    Example: secondcast convert my-cache my-tars --format webdataset
    """
    from secondcast.storage_schemas.maintenance.convert import convert as run_convert
    from secondcast.storage_schemas.reader import Cache

    cache = Cache.open(source)
    storage = {"format": format, "compression": compression, "latents": latents}
    if not store_embeddings:
        storage["embeddings"] = "none"
    _report(run_convert(cache, target, terminal(quiet), **storage))


def subset(
    source: SourceCache,
    target: Target,
    names: Annotated[
        list[str] | None, typer.Option("--source", help="Keep the prompts of this source; may be repeated.")
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Keep these prompts: a source as for build, with texts or prompt ids."),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Keep only the first N selected prompts.")] = None,
    quiet: Quiet = False,
) -> None:
    """Copy some prompts of a cache, with all their samples. Run the same command again to resume.

    Example: secondcast subset my-cache my-small-cache --source color_train --num-prompts 1000
    """
    from secondcast.cache_builder.prompts.rows import plain_rows
    from secondcast.storage_schemas.maintenance.subset import subset as run_subset
    from secondcast.storage_schemas.reader import Cache

    if not names and ids is None and num_prompts is None:
        raise SettingsError(
            "subset needs one of --source NAME, --ids FILE and --num-prompts N; use `convert` for a whole copy"
        )
    listed = None if ids is None else [row.text for row in plain_rows(ids)]
    cache = Cache.open(source)
    _report(run_subset(cache, target, terminal(quiet), sources=names or (), listed=listed, count=num_prompts))


def merge(
    sources: Annotated[list[str], typer.Argument(metavar="SRC", help="Caches, in the order of their rows in DST.")],
    target: Target,
    quiet: Quiet = False,
) -> None:
    """Merge caches of one teacher and the same flags; duplicates are kept once. Run the same command again to resume.

    Example: secondcast merge my-cache other-cache both
    """
    from secondcast.storage_schemas.maintenance.merge import merge as run_merge
    from secondcast.storage_schemas.reader import Cache

    _report(run_merge([Cache.open(source) for source in sources], target, terminal(quiet)))


def _report(result: "Rewritten") -> None:
    from secondcast.storage_schemas.progress import size_text

    if differing := [f"{num_prompts} {kind}" for kind, num_prompts in result.differing.items() if num_prompts]:
        print_line(
            f"{' and '.join(differing)} differ in their bits between the caches (built on another machine?): those of "
            f"the first cache are kept",
        )
    left, prompts = result.planned - result.trajectories, counted(result.prompts, "prompt")
    missing = [
        f"{count} {what}"
        for count, what in ((left, "trajectories"), (result.embeddings_missing, "embeddings"))
        if count
    ]
    print_line(
        f"{result.location}: {f'{result.trajectories} of ' if left else ''}{_planned(result, prompts)}, "
        f"{size_text(result.bytes)}",
    )
    if missing:
        print_line(
            f"{' and '.join(missing)} are not copied, because no source holds all rows of their shards yet: finish "
            f"its build, then run the same command again",
        )


def _planned(result: "Rewritten", prompts: str) -> str:
    return f"{counted(result.planned, 'trajectory')} of {prompts}" if result.planned else prompts
