"""Errors of the launcher and their exit codes. Each is printed as one message on stderr, without a traceback.

::

    Exception
    ├── RecipeError               2   training/config.py: the recipe is wrong, all problems at once
    └── LauncherError             2
        ├── UsageError            2   the command line asks for something that does not exist
        ├── Undecided             2   `init` can't tell what data is for; holds what it could be
        ├── UnknownTopology       2   no such YAML, or one that can't be read
        ├── Unsuitable            2   this machine can't do what was asked
        ├── PreflightFailed       2   `check` found errors; holds all of them
        ├── UnreadableModel       2   no config.json to do arithmetic with
        │   └── UncountableModel  2   one that does not say how large the model is
        ├── NotARun               2   a folder that no training has written
        └── LaunchFailed          1   a program could not be started, or did not answer

The training's own exit codes (0 finished, 2 bad input, 3 diverged, 75 preempted, 1 anything else) pass through `run` and
`resume` unchanged. Any other exception is a bug: exit code 1, and `--debug` shows its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class LauncherError(Exception):
    """Something that the user can fix; `exit_code` is what `onecurve` returns."""

    exit_code = 2


class UsageError(LauncherError):
    """The command line asks for something that does not exist."""


class Undecided(LauncherError):
    """`init` can't tell what data is for.

    Attributes:
        problems: what it could be, each with the flags that decide it, and what it can't be.
        tasks: of what it could be, the likeliest first.
    """

    def __init__(self, columns: str, problems: Sequence[str], tasks: Sequence[str]) -> None:
        self.problems, self.tasks = list(problems), list(tasks)
        said = "it could be one of these; add its flags" if tasks else "no task can read it"
        end = ":" if problems else "; docs/tasks.md says which columns each task reads"
        super().__init__(
            "\n  ".join([f"can't tell what to learn from the columns {columns}; {said}{end}", *self.problems])
        )


class UnknownTopology(LauncherError):
    """No such accelerate YAML, or one that can't be read."""


class Unsuitable(LauncherError):
    """This machine can't do what was asked."""


class PreflightFailed(LauncherError):
    """Errors that were found before anything was started."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  ".join([f"{count} found before the start:", *self.problems]))


class UnreadableModel(LauncherError):
    """No config.json to do arithmetic with."""


class UncountableModel(UnreadableModel):
    """A config.json that does not say how large the model is. The model can still be trained."""


class NotARun(LauncherError):
    """A folder that no training has written."""


class LaunchFailed(LauncherError):
    """A program could not be started, or did not answer."""

    exit_code = 1
