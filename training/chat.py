"""Talk to a run's final model in the terminal.

    python training/chat.py --run runs/chat [--max_new_tokens 200]

`onecurve chat` runs it. Each line is a message; the answer appears as it is written, with the model's own generation
settings. `/clear` begins a new conversation, `/exit` or the end of the input ends; Ctrl-C stops an answer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

from onecurve.training.outcome import Outcome, end_process, report_outcome  # isort: split

import torch

from onecurve.training.config import load_recipe, parse_arguments
from onecurve.training.errors import BadInput
from onecurve.training.models.loading import load_trained
from onecurve.training.record.console import quiet_third_parties
from onecurve.training.run_directory import RunDirectory
from onecurve.training.tasks import build_task


def main(arguments: Sequence[str], outcome: Outcome) -> None:
    """Load the final model and answer line after line."""
    quiet_third_parties()
    _, flags = parse_arguments(arguments)
    if unknown := flags.keys() - {"run", "max_new_tokens"}:
        raise BadInput(f"chat takes --run and --max_new_tokens, not {', '.join(sorted(unknown))}")
    if "run" not in flags:
        raise BadInput("--run: names no run directory")
    run = RunDirectory(Path(flags["run"]))
    if not run.final.is_dir():
        raise BadInput(f"{str(run.path)!r} has no final/: its training is not finished")
    recipe = load_recipe(str(run.config)).recipe
    task = build_task(recipe)
    if not task.converses:
        raise BadInput(f"{str(run.path)!r}: task {recipe.task} writes no text to talk with")
    count = flags.get("max_new_tokens")
    if count is not None and not (count.isdigit() and int(count) > 0):
        raise BadInput(f"--max_new_tokens: must be a positive number, got {count!r}")
    model, tokenizer = load_trained(run.final, recipe, task)
    model.to(torch.accelerator.current_accelerator() or "cpu").eval()
    torch.manual_seed(recipe.seed)
    messages: list[dict[str, str]] = []
    for line in read_lines():
        if line.strip() == "/exit":
            break
        if line.strip() == "/clear":
            messages.clear()
        elif line.strip():
            messages.append({"role": "user", "content": line})
            try:
                answer = task.answer(model, tokenizer, messages, int(count) if count else None, write)
            except BadInput as error:
                messages.pop()
                print(f"{error}; /clear begins anew", file=sys.stderr)
                continue
            print()
            messages.append({"role": "assistant", "content": answer})


def read_lines() -> Iterator[str]:
    """Lines that a person types, or those of a file or pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - lets input() edit its line

    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")


def write(text: str) -> None:
    """Show a part of an answer."""
    print(text, end="", flush=True)


if __name__ == "__main__":
    end_process(report_outcome(main, sys.argv[1:]))
