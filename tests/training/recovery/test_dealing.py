"""Each process gets a share of a checkpoint; all know whose each tensor is."""

from __future__ import annotations

import random

import pytest

from onecurve.training.recovery.dealing import Dealing


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_none_gets_more_than_the_mean_and_one_tensor(num_processes: int, seed: int) -> None:
    drawn = random.Random(seed)
    sizes = {f"w{number}": drawn.choice((0, 4, 100, 5000, 10**6)) for number in range(60)}
    dealing = Dealing(range(num_processes))
    held = [0] * num_processes
    for name, size in sizes.items():
        held[dealing.deal("model.safetensors", name, size)] += size
    assert sum(held) == dealing.num_bytes["model.safetensors"] == sum(sizes.values())
    assert max(held) <= sum(sizes.values()) / num_processes + max(sizes.values())


def test_every_process_deals_in_the_same_way() -> None:
    sizes = {f"w{number}": (number * 7919) % 100 for number in range(200)}
    dealings = [Dealing((0, 1, 5)) for _ in range(3)]
    for name, size in sizes.items():
        assert len({dealing.deal("model.safetensors", name, size) for dealing in dealings}) == 1
    assert set(dealings[0].owners["model.safetensors"].values()) == {0, 1, 5}
    assert [dealings[0].find_part(rank) for rank in (0, 1, 2, 5)] == [0, 1, None, 2]


def test_moments_go_on_where_the_weights_ended() -> None:
    dealing = Dealing((0, 1))
    assert [dealing.deal("model.safetensors", "a", 10), dealing.deal("optimizer.safetensors", "a.exp_avg", 10)] == [
        0,
        1,
    ]


def test_what_is_converted_together_goes_to_one_process() -> None:
    dealing = Dealing((0, 1), group_of=lambda name: name.split(".")[0])
    owners = [dealing.deal("model.safetensors", name, 10) for name in ("a.q", "a.k", "b.q", "b.k")]
    assert owners == [0, 0, 1, 1]


def test_a_large_part_is_cut_into_pieces() -> None:
    dealing = Dealing((0, 3), piece_bytes=25)
    for name, size in (("a", 10), ("b", 10), ("c", 10), ("d", 10), ("e", 10), ("f", 10), ("g", 100), ("h", 5)):
        dealing.deal("model.safetensors", name, size)
    files = {name: dealing.find_file("model.safetensors", name) for name in "abcdefgh"}
    assert files == {
        "a": "model-00001-of-00002.safetensors",
        "c": "model-00001-of-00002.safetensors",
        "e": "model-00001-of-00002-2.safetensors",
        "g": "model-00001-of-00002-3.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "d": "model-00002-of-00002.safetensors",
        "f": "model-00002-of-00002-2.safetensors",
        "h": "model-00002-of-00002-2.safetensors",
    }
    dealing.deal("optimizer.safetensors", "a.exp_avg", 100)
    assert dealing.find_file("optimizer.safetensors", "a.exp_avg") == "optimizer-00002-of-00002.safetensors"
