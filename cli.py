"""The command line. Each command resolves, calls and prints (commands/); heavy imports stay inside them."""

import atexit
import contextlib
import gc
import signal
import sys
from typing import Annotated, Any

# Ctrl-C during the imports ends the process silently, without a traceback.
_BEFORE = signal.getsignal(signal.SIGINT)
if _BEFORE is signal.default_int_handler:
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import typer
from pydantic import ValidationError

from secondcast.commands.build.build import build
from secondcast.commands.check import check
from secondcast.commands.demo import demo
from secondcast.commands.evaluate.evaluate import evaluate_app
from secondcast.commands.export import export
from secondcast.commands.generate import generate
from secondcast.commands.init_student import init_student
from secondcast.commands.inspect.look import inspect_app
from secondcast.commands.inspect.report import inspect_report
from secondcast.commands.plan.app import plan_app
from secondcast.commands.prompts import prompts_app
from secondcast.commands.repair import inspect_verify, repair
from secondcast.commands.shell.console import make_streams_safe, print_error, print_line, print_notice, print_traceback
from secondcast.commands.shell.familiar_flags import close_advice, familiar_advice
from secondcast.commands.shell.flags import add_command
from secondcast.commands.shell.places import GroupOfPlaces
from secondcast.commands.shell.resuming import failed_text, goes_on, interrupted_text, out_of_memory_text
from secondcast.commands.train.train import train
from secondcast.commands.transform import convert, merge, subset
from secondcast.models.memory.optional_packages import hidden_packages
from secondcast.storage_schemas.errors import SecondcastError
from secondcast.storage_schemas.schema.problems import problem_text

if _BEFORE is signal.default_int_handler:
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, _BEFORE)

INTERRUPTED = 130

app = typer.Typer(
    cls=GroupOfPlaces,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # The boxes of rich cut the names of long flags at 80 columns.
    rich_markup_mode=None,
    help="Replace FLUX's T5-XXL with a text encoder about forty times smaller: record the teacher once (build), "
    "train a student from the recording (train), inspect the recording (inspect).",
)
for command in (demo, check, build, init_student, train, export, generate, convert, subset, merge, repair):
    add_command(app, command)
add_command(inspect_app, inspect_verify, "verify")
add_command(inspect_app, inspect_report, "report")
app.add_typer(plan_app, name="plan")
app.add_typer(prompts_app, name="prompts")
app.add_typer(inspect_app, name="inspect")
app.add_typer(evaluate_app, name="evaluate")


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions of secondcast and its libraries.")
    ] = False,
) -> None:
    if version:
        from secondcast.commands.shell.versions import version_lines

        for line in version_lines():
            print_line(line)
        raise typer.Exit


def main() -> None:
    """Run the command line; errors are one line and exit 1 (2 for wrong flags, 130 for Ctrl-C and SIGTERM)."""
    make_streams_safe()
    sys.excepthook = print_traceback
    with hidden_packages():
        _run()


def _run() -> None:
    with contextlib.suppress(ValueError):
        # Cluster schedulers send SIGTERM some seconds before SIGKILL, so that finished work can be committed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Skips the last garbage collection over the half million objects of torch and transformers.
    atexit.register(gc.freeze)
    try:
        code = app(prog_name="secondcast", standalone_mode=False)
    except SecondcastError as error:
        sys.exit(_fail(str(error), 1))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        sys.exit(_failed(error))
    if code == INTERRUPTED:
        # torchrun sends the signal again when another process ends: print the whole message first.
        _on_signals(signal.SIG_IGN)
        # Newer versions of typer turn Ctrl-C into this code themselves.
        _fail(interrupted_text(_resumes()), INTERRUPTED)
        _on_signals(signal.SIG_DFL)
    sys.exit(code if isinstance(code, int) else 0)


def _on_signals(handler: signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            signal.signal(number, handler)


def _failed(error: Exception) -> int:
    """Print an error that is not a bug and return the exit code; re-raise a bug."""
    if isinstance(error, OSError):
        return _fail(failed_text(f"{error.filename or 'a file'}: {error.strerror or error}", _resumes()), 1)
    if type(error).__name__ == "OutOfMemoryError":
        flags = [flag for parameter in _given_command()[1].params for flag in parameter.opts]
        return _fail(out_of_memory_text(_resumes(), flags), 1)
    # Wrong flags. typer bundles its own copy of click from 0.29 on, so duck typing replaces isinstance.
    if not hasattr(error, "format_message"):
        raise error
    message, context = error.format_message(), getattr(error, "ctx", None)
    if "\n" in message:
        # The help of a group that is called without a command.
        print_notice(message)
        return 2
    # An option without its value has a name as well, but it exists.
    if hasattr(error, "possibilities") and (typed := getattr(error, "option_name", None)):
        advice = _advice(typed)
        message = f"No such option: {typed}" + (f". {advice}" if advice else "")
    elif isinstance(error.__cause__, ValidationError) and getattr(error, "param", None):
        # typer validates with pydantic, whose messages do not say what was found.
        flag = "/".join(error.param.opts)  # type: ignore[attr-defined]  # of typer's BadParameter
        message = problem_text(flag, error.__cause__.errors()[0])
    where = context.command_path if context else f"secondcast {_given_command()[0]}".strip()
    return _fail(f"{message} (see {where} --help)", 2)


def _advice(typed: str) -> str | None:
    name, command = _given_command()
    flags = {flag for parameter in command.params for flag in parameter.opts}
    return familiar_advice(typed, name, flags) or close_advice(typed, name, flags)


def _given_command() -> tuple[str, Any]:
    """The command on this command line: its name, such as "evaluate score", and typer's object."""
    names, command = [], typer.main.get_command(app)
    for word in sys.argv[1:3]:
        if word not in getattr(command, "commands", {}):
            break
        names.append(word)
        command = command.commands[word]  # type: ignore[attr-defined]  # typer's groups have them
    return " ".join(names), command


def _resumes() -> bool:
    return goes_on(_given_command()[0], sys.argv)


def _fail(message: str, code: int) -> int:
    print_error(message)
    return code


if __name__ == "__main__":
    main()
