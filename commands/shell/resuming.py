"""What is left of a command that was stopped: some go on where they were, the others begin anew."""

from collections.abc import Sequence

GO_ON = frozenset({"build", "convert", "demo", "generate", "merge", "repair", "subset", "train"})
"""Commands that keep what they finished and go on from there when they are given again."""
GO_ON_WITH_OUT = frozenset({"evaluate table"})
"""Those that do so where --out says where to keep it."""


def goes_on(command: str, words: Sequence[str]) -> bool:
    """Whether a command, given by its name ("evaluate table") and all words of its line, goes on when given again."""
    with_out = any(word == "--out" or word.startswith("--out=") for word in words)
    return command in GO_ON or (command in GO_ON_WITH_OUT and with_out)


def interrupted_text(goes_on: bool) -> str:
    """After Ctrl-C or SIGTERM."""
    if goes_on:
        return "interrupted: what was finished stays; the same command goes on from there"
    return "interrupted: nothing of it is kept; the same command begins anew"


def failed_text(what: str, goes_on: bool) -> str:
    """After an error of the operating system."""
    return f"{what}: {'what was committed stays; ' if goes_on else ''}mend that and give the same command again"


def out_of_memory_text(goes_on: bool, flags: Sequence[str]) -> str:
    """After one of the GPU; `flags` are those that the command has."""
    ways = ["lower --batch-size" if "--batch-size" in flags else "", "take --device cpu" if "--device" in flags else ""]
    way_out = " or ".join(filter(None, ways)) or "take a larger one"
    return f"the GPU is out of memory: {way_out}{'; what was committed stays' if goes_on else ''}"
