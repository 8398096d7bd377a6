"""The verdicts of the conformance page: each can fail, and Onecurve's side runs at tiny size."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import conformance
from benchmarks import conformance_alignment as alignment
from benchmarks.conformance import Verdict, build_rows, format_page
from benchmarks.conformance_chats import CHATS, INVALID, build_chat_model, chats_of_onecurve, is_resumed_exactly
from benchmarks.conformance_curve import NO_TARGET, TOPOLOGIES, Curve
from benchmarks.invariance import build_data
from tools.launches import LaunchServer

CURVE = Curve([2.0, 1.5, 1.0], [0.5, 0.4, 0.3], [1e-3, 5e-4, 0.0], 1.0, 1.0, 61)

Check = Callable[[conformance.Curves], Verdict]


def count(curves: conformance.Curves) -> Verdict:
    return conformance.check_count(curves, 61)


@pytest.mark.parametrize(
    ("check", "other"),
    [
        (conformance.check_gradients, replace(CURVE, grad_norms=[0.5, 0.4, 0.31])),
        (conformance.check_rates, replace(CURVE, rates=[1e-3, 5.1e-4, 0.0])),
        (count, replace(CURVE, num_evaluated=64)),
        (conformance.check_eval_loss, replace(CURVE, eval_loss=1.0001)),
        (conformance.check_invariance, replace(CURVE, losses=[2.0, 1.506, 1.0])),
        (conformance.check_invariance, replace(CURVE, losses=[2.002, 1.502, 1.002])),
        (conformance.check_invariance, replace(CURVE, losses=[2.0, 1.5], grad_norms=[0.5, 0.4])),
    ],
)
def test_a_deviation_of_one_topology_is_seen(check: Check, other: Curve) -> None:
    curves = dict.fromkeys(TOPOLOGIES, CURVE)
    assert check(curves).holds
    assert not check({**curves, (2, 4): other}).holds


def test_the_alignment_is_of_accumulation() -> None:
    curves = dict.fromkeys(TOPOLOGIES, CURVE)
    assert conformance.check_alignment(curves, num_steps=3).holds
    assert not conformance.check_alignment(
        {**curves, (1, 4): replace(CURVE, losses=[2.02, 1.5, 1.0])}, num_steps=3
    ).holds


def test_the_alignment_holds_and_the_old_fault_is_seen() -> None:
    right = {"whole": [5.0, 4.0], "cut": [5.001, 4.0], "broken": [5.8, 4.1]}
    assert alignment.is_aligned(right)
    assert alignment.is_seen_broken(right)
    assert not alignment.is_aligned({**right, "cut": [5.0, 4.02]})
    assert not alignment.is_seen_broken({**right, "broken": [5.6, 4.6]})
    assert not alignment.is_seen_broken({**right, "broken": [9.0, 8.0]}), "in the mean they part by a fifth"
    rows = conformance.build_alignment_rows({"Onecurve": right, "accelerate": {"whole": [5.0], "cut": [7.0]}})
    assert [row[2:] for row in rows] == [
        ["holds: 1.0e-03", "-", "-", "**fails**: 2.0e+00"],
        ["holds: 8.0e-01", "-", "-", "-"],
    ]


def test_what_is_not_measured_is_no_verdict() -> None:
    rows = build_rows({"decoder": {"Onecurve": dict.fromkeys(TOPOLOGIES, replace(CURVE, losses=[1.0] * 5))}}, {}, 60)
    assert {len(row) for row in rows} == {2 + len(conformance.WAYS)}
    assert [row[3:] for row in rows] == [["-"] * 3] * len(rows)
    assert rows[3][2] == "**fails**: 61 of 60"
    assert " | ".join(rows[3]) in format_page(rows, 3)


def test_chats_are_prepared_as_torchtitan_asks(demo: Path, tmp_path: Path) -> None:
    chats = chats_of_onecurve(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(build_chat_model(tmp_path))
    assert chats.has_only_answers(tokenizer)
    assert chats.is_shifted_once()
    assert chats.begins_anew()
    assert chats.packed_deviation < 1e-5
    assert list(chats.refused) == list(INVALID)
    assert is_resumed_exactly()

    # The checks can fail.
    shifted = [(tokens, [*labels[1:], NO_TARGET]) for tokens, labels in chats.rows]
    assert not replace(chats, rows=shifted).is_shifted_once()
    assert not replace(chats, rows=[(tokens, tokens) for tokens, _ in chats.rows]).has_only_answers(tokenizer)
    assert not replace(chats, positions=range(len(chats.positions))).begins_anew()
    model = AutoModelForCausalLM.from_pretrained(build_chat_model(tmp_path)).eval()
    first, second = (torch.tensor([tokens]) for tokens, _ in chats.rows[:2])
    with torch.no_grad():
        together = model(torch.cat([first, second], dim=1)).logits[0, first.shape[1] :]
        assert (together - model(second).logits[0]).abs().max() > 0.1, f"of {len(CHATS)} chats one would see another"


@pytest.mark.slow
def test_onecurve_holds_what_others_ask_of_themselves(demo: Path, tmp_path: Path, launch_server: LaunchServer) -> None:
    build_data(tmp_path)
    launch = conformance.launch_by(launch_server, tmp_path)
    curves = {
        topology: conformance.train_onecurve(launch, "decoder", tmp_path, 14, topology) for topology in ((1, 1), (2, 4))
    }
    for check in (conformance.check_gradients, conformance.check_rates, count, conformance.check_eval_loss):
        assert check(curves).holds, check
    assert conformance.check_invariance(curves).holds
    shutil.rmtree(tmp_path / "cache")
