"""Messages for a stopped command: some commands resume when run again, the others start over."""

from collections.abc import Sequence

GO_ON = frozenset({
    "build", "check", "convert", "demo", "generate", "init-student", "merge", "repair", "subset", "train",
})  # fmt: skip
"""Commands that keep finished work and resume when they are run again."""
GO_ON_WITH = {"evaluate table": "--out", "export": "--push"}
"""Commands that do so with an option."""


def goes_on(command: str, words: Sequence[str]) -> bool:
    """Whether a command, by its name ("evaluate table") and command line, resumes when it is run again."""
    option = GO_ON_WITH.get(command)
    return command in GO_ON or any(option == word.partition("=")[0] for word in words)


def interrupted_text(goes_on: bool) -> str:
    """After Ctrl-C or SIGTERM."""
    if goes_on:
        return "interrupted: committed work is kept; run the same command again to resume"
    return "interrupted: nothing is kept; the same command starts over"


def failed_text(what: str, goes_on: bool) -> str:
    """After an error of the operating system."""
    return f"{what}: {'committed work is kept; ' if goes_on else ''}fix the cause and run the same command again"


def out_of_memory_text(goes_on: bool, flags: Sequence[str]) -> str:
    """After the GPU ran out of memory; `flags`: the flags of the command."""
    fixes = [
        "give --max-gpu-memory auto" if "--max-gpu-memory" in flags else "",
        "lower --batch-size" if "--batch-size" in flags else "",
        "use --device cpu" if "--device" in flags else "",
    ]
    fix = " or ".join(filter(None, fixes)) or "use a larger one"
    return f"the GPU is out of memory: {fix}{'; committed work is kept' if goes_on else ''}"
