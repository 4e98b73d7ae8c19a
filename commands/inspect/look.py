"""The commands that inspect a cache."""

from typing import Annotated

import typer

from secondcast.commands.inspect.pictures import inspect_compare, inspect_images
from secondcast.commands.inspect.reading import inspect_reading
from secondcast.commands.shell.console import print_json, print_lines, terminal_width
from secondcast.commands.shell.flags import add_command
from secondcast.commands.shell.resolve import CachePath, Json, Verify
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted

inspect_app = typer.Typer(no_args_is_help=True, help="Inspect a cache.")
add_command(inspect_app, inspect_images, "images")
add_command(inspect_app, inspect_compare, "compare")
add_command(inspect_app, inspect_reading, "reading")


@inspect_app.command("summary")
def inspect_summary(cache: CachePath, as_json: Json = False) -> None:
    """Summarize a cache on one screen.

    Example: secondcast inspect summary my-cache
    """
    from secondcast.inspection.summary import summarise
    from secondcast.inspection.summary_text import screen_lines
    from secondcast.storage_schemas.reader import Cache

    facts = summarise(Cache.open(cache, open_arrays=False))
    if as_json:
        print_json(facts)
        return
    print_lines(screen_lines(facts, width=terminal_width()))


@inspect_app.command("show")
def inspect_show(
    cache: CachePath,
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="Number or key of a trajectory; of a prompt in a text cache.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Show the trajectory of this prompt text.")] = None,
    grep: Annotated[str | None, typer.Option(help="List the prompts that contain this word.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of listed prompts.")] = 50,
    verify_checksums: Verify = "once",
    as_json: Json = False,
) -> None:
    """Show the numbers of one trajectory, or list the prompts that contain a word.

    Example: secondcast inspect show my-cache 12
    """
    from secondcast.inspection.show import describe, find_prompts, first_trajectory, prompt_lines, trajectory_lines
    from secondcast.storage_schemas.reader import Cache

    if sum(given is not None for given in (key, prompt, grep)) != 1:
        raise SettingsError("inspect show needs one of KEY, --prompt TEXT and --grep WORD")
    opened = Cache.open(cache, verify=verify_checksums)
    if grep is not None:
        column = "number" if opened.manifest.is_text else "trajectory"
        _print_prompts(find_prompts(opened, grep, limit=limit), grep, limit, column, as_json)
        return
    found = None if prompt is None else opened.prompts.find(prompt)
    index = opened.key_index(key or "") if found is None else first_trajectory(opened, found)
    facts = describe(opened, index)
    if as_json:
        print_json(facts)
        return
    if opened.manifest.is_text:
        print_lines(prompt_lines(facts, width=terminal_width()))
        return
    print_lines(trajectory_lines(facts, cache, width=terminal_width()))


def _print_prompts(found: list[tuple[int, str, str]], word: str, limit: int, column: str, as_json: bool) -> None:
    from secondcast.inspection.text_layout import table_lines

    more, found = len(found) > limit, found[:limit]
    if as_json:
        facts = [{"index": index, "id": identity, "prompt": text} for index, identity, text in found]
        print_json(facts)
        return
    rows = [[str(index), identity[:12], text] for index, identity, text in found]
    print_lines(table_lines([column, "prompt id", "prompt"], rows, text_columns=(1, 2), width=terminal_width()))
    print_lines(
        [f"the first {limit}: --limit shows more" if more else f"{counted(len(found), 'prompt')} with {word!r}"]
    )


@inspect_app.command("diff")
def inspect_diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of a cache, or s3://bucket/prefix.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    as_json: Json = False,
) -> None:
    """List the fields in which two caches differ, and whether the caches can be merged or mixed in training.

    Example: secondcast inspect diff my-cache other-cache
    """
    from secondcast.inspection.diff import compare, diff_lines
    from secondcast.storage_schemas.reader import Cache

    facts = compare(Cache.open(a), Cache.open(b))
    if as_json:
        print_json(facts)
        return
    print_lines(diff_lines(facts))
