"""The random numbers of masks: known answers of the generator, and statistics of what is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from onecurve.training.data.plan import Placement
from onecurve.training.models.example_masks import ExampleMasks
from onecurve.training.models.philox import Boxes, fill
from onecurve.training.models.philox_torch import compute_words, fill_on_device

CPU = torch.device("cpu")
_ROUND, _MASK = (0xD2E7470EE14C6C93, 0xCA5A826395121157), 2**64 - 1
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def compute_block(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x64-10 as the paper has it, in Python's integers (Salmon et al. 2011, section 3.3)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * _ROUND[0], c2 * _ROUND[1]
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & _MASK, (p0 >> 64) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def test_the_generator_in_the_test_gives_the_known_answers_of_its_authors() -> None:
    """Of kat_vectors of Random123, all zeros."""
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert compute_block((0, 0, 0, 0), (0, 0)) == known


def test_numbers_are_those_of_block_example_and_row() -> None:
    key = (2**63 + 5, 7)
    boxes = Boxes(np.array([4, 9]), np.array([0, 1]), np.array([[1, 70], [1, 3]]), np.array([2, 80]))
    numbers = np.zeros(90, np.int8)
    fill(numbers, boxes, key)
    for example, row, start, count in ((4, 0, 2, 70), (9, 1, 80, 3)):
        words = [word for block in (1, 2, 3) for word in compute_block((block, example, row, 0), key)]
        expected = b"".join(word.to_bytes(8, "little") for word in words)[:count]
        assert numbers[start : start + count].tobytes() == expected
    assert not numbers[:2].any()
    assert not numbers[72:80].any()
    assert not numbers[83:].any()


@pytest.mark.parametrize("width", [np.int8, np.int16])
@pytest.mark.parametrize(
    "boxes",
    [
        Boxes(np.array([4, 2**40, 7]), np.array([0, 1, 0]), np.array([[1, 70], [1, 64], [1, 3]]), np.array([2, 80, 150])),
        Boxes(np.arange(4), np.zeros(4, int), np.array([[5, 5], [5, 5], [9, 9], [7, 7]]), np.arange(4) * 243, 3, (9, 9)),
        Boxes(np.arange(2), np.zeros(2, int), np.array([[9, 9], [9, 9]]), np.arange(2) * 3 * 35, 3, (5, 7)),
        Boxes(np.arange(2), np.zeros(2, int), np.array([[5, 5], [9, 9]]), np.array([40, 243]), 3, (9, 9)),
    ],
    ids=["in one piece", "attention", "smaller than its boxes", "padded on the left"],
)  # fmt: skip
def test_torchs_operations_give_the_bits_of_numpy(boxes: Boxes, width: Any) -> None:
    for key in ((0, 1), (2**64 - 1, 12345)):
        numbers = np.zeros(1000, width)
        fill(numbers, boxes, key)
        found = torch.zeros(1000, dtype=torch.from_numpy(numbers).dtype)
        fill_on_device(found, boxes, key)
        assert numbers.any()
        assert torch.equal(found, torch.from_numpy(numbers))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compiler_gives_the_bits_of_numpy() -> None:
    """As on a GPU, where each operation would else be a kernel of its own."""
    compiled = torch.compile(compute_words, dynamic=True)
    for count in (1000, 5000):
        boxes = Boxes(np.array([9, 2**40]), np.array([0, 1]), np.full((2, 2), (1, count)), np.array([0, count]))
        numbers, found = np.zeros(2 * count, np.int8), torch.zeros(2 * count, dtype=torch.int8)
        fill(numbers, boxes, (2**63, 3))
        fill_on_device(found, boxes, (2**63, 3), compiled)
        assert torch.equal(found, torch.from_numpy(numbers))


def draw(
    shape: Sequence[int], probability: float = 0.3, site: int = 1, step: int = 0, seed: int = 1, first: int = 0
) -> torch.Tensor:
    """What is dropped, less its expectation, divided by its standard deviation."""
    masks = ExampleMasks(seed, step, range(first, first + shape[0]), Placement())
    dropped = (masks.draw(site, shape, probability, CPU) == 0).double()
    return (dropped - probability) / math.sqrt(probability * (1 - probability))


@pytest.mark.parametrize("probability", [0.001, 1 / 64, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_each_element_is_dropped_as_often_as_was_asked(probability: float) -> None:
    """Over steps, within four standard deviations: of all decisions, and at each place."""
    num_steps, shape = 1500, (4, 64)
    dropped = torch.stack([draw(shape, probability, step=step) for step in range(num_steps)])
    # The limit of a byte is rounded for each step and site: at most half of 1/256, in units of the deviation above.
    rounding = 0 if probability in (0.001, 0.999) else 0.5 / 256 / math.sqrt(probability * (1 - probability))
    assert abs(float(dropped.mean())) < 4 * math.sqrt(1 / dropped.numel() + rounding**2 / num_steps)
    # The largest of 256 places: beyond 4.8 deviations once in 2,500 sets of them.
    assert float(dropped.mean(dim=0).abs().max()) < (4.8 if probability > 0.001 else 7) / math.sqrt(num_steps)


def correlate(one: torch.Tensor, other: torch.Tensor) -> float:
    """Correlation in units of its standard deviation where there is none."""
    return abs(float((one * other).sum())) / math.sqrt(one.numel())


@pytest.mark.parametrize("distance", [1, 2, 7, 8, 16, 31, 32, 64, 4096])
def test_places_of_an_example_are_independent(distance: int) -> None:
    dropped = draw((1, 2**18), 0.25).flatten()
    assert correlate(dropped[:-distance], dropped[distance:]) < 4


@pytest.mark.parametrize(
    "other",
    [{"first": 1}, {"first": 2**32}, {"site": 2}, {"site": 257}, {"step": 1}, {"step": 1000}, {"seed": 2}],
    ids=str,
)
def test_examples_sites_steps_and_seeds_are_independent(other: dict[str, int]) -> None:
    shape = (1, 2**18)
    one, two = draw(shape, 0.25), draw(shape, 0.25, **other)
    assert not torch.equal(one, two)
    assert correlate(one, two) < 4


def test_heads_and_queries_are_independent() -> None:
    masks = ExampleMasks(1, 0, range(2), Placement(np.array([200, 180]), frozenset({200})))
    dropped = (masks.draw(1, (2, 4, 200, 200), 0.25, CPU) == 0).double()[:, :, :180, :180]
    dropped = (dropped - 0.25) / math.sqrt(0.1875)
    pairs = [
        (dropped[:, 0], dropped[:, 1]), (dropped[:, 1], dropped[:, 3]), (dropped[0], dropped[1]),
        (dropped[..., :-1, :], dropped[..., 1:, :]), (dropped, dropped.transpose(2, 3).triu(1)),
    ]  # fmt: skip
    for one, two in pairs:
        assert correlate(one.contiguous(), two.contiguous()) < 4


def test_an_example_has_the_same_attention_in_any_padding_and_in_a_run_of_its_own() -> None:
    def draw_with(examples: list[int], lengths: list[int], first_row: int | None = None) -> torch.Tensor:
        longest = max(lengths)
        masks = ExampleMasks(1, 0, examples, Placement(np.array(lengths), frozenset({longest})))
        size = (1, 3, 5, 5) if first_row is not None else (len(lengths), 3, longest, longest)
        return masks.draw(1, size, 0.5, CPU, first_row)

    alone = draw_with([7], [5])[0]
    assert torch.equal(draw_with([2, 7], [9, 5])[1, :, :5, :5], alone)
    assert torch.equal(draw_with([2, 7], [9, 5], first_row=1)[0], alone)
    assert not torch.equal(draw_with([2, 8], [9, 5])[1, :, :5, :5], alone)


def test_choices_of_an_example_have_masks_of_their_own() -> None:
    masks = ExampleMasks(1, 0, [3, 4], Placement(rows_per_example=2))
    kept = masks.draw(1, (4, 64), 0.5, CPU)
    assert len({tuple(row.tolist()) for row in kept}) == 4
    other = ExampleMasks(1, 0, [4], Placement(rows_per_example=2)).draw(1, (2, 64), 0.5, CPU)
    assert torch.equal(kept[2:], other)
