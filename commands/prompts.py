"""`secondcast prompts`: list and count prompts as a build reads them, and write prompt sets."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from secondcast.cache_builder.prompts.laion import MIN_SCORE
from secondcast.cache_builder.settings import PromptLimit
from secondcast.commands.shell.console import PlainTable, print_json, print_line, print_lines, print_table
from secondcast.commands.shell.flags import add_command
from secondcast.commands.shell.outputs import Overwrite, write_text
from secondcast.commands.shell.resolve import Json, Quiet, resolve_teacher, terminal
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from secondcast.cache_builder.prompts.files import PromptsRead, SourcedText

prompts_app = typer.Typer(no_args_is_help=True, help="List and count prompts, and write prompt sets.")

Sources = Annotated[list[str], typer.Argument(metavar="SOURCE", help="Prompts, as for build --prompts.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed for the choice of prompts.")]


def prompts_list(sources: Sources, selection: PromptLimit = PromptLimit(), as_json: Json = False) -> None:
    """List the distinct prompts in the order of a build, one per line.

    Example: secondcast prompts list color_train.txt notes.csv:column=caption --limit 20
    """
    from secondcast.cache_builder.prompts.files import read_prompts

    texts = read_prompts(sources, limit=selection.limit).texts
    if as_json:
        print_json([asdict(text) for text in texts])
        return
    print_lines(" ".join(text.text.splitlines()) for text in texts)


def prompts_count(
    sources: Sources,
    selection: PromptLimit = PromptLimit(),
    teacher: Annotated[str | None, typer.Option(help="Also count tokens, with the tokenizer of this teacher.")] = None,
    as_json: Json = False,
) -> None:
    """Count prompts, in total and per source; with --teacher also their lengths in tokens.

    Example: secondcast prompts count color_train.txt CommonText_Train.json --teacher pocket
    """
    from secondcast.cache_builder.prompts.files import read_prompts

    read = read_prompts(sources, limit=selection.limit)
    facts: dict[str, Any] = {
        "distinct": len(read.texts),
        "empty": read.empty,
        "repeated": read.repeated,
        "sources": [asdict(count) for count in read.counts],
        "names": _names(read),
    }
    if teacher is not None:
        facts["tokens"] = _token_facts(read, teacher)
    if as_json:
        print_json(facts)
        return
    _print_counts(read, facts)


def _names(read: "PromptsRead") -> dict[str, int]:
    found: dict[str, int] = {}
    for text in read.texts:
        for name in text.sources:
            found[name] = found.get(name, 0) + 1
    return found


def _token_facts(read: "PromptsRead", teacher: str) -> dict[str, Any]:
    from secondcast.cache_builder.prompts.lengths import prompt_lengths

    return asdict(prompt_lengths([text.text for text in read.texts], resolve_teacher(teacher, ("large_tokenizer",))))


def _print_counts(read: "PromptsRead", facts: dict[str, Any]) -> None:
    table = PlainTable("source", "lines", "distinct", "new", "empty", "repeated", "skipped")
    for count in read.counts:
        numbers = (count.lines, count.distinct, count.new, count.empty, count.repeated, count.left_out)
        table.add_row(count.source, *map(str, numbers))
    print_table(table)
    if len(facts["names"]) > len(read.counts):
        for name, number in facts["names"].items():
            print_line(f"{number:>10}  {name}")
    print_line(f"{counted(len(read.texts), 'distinct prompt')} ({read.skipped_text()})")
    if tokens := facts.get("tokens"):
        print_line(
            f"tokens: mean {tokens['mean']:.1f}, longest {tokens['longest']} ({tokens['longest_text'][:80]!r}); "
            f"longer than {tokens['text_length']} and truncated: {tokens['cut']}",
        )
        if tokens["same"]:
            first, second = (repr(text[:80]) for text in tokens["same_texts"])
            print_line(
                f"{counted(tokens['same'], 'prompt')} with the same tokens as another, such as {first} and {second}: "
                f"the teacher cannot distinguish them"
            )


def prompts_compbench(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder with T2I-CompBench's prompt files: examples/dataset.")
    ],
    out_file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL file to write, for --prompts of build, generate and evaluate.")
    ],
    categories: Annotated[
        Literal["paper", "all"],
        typer.Option(help="Categories: paper (those of the paper), or all (adds 3d_spatial and numeracy)."),
    ] = "paper",
    split: Annotated[
        Literal["train", "val"], typer.Option(help="Split: train, or val (the prompts that the benchmark scores).")
    ] = "train",
    phrases: Annotated[
        str | None,
        typer.Option(
            metavar="PIPELINE",
            help="spaCy pipeline whose noun chunks are written as phrases for vqa: en_core_web_sm as in the benchmark, "
            "or a folder. Default: none; vqa uses word rules.",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the prompts of T2I-CompBench to one file, each with its category.

    Example: secondcast prompts compbench T2I-CompBench/examples/dataset compbench.jsonl
    """
    from secondcast.cache_builder.prompts.compbench import (
        ALL_CATEGORIES,
        PAPER_CATEGORIES,
        compbench_prompts,
        compbench_validation,
        json_lines,
    )

    _check_ending(out_file, (".jsonl",))
    chosen = PAPER_CATEGORIES if categories == "paper" else ALL_CATEGORIES
    read = (compbench_prompts if split == "train" else compbench_validation)(folder, chosen)
    columns = _phrase_columns(phrases)
    write_text(out_file, json_lines(read.texts, columns, line_per_source=split == "train"), overwrite=overwrite)
    lines = sum(count.lines for count in read.counts)
    print_line(
        f"{out_file}: {counted(len(read.texts), 'distinct prompt')} of {counted(lines, 'line')} in "
        f"{counted(len(read.counts), 'category')} ({read.skipped_text()})",
    )


def _phrase_columns(pipeline: str | None) -> "Callable[[SourcedText], dict[str, Any]]":
    """The columns that a spaCy pipeline adds to a prompt; without one, none."""
    if pipeline is None:
        return lambda text: {}
    from secondcast.evaluation.image_metrics.phrases import NounChunks

    chunks = NounChunks.load(pipeline)

    def columns(text: "SourcedText") -> dict[str, Any]:
        found = {"phrases": list(chunks.phrases(text.text)), "phrases_by": chunks.name}
        return (
            {**found, "without_adjectives": chunks.without_adjectives(text.text)}
            if "complex" in text.sources
            else found
        )

    return columns


def prompts_commontext(
    out_file: Annotated[Path, typer.Argument(metavar="FILE", help=".txt (a prompt per line), .json or .jsonl.")],
    num_prompts: Annotated[int, typer.Option(min=1, help="Number of distinct prompts.")] = 50_000,
    seed: Seed = 0,
    words: Annotated[
        int, typer.Option(min=1, max=20_000, help="Number of the most frequent English words to draw from.")
    ] = 5000,
    overwrite: Overwrite = False,
) -> None:
    """Write prompts for text rendering: signs with frequent English words on them.

    Example: secondcast prompts commontext signs.txt --num-prompts 50000
    """
    from secondcast.cache_builder.prompts.commontext import frequent_words, text_prompts

    _check_ending(out_file, (".txt", ".json", ".jsonl"))
    texts = text_prompts(num_prompts, seed=seed, words=frequent_words(words))
    if out_file.suffix == ".json":
        write_text(out_file, json.dumps(texts, indent=1) + "\n", overwrite=overwrite)
    else:
        lines = texts if out_file.suffix == ".txt" else [json.dumps(text) for text in texts]
        write_text(out_file, "".join(f"{line}\n" for line in lines), overwrite=overwrite)
    print_line(f"{counted(len(texts), 'prompt')} in {out_file}")


def prompts_laion(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Metadata of LAION-Aesthetics: a Parquet file, a folder of them, or hf:NAME."
        ),
    ],
    out_file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL file to write, for build --prompts.")],
    min_score: Annotated[float, typer.Option(help="Minimum aesthetic score.")] = MIN_SCORE,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Number of distinct captions, the first ones. Default: all.")
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write captions of LAION-Aesthetics 6.5+ to one file. How many the paper took is not stated.

    A hub data set is streamed, without a copy on disk. The caption is the column TEXT, text, caption or prompt, or that
    of SOURCE:column=NAME; the score AESTHETIC_SCORE or aesthetic.

    Example: secondcast prompts laion metadata.parquet laion.jsonl --num-prompts 100000
    """
    from secondcast.cache_builder.prompts.compbench import json_lines
    from secondcast.cache_builder.prompts.files import SourcedText
    from secondcast.cache_builder.prompts.laion import laion_captions
    from secondcast.cache_builder.prompts.sources import PromptSource

    _check_ending(out_file, (".jsonl",))
    metadata = PromptSource.of(source)
    if metadata.name is not None or metadata.limit is not None or metadata.repeat > 1:
        raise SettingsError(f"SOURCE is {source}: name=, limit= and repeat= only apply to builds, omit them")
    # Without a number to reach, a bar could not show a share.
    progress = terminal(quiet or num_prompts is None)
    with progress.bar("captions", total=num_prompts or 0, done=0, unit="captions") as bar:
        found = laion_captions(metadata, min_score=min_score, num_prompts=num_prompts, bar=bar)
    texts = [SourcedText(text=text, sources=("laion",)) for text in found.texts]
    write_text(out_file, json_lines(texts), overwrite=overwrite)
    print_line(f"{out_file}: {counted(len(texts), 'distinct caption')} of {found.text}")


def _check_ending(file: Path, endings: tuple[str, ...]) -> None:
    if file.suffix not in endings:
        raise SettingsError(
            f"{file} has the suffix {file.suffix!r}, expected {' or '.join(endings)}: a build goes by the suffix"
        )


def prompts_pocket(
    out_file: Annotated[Path, typer.Argument(metavar="FILE", help=".txt file to write, a prompt per line.")],
    num_prompts: Annotated[int, typer.Option(min=1, help="Number of distinct captions.")] = 512,
    seed: Seed = 0,
    split: Annotated[
        Literal["train", "heldout"],
        typer.Option(help="Split: train, or heldout (compositions that are never trained on)."),
    ] = "train",
    kind: Annotated[
        Literal["scene", "composition", "sign"] | None, typer.Option(help="Kind of captions. Default: all three.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write captions of the pocket world.

    Example: secondcast prompts pocket prompts.txt --num-prompts 1024
    """
    _check_ending(out_file, (".txt",))
    texts = pocket_captions(num_prompts, seed=seed, split=split, kind=kind)
    write_text(out_file, caption_lines(texts), overwrite=overwrite)
    print_line(f"{counted(len(texts), 'caption')} in {out_file}")


def pocket_captions(count: int, *, seed: int = 0, split: str = "train", kind: str | None = None) -> list[str]:
    """Captions of the pocket world; SettingsError if there are not enough."""
    from secondcast.pocket.world import KINDS, captions

    try:
        return captions(count, seed=seed, split=split, kinds=KINDS if kind is None else (kind,))
    except ValueError as error:
        raise SettingsError(f"--num-prompts {count}: {error}") from error


def caption_lines(texts: list[str]) -> str:
    """The text of a file of captions, one per line."""
    return "".join(f"{text}\n" for text in texts)


add_command(prompts_app, prompts_list, "list")
add_command(prompts_app, prompts_count, "count")
add_command(prompts_app, prompts_compbench, "compbench")
add_command(prompts_app, prompts_commontext, "commontext")
add_command(prompts_app, prompts_laion, "laion")
add_command(prompts_app, prompts_pocket, "pocket")
