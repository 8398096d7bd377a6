"""`onecurve`: where a recipe runs. A file for each command, and `app` for the whole.

    onecurve run RECIPE [--key value ...]     choose a topology, check, start the training and supervise it
    onecurve check [RECIPE]                   all problems before a training starts; without a recipe, of the machine
    onecurve plan RECIPE --devices 8xH100-80GB
    onecurve watch RUN, report RUN, compare RUN RUN, resume RUN, predict RUN --input FILE --output FILE, chat RUN
    onecurve sweep SWEEP                      train a recipe with many settings, here or on Slurm, and compare
    onecurve submit RECIPE, cancel JOB, fetch RECIPE

Nothing heavy is imported before a command needs it: the help answers in less than 0.2 s.
"""

from onecurve.launcher.cli.app import main, run_command_line

__all__ = ["main", "run_command_line"]
