"""The command line. Each command resolves, calls and prints (commands/); heavy imports stay inside them."""

import contextlib
import signal
import sys
from typing import Annotated

import typer

from commands.build import build
from commands.demo import demo
from commands.evaluate import evaluate_app
from commands.export import export
from commands.generate import generate
from commands.look import inspect_app
from commands.mend import inspect_verify, repair
from commands.plan import plan_app
from commands.prompts import prompts_app
from commands.report import inspect_report
from commands.resolve import out
from commands.train import train
from commands.transform import convert, merge, subset
from storage_schemas.errors import UnderstudyError

INTERRUPTED = 130
_INTERRUPTED_MESSAGE = "interrupted: what was finished stays; the same command goes on from there"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # The boxes of rich cut the names of long flags at 80 columns.
    rich_markup_mode=None,
    help="Replace FLUX's T5-XXL by a text encoder some forty times smaller: record the teacher once (build), "
    "train a student from the recording (train), look into it (inspect).",
)
for command in (demo, build, train, export, generate, convert, subset, merge, repair):
    app.command()(command)
inspect_app.command("verify")(inspect_verify)
inspect_app.command("report")(inspect_report)
app.add_typer(plan_app, name="plan")
app.add_typer(prompts_app, name="prompts")
app.add_typer(inspect_app, name="inspect")
app.add_typer(evaluate_app, name="evaluate")


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print versions.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        names = ("understudy", "torch", "diffusers", "transformers", "zarr", "webdataset")
        out.print(", ".join(f"{name} {version_of(name)}" for name in names), markup=False)
        raise typer.Exit


def main() -> None:
    """Run the command line; errors are one line and exit 1 (2 for wrong flags, 130 for Ctrl-C and SIGTERM)."""
    with contextlib.suppress(ValueError):
        # Schedulers of clusters send it some seconds before they kill: what is in hand is committed then.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
    except UnderstudyError as error:
        sys.exit(_fail(str(error), 1))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_fail(_INTERRUPTED_MESSAGE, INTERRUPTED))
    except OSError as error:
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        sys.exit(_fail(f"{what}: what was committed stays; mend that and give the same command again", 1))
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            sys.exit(_fail("the GPU is out of memory: lower --batch-size; what was committed stays", 1))
        # Wrong flags. typer carries its own copy of click from 0.29 on, so the class is known by what it can do.
        if not hasattr(error, "format_message"):
            raise
        sys.exit(_fail(f"{error.format_message()} (--help lists what there is)", 2))
    if code == INTERRUPTED:
        # Newer versions of typer turn Ctrl-C into this code themselves.
        _fail(_INTERRUPTED_MESSAGE, INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    print(f"understudy: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
