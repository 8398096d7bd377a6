"""What happens between a prepared training and its first step: the start is restored, and the run directory begins."""

from __future__ import annotations

from onecurve.training.config import ResolvedRecipe
from onecurve.training.models.adapters import has_adapter
from onecurve.training.parallel.agreement import ask_main_process
from onecurve.training.parallel.launch import Launch
from onecurve.training.parallel.states import count_largest_bytes, lies_in_host_memory
from onecurve.training.parallel.topology import describe_topology
from onecurve.training.record import samples
from onecurve.training.record.console import describe_arithmetic
from onecurve.training.record.data_summary import describe_data
from onecurve.training.record.environment import describe_changes, describe_environment
from onecurve.training.record.inputs import describe_inputs
from onecurve.training.record.trackers import start_tracker
from onecurve.training.recovery.dealing import find_writers
from onecurve.training.recovery.resumption import Start, restore, tidy
from onecurve.training.recovery.room import check_room
from onecurve.training.recovery.run_creation import create_run
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.run_directory import RunDirectory, count_held_bytes
from onecurve.training.session import Loaded, Session


def begin(session: Session, loaded: Loaded, resolved: ResolvedRecipe, start: Start, lock: RunLock) -> None:
    """Restore the start, write what a run directory holds before the first step, and say what the user should know."""
    accelerator, run = session.accelerator, session.run
    restore(accelerator, session.model, session.optimizer, session.scheduler, start)
    accelerator.wait_for_everyone()  # Another one may still read a checkpoint that is about to get its name back.
    environment = describe_environment(describe_topology(accelerator), session.task.main_metrics)
    num_checkpoints = session.milestones.most_checkpoints()
    trained, total = loaded.parameters
    num_local = Launch.from_environment().num_local_processes
    held_bytes = loaded.state_bytes * num_local // accelerator.num_processes
    if lies_in_host_memory(accelerator, session.model):
        held_bytes = count_held_bytes(held_bytes, count_largest_bytes(session.model), num_local)

    def prepare_directory() -> str | None:
        about = {
            "start_step": session.progress.step,
            "parameters": total,
            "trained_parameters": trained,
            "data": describe_data(session.data),
            "inputs": describe_inputs(session.recipe, session.task, session.data),
        }
        final_bytes = 4 * (trained if has_adapter(loaded.model) else total)
        final_bytes += 4 * total * session.recipe.merge_adapter
        check_room(run, loaded.state_bytes, final_bytes, num_checkpoints, held_bytes)
        owner = (
            run
            if run.environment.exists() or start.checkpoint is None
            else RunDirectory.of_checkpoint(start.checkpoint)
        )
        changes = describe_changes(owner.read_environment(), environment) if start.checkpoint is not None else None
        create_run(run, lock, resolved, environment | about)
        samples.cut_back(run, session.progress.step)
        return "\n".join(filter(None, (changes, tidy(run, start)))) or None

    note = ask_main_process(prepare_directory)
    session.checkpoints.writers, writers_note = find_writers(accelerator, run)
    session.checkpoints.say = session.reporter.say
    session.outcome.add_status_file(run.status, session.progress.step)
    start_tracker(accelerator, run, resolved, session.progress.step)
    arithmetic = describe_arithmetic(
        session.recipe, accelerator, session.plan.stop_step, session.plan, loaded.parameters
    )
    for line in (start.message, note, writers_note, *loaded.notes, arithmetic):
        session.reporter.say(line)
