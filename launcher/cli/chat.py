"""`onecurve chat RUN`: talk to a run's final model."""

from __future__ import annotations

from typing import Annotated

import typer

from onecurve.launcher.cli.options import DebugOption, RunArgument


def chat(
    run: RunArgument,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max_new_tokens", "--max-new-tokens", min=1, help="most tokens of an answer; by default the run's"
        ),
    ] = None,
    debug: DebugOption = False,
) -> int:
    """Talk to a run's final model in the terminal.

    /clear begins a new conversation, /exit ends, Ctrl-C stops an answer.
    """
    from onecurve.launcher.facts.history import check_finished
    from onecurve.launcher.launching.chat import talk
    from onecurve.launcher.launching.command import find_root

    check_finished(run)
    return talk(run, max_new_tokens, find_root())
