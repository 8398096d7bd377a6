"""The plan: a partition of each epoch, the same for every topology, balanced, and cheap at any size."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from onecurve.training.data.permutation import derive_key, permute
from onecurve.training.data.plan import EvaluationPlan, MicroBatch, Order, TrainingPlan, cut, cut_micro_batches
from tests.conftest import ROOT
from tests.messages import naming

Lengths = NDArray[np.int64]

quick = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**63 - 1)


def make_lengths(num_examples: int, seed: int) -> Lengths:
    """Token counts as real texts have them: most short, a few very long."""
    generator = np.random.default_rng(seed)
    return np.minimum(generator.lognormal(3, 1, num_examples).astype(np.int64) + 1, 512)


@dataclass(frozen=True)
class Case:
    """Everything that a plan is a function of."""

    order: Order
    num_processes: int
    max_examples: int
    max_tokens: int | None
    is_packed: bool = False

    def plan(self, num_processes: int | None = None, start_step: int = 0, epochs: int = 1) -> TrainingPlan:
        return TrainingPlan(
            self.order,
            self.order.steps_per_epoch * epochs,
            num_processes or self.num_processes,
            self.max_examples,
            self.max_tokens,
            start_step=start_step,
            is_packed=self.is_packed,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_examples = draw(st.integers(1, 260))
    lengths = draw(st.none() | st.builds(make_lengths, st.just(num_examples), st.integers(0, 1000)))
    longest = 1 if lengths is None else int(lengths.max())
    order = Order(num_examples, draw(st.integers(1, 64)), draw(SEEDS), lengths, draw(st.integers(1, 8)))
    max_tokens = draw(st.none() | st.integers(longest, 4 * longest))
    return Case(order, draw(st.integers(1, 9)), draw(st.integers(1, 20)), max_tokens, draw(st.booleans()))


def real(micro_batches: list[MicroBatch]) -> list[int]:
    """Examples that teach, stand-ins left out."""
    return sorted(int(i) for micro_batch in micro_batches if not micro_batch.is_empty for i in micro_batch.indices)


# The permutation -----------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 5000), SEEDS)
def test_permute_is_a_bijection(num_examples: int, key: int) -> None:
    shuffled = permute(np.arange(num_examples), num_examples, key)
    assert np.array_equal(np.sort(shuffled), np.arange(num_examples))


@quick
@given(st.integers(1, 10**12), SEEDS, st.integers(0, 2**31))
def test_any_part_of_a_permutation_is_the_part_of_the_whole(num_examples: int, key: int, seed: int) -> None:
    positions = np.random.default_rng(seed).integers(0, num_examples, 40)
    together = permute(positions, num_examples, key)
    alone = [int(permute(np.array([position]), num_examples, key)[0]) for position in positions]
    assert together.tolist() == alone
    assert together.min() >= 0
    assert together.max() < num_examples
    assert len(set(together.tolist())) == len(set(positions.tolist()))


@pytest.mark.parametrize("num_examples", [2, 3, 4, 5, 7, 8, 13, 16, 17])
def test_every_example_is_equally_likely_at_every_position(num_examples: int) -> None:
    num_keys = 2000
    landed = np.zeros((num_examples, num_examples))
    for seed in range(num_keys):
        landed[np.arange(num_examples), permute(np.arange(num_examples), num_examples, derive_key(seed, 0))] += 1
    # Bonferroni: one false alarm in ten thousand over all positions; the seeds are fixed, so it never changes.
    worst = min(float(chisquare(row).pvalue) for row in landed)
    assert worst > 1e-4 / num_examples


def test_neighbours_do_not_stay_neighbours() -> None:
    num_examples = 10_000
    shuffled = permute(np.arange(num_examples), num_examples, derive_key(42, 0))
    assert abs(float(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1])) < 0.05
    assert abs(float(np.corrcoef(shuffled, np.arange(num_examples))[0, 1])) < 0.05


@quick
@given(SEEDS, st.integers(0, 50))
def test_another_seed_or_epoch_gives_another_order(seed: int, epoch: int) -> None:
    def first_epoch(seed: int, epoch: int) -> list[int]:
        order = Order(500, 50, seed)
        steps = range(epoch * 10, (epoch + 1) * 10)
        return [int(index) for step in steps for index in order.global_batch(step)]

    reference = first_epoch(seed, epoch)
    assert reference == first_epoch(seed, epoch)
    others = [first_epoch(seed + 1, epoch), first_epoch(seed, epoch + 1), first_epoch(epoch, seed % 50)]
    for other in others[: 3 if (seed, epoch) != (epoch, seed % 50) else 2]:
        same = sum(mine == theirs for mine, theirs in zip(reference, other, strict=True))
        assert same < 25, "two random orders of 500 agree in about one place"


# Global batches ------------------------------------------------------------------------------------------------------


@quick
@given(cases(), st.integers(0, 3))
def test_an_epoch_visits_each_example_exactly_once(case: Case, epoch: int) -> None:
    order = case.order
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = [order.global_batch(step) for step in steps]
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(order.num_examples))
    assert all(len(batch) == order.train_batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= order.train_batch_size


@quick
@given(cases(), st.integers(1, 400))
def test_the_same_examples_make_a_step_for_every_world_size(case: Case, num_processes: int) -> None:
    for step in range(min(case.order.steps_per_epoch * 2, 6)):
        expected = sorted(case.order.global_batch(step).tolist())
        for plan in (case.plan(), case.plan(num_processes), case.plan(1)):
            assert real(plan.micro_batches(step)) == expected


@quick
@given(st.integers(1, 300), st.integers(1, 40), SEEDS)
def test_a_window_of_one_is_plain_shuffle(num_examples: int, train_batch_size: int, seed: int) -> None:
    order = Order(num_examples, train_batch_size, seed, make_lengths(num_examples, 1), length_window=1)
    shuffled = permute(np.arange(num_examples), num_examples, derive_key(seed, 0))
    for step in range(order.steps_per_epoch):
        expected = shuffled[step * train_batch_size : (step + 1) * train_batch_size]
        assert set(order.global_batch(step).tolist()) == set(expected.tolist())


@quick
@given(cases())
def test_examples_only_meet_inside_their_window(case: Case) -> None:
    """A window is a slice of the shuffled epoch: batching by length moves no example further."""
    order = case.order
    shuffled = permute(np.arange(order.num_examples), order.num_examples, derive_key(order.seed, 0))
    size = order.train_batch_size * order.length_window
    for window in range(-(-order.num_examples // size)):
        first = window * order.length_window
        steps = range(first, min(first + order.length_window, order.steps_per_epoch))
        met = {int(index) for step in steps for index in order.global_batch(step)}
        assert met == set(shuffled[window * size : (window + 1) * size].tolist())


def count_padding(length_window: int) -> float:
    lengths = make_lengths(4096, 0)
    order = Order(4096, 32, 42, lengths, length_window)
    plan = TrainingPlan(order, order.steps_per_epoch, num_processes=2, max_examples=16)
    first = [plan.micro_batches(step)[0] for step in range(order.steps_per_epoch)]
    assert sum(micro_batch.num_tokens for micro_batch in first) == lengths.sum()
    padded = sum(micro_batch.num_padded_tokens for micro_batch in first)
    return float(1 - lengths.sum() / padded)


def test_larger_windows_pad_less() -> None:
    padding = [count_padding(length_window) for length_window in (1, 2, 8, 32)]
    assert padding == sorted(padding, reverse=True)
    assert padding[0] > 0.3, "the comparison needs texts of different lengths"
    assert padding[-1] < padding[0] / 3


def test_the_short_last_batch_is_not_the_longest_texts() -> None:
    lengths = np.arange(1, 101)
    means = [float(np.mean(lengths[Order(100, 16, seed, lengths, 32).global_batch(6)])) for seed in range(400)]
    assert np.mean(means) == pytest.approx(lengths.mean(), rel=0.1)
    assert min(means) < 20
    assert max(means) > 80


def test_batches_of_a_window_come_in_random_order() -> None:
    """Sorted inside the window, but the short texts don't come first: each place is as likely for each length."""
    lengths = np.arange(1, 65)
    places = np.array(
        [
            [float(np.mean(lengths[order.global_batch(step)])) for step in range(8)]
            for order in (Order(64, 8, seed, lengths, 8) for seed in range(400))
        ]
    )
    assert places.mean(axis=0) == pytest.approx(np.full(8, lengths.mean()), rel=0.15)


# Shares and micro-batches --------------------------------------------------------------------------------------------


@quick
@given(cases())
def test_micro_batches_partition_the_global_batch_within_their_bounds(case: Case) -> None:
    lengths = case.order.lengths
    for step in range(case.order.steps_per_epoch):
        batch = case.order.global_batch(step)
        micro_batches = case.plan().micro_batches(step)
        assert real(micro_batches) == sorted(batch.tolist())
        assert len(micro_batches) % case.num_processes == 0, "every process runs the same number of forwards"
        num_rounds = len(micro_batches) // case.num_processes
        for number, micro_batch in enumerate(micro_batches):
            assert (micro_batch.step, micro_batch.position) == (step, number // case.num_processes)
            assert micro_batch.num_micro_batches == num_rounds
            assert micro_batch.is_last == (micro_batch.position == num_rounds - 1)
            assert micro_batch.num_examples == len(batch)
            assert 1 <= len(micro_batch.indices) <= case.max_examples
            if case.max_tokens is not None:
                assert count_tokens(case, micro_batch) <= case.max_tokens
            together = [count_tokens(case, each) for each in micro_batches if not each.is_empty]
            assert micro_batch.num_padded_tokens == (len(batch) if lengths is None else sum(together))
        assert sum(micro_batch.is_last for micro_batch in micro_batches) == case.num_processes


def count_tokens(case: Case, micro_batch: MicroBatch) -> int:
    """What a micro-batch takes in memory."""
    if case.order.lengths is None:
        return len(micro_batch.indices)
    lengths = case.order.lengths[micro_batch.indices]
    return int(lengths.sum() if case.is_packed else len(lengths) * lengths.max())


@quick
@given(st.integers(20, 200), st.integers(1, 8), st.floats(1, 2), st.integers(0, 1000))
def test_padding_counts_against_the_bound_on_tokens(
    num_examples: int, num_processes: int, slack: float, seed: int
) -> None:
    """Texts so different that pieces of equal tokens are not equal once they are padded."""
    lengths = np.random.default_rng(seed).choice([1, 2, 100, 400], num_examples)
    max_tokens = int(lengths.max() * slack)
    examples = np.argsort(lengths, kind="stable")
    pieces = cut_micro_batches(examples, lengths, num_processes, num_examples, max_tokens)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(num_examples))
    assert max(len(piece) * int(lengths[piece].max()) for piece in pieces if len(piece)) <= max_tokens
    packed = cut_micro_batches(examples, lengths, num_processes, num_examples, max_tokens, is_packed=True)
    assert sorted(np.concatenate(packed).tolist()) == list(range(num_examples))
    assert max(int(lengths[piece].sum()) for piece in packed) <= max_tokens
    assert len(packed) <= len(pieces)


def test_packed_sequences_fill_the_bound_on_tokens() -> None:
    lengths, examples = np.array([1, 1, 1, 400]), np.arange(4)
    packed = cut_micro_batches(examples, lengths, 1, 8, max_tokens=403, is_packed=True)
    assert [piece.tolist() for piece in packed] == [[0, 1, 2, 3]]
    assert len(cut_micro_batches(examples, lengths, 1, 8, max_tokens=403)) == 2


@quick
@given(st.integers(1, 30), st.integers(1, 64), SEEDS)
def test_processes_without_an_example_run_a_stand_in_that_teaches_nothing(
    num_examples: int, num_processes: int, seed: int
) -> None:
    order = Order(num_examples, num_examples, seed, make_lengths(num_examples, 0))
    micro_batches = TrainingPlan(order, 1, num_processes, max_examples=4).micro_batches(0)
    stand_ins = [micro_batch for micro_batch in micro_batches if micro_batch.is_empty]
    if num_processes >= num_examples:
        assert len(micro_batches) == num_processes
        assert len(stand_ins) == num_processes - num_examples
    for micro_batch in micro_batches:
        assert micro_batch.weight == (0.0 if micro_batch.is_empty else 1.0)
        assert len(micro_batch.indices) >= 1
        assert set(micro_batch.indices.tolist()) <= set(order.global_batch(0).tolist())


def test_no_memory_bound_holds_an_example_that_is_too_long() -> None:
    with pytest.raises(ValueError, match=naming("example 2", "9 tokens", "8")):
        cut_micro_batches(np.array([0, 1, 2]), np.array([3, 4, 9]), 2, 8, max_tokens=8)


@quick
@given(st.integers(1, 200), st.integers(1, 16), SEEDS)
def test_the_tokens_of_two_processes_differ_by_less_than_one_text(
    num_examples: int, num_processes: int, seed: int
) -> None:
    """Where no bound on examples intervenes, an example goes to the side of a cut where its middle lies."""
    if num_processes >= num_examples:
        num_processes = 1
    lengths = make_lengths(num_examples, seed % 1000)
    examples = np.argsort(lengths, kind="stable")
    pieces = cut_micro_batches(examples, lengths, num_processes, max_examples=num_examples)
    assert len(pieces) == num_processes
    tokens = [int(lengths[piece].sum()) for piece in pieces]
    # Each piece needs an example, which may push the cuts before it by one text more.
    assert max(abs(count - lengths.sum() / num_processes) for count in tokens) <= 2 * lengths.max()


def test_processes_wait_little_for_each_other() -> None:
    """Padded tokens of the busiest process over the mean, averaged over an epoch."""

    def imbalance(length_window: int) -> float:
        lengths = make_lengths(8192, 3)
        order = Order(8192, 64, 42, lengths, length_window)
        ratios = []
        for step in range(order.steps_per_epoch):
            pieces = cut_micro_batches(order.global_batch(step), lengths, 4, 16)
            work = np.zeros(4)
            for number, piece in enumerate(pieces):
                work[number % 4] += len(piece) * lengths[piece].max()
            ratios.append(work.max() / work.mean())
        return float(np.mean(ratios))

    assert imbalance(32) < 1.2
    assert imbalance(32) < imbalance(1)


@quick
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_cut_gives_every_piece_something_and_none_too_much(
    num_examples: int, num_pieces: int, max_examples: int, seed: int
) -> None:
    num_pieces = min(max(num_pieces, -(-num_examples // max_examples)), num_examples)
    offsets = cut(np.sort(make_lengths(num_examples, seed)), num_pieces, max_examples)
    assert (offsets[0], offsets[-1], len(offsets)) == (0, num_examples, num_pieces + 1)
    assert np.diff(offsets).min() >= 1
    assert np.diff(offsets).max() <= max_examples


# The whole plan ------------------------------------------------------------------------------------------------------


def describe(micro_batch: MicroBatch) -> tuple[Any, ...]:
    return (
        micro_batch.indices.tolist(),
        *(getattr(micro_batch, name) for name in MicroBatch.__annotations__ if name != "indices"),
    )


@quick
@given(cases(), st.data())
def test_a_plan_that_starts_late_is_the_tail_of_the_whole(case: Case, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, case.order.steps_per_epoch * 2))
    whole = [describe(micro_batch) for micro_batch in case.plan(epochs=2) if micro_batch.step >= start]
    late = case.plan(start_step=start, epochs=2)
    assert [describe(micro_batch) for micro_batch in late] == whole
    assert len(late) == len(whole)


@quick
@given(cases(), st.integers(0, 100))
def test_the_count_of_a_step_is_over_all_processes(case: Case, seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(0.1, 5, case.order.num_examples)
    memory = (case.num_processes, case.max_examples, case.max_tokens)
    weighted = TrainingPlan(case.order, 1, *memory, counts=weights)
    for step in range(case.order.steps_per_epoch):
        batch = case.order.global_batch(step)
        for micro_batch in weighted.micro_batches(step):
            assert micro_batch.global_count == pytest.approx(float(weights[batch].sum()), rel=1e-12)
        for micro_batch in case.plan().micro_batches(step):
            assert micro_batch.global_count == len(batch)


def test_counts_that_an_epoch_draws_go_before_those_of_the_data() -> None:
    order = Order(10, 4, 0)
    drawn = TrainingPlan(order, 9, 2, 2, counts=np.ones(10), draw_counts=lambda examples, epoch: examples + 100 * epoch)
    for step in range(9):
        batch, epoch = order.global_batch(step), step // 3
        for micro_batch in drawn.micro_batches(step):
            assert micro_batch.epoch == epoch
            assert micro_batch.global_count == batch.sum() + 100 * epoch * len(batch)


# Evaluation ----------------------------------------------------------------------------------------------------------


@quick
@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(1, 24),
    st.none() | st.integers(1, 2000),
    st.integers(0, 99),
    st.booleans(),
)
def test_an_evaluation_visits_each_example_once_in_micro_batches_of_no_topology(
    num_examples: int, num_processes: int, max_examples: int, max_tokens: int | None, seed: int, is_packed: bool
) -> None:
    lengths = make_lengths(num_examples, seed)
    plan = EvaluationPlan(lengths, num_processes, max_examples, max_tokens, is_packed)
    micro_batches = list(plan)
    assert real(micro_batches) == list(range(num_examples))
    assert len(micro_batches) == len(plan)
    assert len(micro_batches) % num_processes == 0
    for micro_batch in micro_batches:
        size = len(micro_batch.indices)
        assert 1 <= size <= max_examples
        of_each = lengths[micro_batch.indices]
        tokens = of_each.sum() if is_packed else size * of_each.max()
        assert max_tokens is None or size == 1 or tokens <= max_tokens
    alone = list(EvaluationPlan(lengths, 1, max_examples, max_tokens, is_packed))
    filled = [micro_batch.indices.tolist() for micro_batch in micro_batches if not micro_batch.is_empty]
    assert filled == [micro_batch.indices.tolist() for micro_batch in alone]
    assert not any(micro_batch.is_empty for micro_batch in micro_batches[: len(alone)]), "stand-ins come last"
    assert len(micro_batches) - len(alone) < num_processes


# Scale ---------------------------------------------------------------------------------------------------------------


class MillionsOfLengths:
    """Lengths of a billion examples without holding them, as a memory-mapped file gives them."""

    def __getitem__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices % 509 + 3


def build_huge_plan(start_step: int) -> TrainingPlan:
    lengths = cast("NDArray[Any]", MillionsOfLengths())
    order = Order(10**9, 4096 * 8, 42, lengths, length_window=32)
    return TrainingPlan(order, order.steps_per_epoch, 4096, max_examples=4, start_step=start_step)


def test_a_billion_examples_on_4096_processes_need_little_memory() -> None:
    plan = build_huge_plan(start_step=20_000)
    tracemalloc.start()
    try:
        micro_batches = [micro_batch for step in range(20_000, 20_002) for micro_batch in plan.micro_batches(step)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(micro_batches) >= 2 * 2 * 4096
    assert peak < 100e6, f"{peak / 1e6:.0f} MB"


def test_a_late_start_costs_what_an_early_one_does() -> None:
    def measure(start_step: int) -> float:
        started = time.process_time()
        assert next(iter(build_huge_plan(start_step))).step == start_step
        return time.process_time() - started

    last = build_huge_plan(0).order.steps_per_epoch - 40  # A whole window is before it and after it.
    seconds = {step: [measure(step) for _ in range(3)] for step in (0, last)}
    assert median(seconds[last]) < 5 * median(seconds[0])


# Light imports -------------------------------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "accelerate", "datasets", "deepspeed"}


def find_imported(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in result.stdout.split()}


@pytest.mark.parametrize(
    ("module", "heavy"), [("onecurve.training.data.plan", HEAVY), ("onecurve.training.config", HEAVY | {"numpy"})]
)
def test_light_modules_import_nothing_heavy(module: str, heavy: set[str]) -> None:
    imported = find_imported(module)
    assert "onecurve" in imported
    assert not imported & heavy


def test_the_check_for_heavy_imports_sees_them() -> None:
    check: Callable[[str], set[str]] = find_imported
    assert "numpy" in check("onecurve.training.data.plan")
