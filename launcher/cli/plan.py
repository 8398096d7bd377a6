"""`onecurve plan RECIPE --devices 8xH100-80GB`: batches, steps, memory, time and files of a training, by arithmetic."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from onecurve.launcher.cli.options import DebugOption, JsonOption, RecipeArgument, parse_keys, takes


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The command line of `onecurve plan`."""

    context: typer.Context
    recipe: RecipeArgument
    devices: Annotated[
        str | None,
        typer.Option("--devices", metavar="SPEC", help="such as 8xH100-80GB, for each node; else this machine"),
    ] = None
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="machines with these devices")] = 1
    mfu: Annotated[
        float, typer.Option("--mfu", min=0.01, max=1.0, help="share of the devices' peak that is reached")
    ] = 0.4  # PaLM (Chowdhery et al. 2022) reports 46 %, Llama 3 38 to 43 %.
    host_memory: Annotated[
        float | None,
        typer.Option("--host_memory", "--host-memory", metavar="GIB", help="memory of each node, for offload"),
    ] = None
    as_json: JsonOption = False
    debug: DebugOption = False


@takes(PlanOptions)
def plan(options: PlanOptions) -> int:
    """Show batches, steps, memory, time and files of a training.

    Arithmetic only, for any devices: the model's config.json is enough. On this machine's CPU a matrix product is
    timed, because no data sheet says how fast it is.
    """
    from onecurve.launcher.facts.machine import detect_machine
    from onecurve.launcher.facts.product_rates import measure_product_rates
    from onecurve.launcher.facts.recipes import load_recipe, predicts_tokens
    from onecurve.launcher.facts.shape import load_shape
    from onecurve.launcher.planning.data_estimate import estimate_data
    from onecurve.launcher.planning.devices import Cluster, describe_devices, parse_devices
    from onecurve.launcher.planning.plan import build_plan
    from onecurve.launcher.units import GIB
    from onecurve.launcher.views.plan_table import plan_to_json, print_plan

    recipe = load_recipe(str(options.recipe), parse_keys(options.context)).recipe
    machine = detect_machine()
    if options.devices is None:
        rates = measure_product_rates() if machine.kind == "cpu" else None
        devices, host_bytes = describe_devices(machine, rates), machine.memory_bytes
    else:
        devices = parse_devices(options.devices)
        # A GPU node usually has about twice its devices' memory (a DGX H100: 2 TB beside 640 GB).
        host_bytes = 2 * devices.memory_bytes * devices.count
    if options.host_memory is not None:
        host_bytes = int(options.host_memory * GIB)
    cluster = Cluster(devices=devices, num_nodes=options.nodes, host_bytes=host_bytes, mfu=options.mfu)
    result = build_plan(
        recipe, load_shape(recipe.model_name_or_path, predicts_tokens(recipe)), estimate_data(recipe), cluster
    )
    if options.as_json:
        print(json.dumps(plan_to_json(result), indent=2))
    else:
        from rich.console import Console

        print_plan(Console(), result, recipe)
    return 0
