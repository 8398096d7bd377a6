"""Write the table of docs/init.md: what `onecurve init` says of files of many shapes.

    python docs/build_init.py

tests/launcher/starting/test_init_files.py fails when a row is not what init says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onecurve.launcher.errors import Undecided
from onecurve.launcher.starting.choice import Candidate, choose
from onecurve.launcher.starting.data import find_data
from tools.init_files import FILES, InitFile

PAGE = Path(__file__).parent / "init.md"
BEGIN, END = "<!-- Written by docs/build_init.py -->\n", "<!-- end -->\n"
_HEAD = "| file | what it is | what init says |\n|---|---|---|\n"


def judge(file: InitFile, folder: Path) -> Candidate | Undecided:
    """What init takes a file for, once it is written into a folder."""
    path = folder / file.name
    file.write(path)
    try:
        return choose(find_data([str(path)]).survey, {}, file.model)
    except Undecided as undecided:
        return undecided


def write_row(file: InitFile, judged: Candidate | Undecided) -> str:
    """The file's row of the table."""
    return f"| `{file.name}` | {file.what} | {_describe(judged)} |\n"


def _describe(judged: Candidate | Undecided) -> str:
    if isinstance(judged, Candidate):
        metric = {key: value for key, value in judged.fit.training.items() if key == "metric_for_best_model"}
        return f"`{judged.task}`: {_list_keys({**judged.fit.keys, **metric})}"
    if not judged.tasks:
        refused = [problem.removeprefix("not ") for problem in judged.problems]
        return "no task can read it" + (
            f" (`{refused[0].partition(':')[0]}`:{refused[0].partition(':')[2]})" if refused else ""
        )
    flags = [problem.partition("   ")[0] for problem in judged.problems if problem.startswith("--")]
    return f"can't tell; to be decided by {' or '.join(f'`{flag}`' for flag in flags)}"


def _list_keys(keys: Mapping[str, Any]) -> str:
    """All but a folder, which is where the file happened to be written."""
    shown = {key: ", ".join(value) if isinstance(value, list | tuple) else value for key, value in keys.items()}
    return ", ".join(f"{key} `{value}`" for key, value in shown.items() if key != "image_folder")


def build_table() -> str:
    """The whole table."""
    with tempfile.TemporaryDirectory() as folder:
        return _HEAD + "".join(write_row(file, judge(file, Path(folder))) for file in FILES)


def main() -> None:
    """Put the table into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{build_table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
