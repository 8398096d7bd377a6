"""Writes launcher/facts/accelerate_keys.py from the installed accelerate; a test fails while the two differ.

python -m tests.launcher.facts.generate_accelerate_keys
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

TARGET = Path(__file__).parents[3] / "launcher" / "facts" / "accelerate_keys.py"

# A YAML's sections, and how the launch parser names their arguments.
PREFIXES = {
    "fsdp_config": ("fsdp_",),
    "fp8_config": ("fp8_",),
    "megatron_lm_config": ("megatron_lm_",),
    "dynamo_config": ("dynamo_",),
    "parallelism_config": ("parallelism_config_",),
    "mpirun_config": ("mpirun_",),
}


def render() -> str:
    """The text of launcher/facts/accelerate_keys.py."""
    import accelerate
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    top_level = {field.name for field in dataclasses.fields(ClusterConfig)} | {"fp16", "dynamo_backend"}
    parser = launch_command_parser()
    options = [action.dest for action in parser._actions]
    sections = {
        section: sorted(name for name in options if name.startswith(prefixes)) for section, prefixes in PREFIXES.items()
    }
    group = next(group for group in parser._action_groups if group.title == "DeepSpeed Arguments")
    sections["deepspeed_config"] = sorted({action.dest for action in group._group_actions} - {"use_deepspeed"})
    lines = [
        '"""Keys that accelerate reads from its YAML files; written by tests/launcher/facts/generate_accelerate_keys.py."""',
        "",
        f'GENERATED_FROM = "{accelerate.__version__}"',
        "",
        "TOP_LEVEL = (",
        *(f'    "{name}",' for name in sorted(top_level)),
        ")",
        "",
        "SECTIONS = {",
    ]
    for section, names in sorted(sections.items()):
        if len(names) == 1:
            lines.append(f'    "{section}": ("{names[0]}",),')
        else:
            lines += [f'    "{section}": (', *(f'        "{name}",' for name in names), "    ),"]
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
