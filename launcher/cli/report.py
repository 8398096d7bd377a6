"""`onecurve report RUN`: write an HTML page of a run."""

from __future__ import annotations

import json

from onecurve.launcher.cli.options import DebugOption, JsonOption, RunArgument


def report(run: RunArgument, as_json: JsonOption = False, debug: DebugOption = False) -> int:
    """Write an HTML page of a run: RUN/report.html.

    Curves, evaluations, settings and where each came from, environment and restarts, in one file without scripts.
    """
    from onecurve.launcher.views.report import write_report

    path = write_report(run)
    print(json.dumps({"report": str(path)}) if as_json else path)
    return 0
