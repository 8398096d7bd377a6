"""Results of several ranks: a message for many micro-batches, each result where it belongs, to the last bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from onecurve.training.data.columns import Ragged
from onecurve.training.data.layout import Layout
from onecurve.training.data.plan import EvaluationPlan
from onecurve.training.record import evaluation as module
from onecurve.training.record.evaluation import Evaluation, EvaluationData, evaluate
from onecurve.training.recovery.stops import StopRequested
from onecurve.training.tasks.base import Forward
from tests.host_waits import HostWaits

LENGTHS = np.random.default_rng(5).integers(1, 9, 61)  # A prime: no number of processes divides it.


@dataclass
class Ranks:
    """What ranks send each other, as threads of this process."""

    number: int
    num_collectives: int = 0
    _sent: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sent = [None] * self.number
        self._meet = threading.Barrier(self.number)

    def gather(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        self._sent[rank] = tensor
        self._meet.wait(20)
        whole = torch.cat(self._sent)  # Raises if ranks send messages of different kinds.
        assert len({len(each) for each in self._sent}) == 1, "a collective needs equal sizes"
        self._meet.wait(20)
        self.num_collectives += rank == 0
        return whole

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """The result, or the error, of each rank."""
        found: list[Any] = [None] * self.number

        def run_one(rank: int) -> None:
            try:
                found[rank] = work(rank)
            except Exception as error:
                found[rank] = error
                if not isinstance(error, StopRequested):  # All raise that.
                    self._meet.abort()

        threads = [threading.Thread(target=run_one, args=(rank,)) for rank in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class Tagger:
    """A task whose results are of each kind, and of which a stand-in would be seen."""

    generates = False
    unbatched_features: frozenset[str] = frozenset()

    def __init__(self, is_ragged: bool, pads_left: bool) -> None:
        self.ragged_results = frozenset({"tag"} if is_ragged else ())
        self.pads_left = pads_left

    def forward(self, model: Any, batch: dict[str, torch.Tensor], wants_results: bool) -> Forward:
        number = batch["number"]
        results = {
            "number": number,
            "is_even": number % 2 == 0,
            "score": (number.double() / 7)[:, None].expand(-1, 3),  # Not contiguous.
        }
        if self.ragged_results:
            results["tag"] = torch.where(batch["attention_mask"].bool(), batch["tokens"], 99)
        return Forward((number / 3).float(), results)

    def compute_metrics(self, results: Any) -> dict[str, float]:
        return {"mean": float(np.mean(results["number"]))}


def build_batches(plan: EvaluationPlan, rank: int, task: Tagger) -> Iterator[dict[str, Any]]:
    for place, micro_batch in enumerate(plan):
        if place % plan.num_processes != rank:
            continue
        lengths = LENGTHS[micro_batch.indices]
        places = np.arange(lengths.max())
        if task.pads_left:
            places = places[::-1]
        mask = places[None] < lengths[:, None]
        yield {
            "micro_batch": micro_batch,
            "number": torch.from_numpy(micro_batch.indices.copy()),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "tokens": torch.from_numpy(micro_batch.indices[:, None] * 10 + places[None]),
        }


def evaluate_on(
    ranks: Ranks, max_examples: int, task: Tagger, asked_rank: int | None = None, device: str = "cpu"
) -> list[Any]:
    ragged = Ragged(np.zeros(LENGTHS.sum()), np.cumsum(LENGTHS))
    split: Any = SimpleNamespace(examples={"input_ids": ragged}, counts=np.ones(len(LENGTHS)))
    type_of_split = type("Split", (SimpleNamespace,), {"__len__": lambda self: len(LENGTHS)})
    split = type_of_split(**vars(split))
    plan = EvaluationPlan(LENGTHS, ranks.number, max_examples)

    def work(rank: int) -> Evaluation:
        accelerator: Any = SimpleNamespace(
            num_processes=ranks.number,
            process_index=rank,
            device=torch.device(device),
            gather=lambda tensor: ranks.gather(rank, tensor),
        )
        flag: Any = SimpleNamespace(is_raised=lambda: rank == asked_rank)
        batches = cast("Any", list(build_batches(plan, rank, task)))
        data = EvaluationData(split, plan, batches, Layout(pads_left=task.pads_left))
        return evaluate(accelerator, torch.nn.Identity(), cast("Any", task), data, "eval", flag)

    return ranks.run(work)


@pytest.mark.parametrize("num_rounds", [1, 3, 16])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize(("is_ragged", "pads_left"), [(False, False), (True, False), (True, True)])
def test_every_rank_has_every_result_in_the_order_of_the_data(
    monkeypatch: pytest.MonkeyPatch, num_rounds: int, num_processes: int, is_ragged: bool, pads_left: bool
) -> None:
    monkeypatch.setitem(module._ROUNDS_PER_MESSAGE, "cpu", num_rounds)
    for found in evaluate_on(Ranks(num_processes), 4, Tagger(is_ragged, pads_left)):
        assert isinstance(found, Evaluation), found
        results, numbers = found.results, np.arange(len(LENGTHS))
        assert set(results) == {"number", "is_even", "score", *(["tag"] if is_ragged else [])}
        np.testing.assert_array_equal(results["number"], numbers)
        np.testing.assert_array_equal(results["is_even"], numbers % 2 == 0)
        assert results["is_even"].dtype == np.bool_
        np.testing.assert_array_equal(results["score"], np.repeat(numbers / 7, 3).reshape(-1, 3))
        losses = (torch.arange(len(LENGTHS)) / 3).numpy()
        assert found.metrics["eval_loss"] == losses.astype(np.float64).sum() / len(LENGTHS)
        for number, tags in enumerate(results.get("tag", [])):
            expected = number * 10 + np.arange(LENGTHS[number])
            np.testing.assert_array_equal(tags, expected[::-1] if pads_left else expected)


def test_sixteen_micro_batches_of_each_rank_are_one_collective_on_a_gpu() -> None:
    """61 examples in micro-batches of one on two ranks: 31 rounds."""
    ranks = Ranks(2)
    # The tensors are on the CPU, and the accelerator says that its device is a GPU.
    assert all(isinstance(found, Evaluation) for found in evaluate_on(ranks, 1, Tagger(False, False), device="cuda"))
    assert ranks.num_collectives == 2


def test_ranks_that_only_run_stand_ins_send_padding() -> None:
    found = evaluate_on(Ranks(3), 64, Tagger(True, False))
    assert all(isinstance(each, Evaluation) for each in found), found


@pytest.mark.parametrize("num_rounds", [1, 16])
def test_a_rank_that_is_asked_stops_all(monkeypatch: pytest.MonkeyPatch, num_rounds: int) -> None:
    monkeypatch.setitem(module._ROUNDS_PER_MESSAGE, "cpu", num_rounds)
    ranks = Ranks(2)
    assert all(isinstance(each, StopRequested) for each in evaluate_on(ranks, 1, Tagger(False, False), asked_rank=1))
    assert ranks.num_collectives == 1


def test_nothing_waits_for_the_device_but_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._ROUNDS_PER_MESSAGE, "cpu", 16)
    copies: list[int] = []
    cpu = torch.Tensor.cpu

    def note(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(len(tensor))
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", note)
    waits = HostWaits()
    ragged = Ragged(np.zeros(LENGTHS.sum()), np.cumsum(LENGTHS))
    split = type("Split", (SimpleNamespace,), {"__len__": lambda self: len(LENGTHS)})(
        examples={"input_ids": ragged}, counts=np.ones(len(LENGTHS))
    )
    task, plan = Tagger(True, False), EvaluationPlan(LENGTHS, 1, 1)
    accelerator: Any = SimpleNamespace(
        num_processes=1, process_index=0, device=torch.device("cpu"), gather=lambda tensor: tensor
    )
    data = EvaluationData(split, plan, cast("Any", list(build_batches(plan, 0, task))), Layout())
    with waits:
        evaluate(accelerator, torch.nn.Identity(), cast("Any", task), data, "eval")
    assert waits.places == []
    assert len(copies) == 4, "61 micro-batches in messages of 16"
