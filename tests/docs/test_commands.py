"""Every shell command in the documents can be typed as it stands.

All of them are parsed: files, Makefile targets, options and recipe keys must exist. One training for each topology and
recipe is run as well, with a tiny model, two steps and, where the topology has more than one process, two processes.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from onecurve.launcher.cli.app import app, run_command_line
from onecurve.launcher.cli.options import parse_keys
from onecurve.launcher.sweeps.sweep_file import load_sweep
from onecurve.training.config import load_recipe, parse_arguments
from tests.conftest import ROOT
from tools.launches import LaunchServer, build_environment

PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Words of the shell that need no check of ours.
PLAIN_COMMANDS = {"cat", "cd", "export", "git", "head", "kill", "ls", "scancel", "squeue", "tail", "touch"}
ENVIRONMENT_SCRIPTS = {"python", "pytest", "ruff", "mypy", "pip"}

# Fences may be indented, in a list.
_BASH_BLOCK = re.compile(r"^[ ]*```bash\n(.*?)^[ ]*```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|(?:src|href)=\"([^\"#]+)\"")


@dataclass(frozen=True)
class Command:
    """One command line of one page."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words, without variables set in front and without the environment's folder."""
        words = shlex.split(self.text, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words and words[0].startswith(".venv/bin/"):
            words[0] = words[0].removeprefix(".venv/bin/")
        return words

    @property
    def is_training(self) -> bool:
        return self.words[:2] == ["accelerate", "launch"]


def find_commands() -> Iterator[Command]:
    for page in PAGES:
        for block in _BASH_BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                for text in re.split(r"\s(?:&&|\|)\s", line.strip()):
                    if text and not text.startswith("#"):
                        yield Command(page.name, text)


COMMANDS = list(dict.fromkeys(find_commands()))
TRAININGS = [command for command in COMMANDS if command.is_training]


def _name(command: Command) -> str:
    return f"{command.page}: {command.text}"


@lru_cache
def launch_options() -> dict[str, bool]:
    """Options of `accelerate launch`, and whether a value follows."""
    from accelerate.commands.launch import launch_command_parser

    return {
        option: action.nargs != 0 for action in launch_command_parser()._actions for option in action.option_strings
    }


def split_training(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The launcher's options and the script's arguments of `accelerate launch [options] training/run.py [arguments]`."""
    assert "training/run.py" in words, "accelerate launch runs training/run.py"
    position = words.index("training/run.py")
    options: dict[str, str] = {}
    left = words[2:position]
    while left:
        option = left.pop(0)
        assert option in launch_options(), f"{option} is no option of `accelerate launch`"
        options[option] = left.pop(0) if launch_options()[option] else ""
    return options, words[position + 1 :]


def check_training(words: list[str]) -> None:
    options, arguments = split_training(words)
    assert "--config_file" in options, "a topology is named, or accelerate takes what is configured on the machine"
    assert (ROOT / options["--config_file"]).is_file()
    path, flags = parse_arguments(arguments)
    if path is not None and not (ROOT / path).exists():
        # A run directory's config.yaml, which is a recipe too.
        assert path.startswith("runs/"), f"{path} is not there"
        path = "training/recipes/demo.yaml"
    load_recipe(None if path is None else str(ROOT / path), flags)


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(words[1:]) <= targets, f"the Makefile has {', '.join(sorted(targets))}"


def check_python(words: list[str]) -> None:
    if words[1] == "-m":
        module = words[2].replace(".", "/")
        known = words[2] in ENVIRONMENT_SCRIPTS
        assert known or (ROOT / f"{module}.py").is_file() or (ROOT / module / "__main__.py").is_file()
    elif words[1] != "-c":
        assert (ROOT / words[1]).is_file()


def check_onecurve(words: list[str], page: str, folder: Path) -> None:
    """Parse it with the command line's own parser; the recipe that it names, with the keys it changes, is read."""
    arguments = words[2 : words.index("--")] if "--" in words else words[2:]
    command = get_command(app).commands[words[1]]  # type: ignore[attr-defined] # a group
    if words[1] == "sweep":
        load_sweep(ROOT / words[2])
    context = command.make_context(words[1], list(arguments))
    if "recipe" in context.params and context.params["recipe"] is not None:
        overrides = parse_keys(context) if command.allow_extra_args else {}
        recipe = find_recipe(Path(context.params["recipe"]), page, folder)
        if recipe is not None:
            load_recipe(str(recipe), overrides)
    if context.params.get("to") in ("skypilot", "kubernetes"):
        assert run_command_line([*words[1:], "--dry-run"]) == 0


def find_recipe(path: Path, page: str, folder: Path) -> Path | None:
    """A recipe of the project, or one of the page: a block of YAML that begins with `# NAME.yaml`; None if `init` writes it."""
    if (ROOT / path).is_file():
        return ROOT / path
    text = next(each for each in PAGES if each.name == page).read_text(encoding="utf-8")
    if re.search(r"^onecurve init ", text, re.MULTILINE):
        return None
    [block] = re.findall(rf"^```yaml\n(# {re.escape(str(path))}\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    (folder / path.name).write_text(block, encoding="utf-8")
    return folder / path.name


# The platforms' own programs are not here: what is typed must be what `onecurve submit --to` prints, or one of these.
PLATFORM_COMMANDS = (
    ("sky", "jobs", "launch"), ("sky", "jobs", "queue"), ("kubectl", "apply", "-f"), ("kubectl", "get", "trainjob"),
    ("kubectl", "patch", "trainjob"),
)  # fmt: skip


def check_sbatch(words: list[str]) -> None:
    """sbatch's own options are asked of a real Slurm, in tests/slurm."""
    position = next(number for number, word in enumerate(words) if word.endswith(".sh"))
    assert (ROOT / words[position]).is_file(), f"{words[position]} is not there"
    arguments = words[position + 1 :]
    if words[position] == "slurm/sweep.sh":
        sweep = arguments.index("--sweep")
        arguments = ["--config", load_sweep(ROOT / arguments[sweep + 1]).recipe, *arguments[sweep + 2 :]]
    path, flags = parse_arguments(arguments)
    assert path is not None, "a recipe is named"
    load_recipe(str(ROOT / path), flags)


@pytest.mark.parametrize("command", COMMANDS, ids=_name)
def test_command_can_be_typed(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = command.words
    name = words[0]
    if command.is_training:
        check_training(words)
    elif name == "make":
        check_make(words)
    elif name in ("python", "python3"):
        check_python(words)
    elif name == "onecurve":
        check_onecurve(words, command.page, tmp_path)
    elif name in ("sky", "kubectl"):
        assert tuple(words[:3]) in PLATFORM_COMMANDS
    elif name == "sbatch":
        check_sbatch(words)
    elif name in ("bash", "."):
        script = next(word for word in words[1:] if not word.startswith("-"))
        assert script.startswith(".venv/") or (ROOT / script).is_file(), f"{script} is not there"
    else:
        known = PLAIN_COMMANDS | ENVIRONMENT_SCRIPTS
        assert name in known, f"{name}: a command of a new kind needs a check here"
        if name in ENVIRONMENT_SCRIPTS:
            for word in words[1:]:
                if "/" in word and not word.startswith("-"):
                    assert (ROOT / word).exists(), f"{word} is not there"


def test_documents_have_commands() -> None:
    assert len(TRAININGS) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for match in _LINK.finditer(page.read_text(encoding="utf-8")):
        target = match[1] or match[2]
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_every_topology_is_described() -> None:
    text = (ROOT / "docs" / "topologies.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`(\w+\.yaml)`", text))
    shipped = {path.name for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert shipped <= described, "docs/topologies.md describes each YAML of accelerate_configs/"
    assert described - shipped <= {"config.yaml"}, "docs/topologies.md names no YAML that is not there"


def run_training(
    command: Command, recipe: Mapping[str, Any], folder: Path, launch_server: LaunchServer
) -> subprocess.CompletedProcess[str]:
    """Run a documented command with a tiny model and data in place of its own, for two steps."""
    options, arguments = split_training(command.words)
    topology = yaml.safe_load((ROOT / options["--config_file"]).read_text(encoding="utf-8"))
    num_processes = int(options.get("--num_processes", topology["num_processes"]))
    options.update({"--mixed_precision": "no", "--num_processes": str(min(2, num_processes))})
    options.pop("--machine_rank", None)
    options.pop("--main_process_ip", None)
    if topology.get("num_machines", 1) > 1:
        options["--num_machines"] = "1"
    path, flags = parse_arguments(arguments)
    if path is not None and (ROOT / path).is_file():
        flags = {"config": path, **flags}
    replaced = {
        **recipe,
        **dict.fromkeys(("dataset_name", "dataset_config_name", "max_train_samples", "max_eval_samples")),
        "text_column": "text",
        "label_column": "label",
        "max_train_steps": 2,
        "output_dir": str(folder / "run"),
    }
    replaced = {key: value if isinstance(value, str) else json.dumps(value) for key, value in replaced.items()}
    script = [word for key, value in {**flags, **replaced}.items() for word in (f"--{key}", value)]
    launcher = [word for option, value in options.items() for word in (option, value) if word]
    return launch_server.launch([*launcher, "training/run.py", *script], build_environment(), 300)


def choose_trainings() -> list[Command]:
    """One command for each topology and recipe: what else they say was checked without a start."""
    chosen: dict[tuple[str, ...], Command] = {}
    for command in TRAININGS:
        if "--eval_only" not in command.words:  # It needs a training that was there before.
            files = tuple(word for word in command.words if word.endswith(".yaml"))
            chosen.setdefault(files, command)
    return list(chosen.values())


@pytest.mark.slow
@pytest.mark.parametrize("command", choose_trainings(), ids=_name)
def test_training_command_runs(
    command: Command, recipe: dict[str, Any], tmp_path: Path, launch_server: LaunchServer
) -> None:
    result = run_training(command, recipe, tmp_path, launch_server)
    assert result.returncode == 0, result.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["step"]) == ("finished", 2)
