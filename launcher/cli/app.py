"""The command line as a whole: its commands in the order of the help, and how their errors are reported.

Only this package prints and exits; the others return data.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence

import typer

from onecurve.launcher.cli.cancel import cancel
from onecurve.launcher.cli.chat import chat
from onecurve.launcher.cli.check import check
from onecurve.launcher.cli.compare import compare
from onecurve.launcher.cli.fetch import fetch
from onecurve.launcher.cli.init import init
from onecurve.launcher.cli.merge import merge
from onecurve.launcher.cli.options import TAKES_RECIPE_KEYS
from onecurve.launcher.cli.plan import plan
from onecurve.launcher.cli.predict import predict
from onecurve.launcher.cli.report import report
from onecurve.launcher.cli.resume import resume
from onecurve.launcher.cli.run import run
from onecurve.launcher.cli.submit import submit
from onecurve.launcher.cli.sweep import sweep
from onecurve.launcher.cli.watch import watch
from onecurve.launcher.errors import LauncherError, UsageError
from onecurve.training.launch_protocol import STOP_SIGNALS

app = typer.Typer(
    name="onecurve",
    help="One recipe, one loss curve, any machine: start, check, plan and watch trainings.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Plain text, which makes the help twice as fast.
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(context_settings=TAKES_RECIPE_KEYS)(init)
app.command(context_settings=TAKES_RECIPE_KEYS)(run)
app.command()(resume)
app.command(context_settings=TAKES_RECIPE_KEYS)(check)
app.command(context_settings=TAKES_RECIPE_KEYS)(submit)
app.command(context_settings=TAKES_RECIPE_KEYS)(sweep)
app.command()(cancel)
app.command(context_settings=TAKES_RECIPE_KEYS)(fetch)
app.command(context_settings=TAKES_RECIPE_KEYS)(plan)
app.command()(compare)
app.command()(watch)
app.command()(report)
app.command()(predict)
app.command()(chat)
app.command()(merge)


def main() -> None:
    """Run the command line and exit with its code."""
    from onecurve.launcher.launching.command import describe_other_checkout, find_root

    is_completing = "_ONECURVE_COMPLETE" in os.environ  # A shell that asks shows what is on stderr.
    if not is_completing and (warning := describe_other_checkout(find_root())) is not None:
        print(f"onecurve: {warning}", file=sys.stderr)
    exit_code = run_command_line(sys.argv[1:])
    # Python removes signal handlers while it exits; a second signal would then replace this exit code.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(exit_code)


def run_command_line(arguments: Sequence[str]) -> int:
    """Run the command line; an error becomes one message on stderr, and with --json an object on stdout.

    Returns:
        0, the exit code of the error (launcher/errors.py), or the training's.
    """
    command = typer.main.get_command(app)
    if not arguments:
        command.main(["--help"], prog_name="onecurve", standalone_mode=False)
        return UsageError.exit_code
    try:
        return int(command.main(list(arguments), prog_name="onecurve", standalone_mode=False) or 0)
    except Exception as error:
        if "--debug" in arguments:
            raise
        exit_code, message = _describe(error)
        print(f"onecurve: {message}", file=sys.stderr)
        if "--json" in arguments:
            problems = getattr(error, "problems", [message])
            kind = type(error).__name__
            print(json.dumps({"exit_code": exit_code, "error": kind, "message": message, "problems": problems}))
        return exit_code
    except KeyboardInterrupt:
        return 130


def _describe(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error."""
    from onecurve.training.config import RecipeError

    if isinstance(error, LauncherError):
        return error.exit_code, str(error)
    if isinstance(error, RecipeError):
        return 2, str(error)
    if hasattr(error, "format_message"):  # typer's own errors: an unknown option, a missing argument.
        return 2, f"{error.format_message()} (onecurve --help lists commands and options)"
    if isinstance(error, typer.Abort):
        return 130, "aborted"
    return 1, f"unexpected {type(error).__name__}: {error} (a bug, please report it; --debug shows the traceback)"
