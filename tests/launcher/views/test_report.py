"""The page of one run: whole, self-contained, and never a way into the browser of who opens it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from onecurve.launcher.errors import Unsuitable, UsageError
from onecurve.launcher.facts.history import load_history
from onecurve.launcher.facts.results import Confusion, list_confusions, load_results, load_starts, normalize
from onecurve.launcher.views.charts import Chart, Series, choose_ticks, draw_chart, find_limit, smooth, thin_out
from onecurve.launcher.views.figures import draw_confusion
from onecurve.launcher.views.report import write_report
from onecurve.launcher.views.report_facts import split_settings, tabulate_starts
from tests.launcher.conftest import Onecurve
from tests.messages import names, naming

_HOSTILE = "</title></script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'"
_VOID = {"meta", "br", "img"}


class _StrictParser(HTMLParser):
    """Every element is closed in order; keeps tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


@pytest.fixture
def hostile_run(write_run: Callable[..., Path]) -> Path:
    """A run in which every name is an attack."""
    run = write_run("a<b>", text_column=_HOSTILE, model_name_or_path=[_HOSTILE])
    (run / "environment.json").write_text(json.dumps({"topology": {_HOSTILE: _HOSTILE}}), encoding="utf-8")
    (run / "status.json").write_text(json.dumps({"state": _HOSTILE, "message": _HOSTILE}), encoding="utf-8")
    row = {"precision": 1.0, "recall": 0.5, "f1-score": 0.7, "support": 3}
    (run / "eval_report.json").write_text(json.dumps({"per_class": {_HOSTILE: row}}), encoding="utf-8")
    sample = {"step": 20, **dict.fromkeys(("row", "prompt", "generated", "reference"), _HOSTILE)}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"event": "eval", "step": 20, "eval_loss": 0.5, f"eval_{_HOSTILE}": 1.0}))
        file.write("\n" + json.dumps({"event": "test", "step": 20, f"test_{_HOSTILE}": 1.0}) + "\n")
    return run


def test_the_page_tells_the_run(write_run: Callable[..., Path], onecurve: Onecurve) -> None:
    run = write_run("mine", num_starts=2, seed=7)
    (run / "config.yaml").write_text("seed: 7  # flag\nlabel_column: a  # b  # recipe\n", encoding="utf-8")
    result = onecurve("report", run, "--json")
    assert json.loads(result.stdout) == {"report": str(run / "report.html")}
    page = _StrictParser((run / "report.html").read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", page.text)
    for told in (
        "mine finished",
        "accuracy 0.8000",
        "restarts 1",
        "seed 7 flag",
        "2 processes (CPU, DDP)",
    ):
        assert told in text, told
    charts = {value for name, value in page.attributes if name == "aria-label"}
    assert {name.split()[0] for name in charts if name} == {
        "loss", "accuracy", "learning", "gradient", "tokens", "peak", "padding,",
    }  # fmt: skip
    assert dict(page.attributes).keys().isdisjoint({"src", "href", "onload", "onerror"})


def test_a_hostile_run_is_only_text(hostile_run: Path) -> None:
    path = write_report([hostile_run])
    raw = path.read_text(encoding="utf-8")
    page = _StrictParser(raw)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count("document.title='owned'") >= 12
    assert "http" not in raw.replace("http-equiv", "")


@pytest.mark.parametrize(("steps", "expected"), [((10, 20), "20-3 20-4"), ((0, 10, 20), "0-3 20-3 0-4 20-4")])
def test_the_first_and_the_last_samples_are_shown(
    write_run: Callable[..., Path], steps: tuple[int, ...], expected: str
) -> None:
    run = write_run("a")
    lines = [
        {"step": step, "row": row, "prompt": f"p{row}", "generated": f"g{step}-{row}", "reference": "r"}
        for step in steps
        for row in (3, 4)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = _StrictParser(write_report([run]).read_text(encoding="utf-8")).text
    assert re.findall(r"\bg(\d+-\d)\b", text) == expected.split()


def test_pages_of_line_breaks_are_counted(write_run: Callable[..., Path]) -> None:
    run = write_run("a")
    lines = [
        {"step": step, "row": 0, "prompt": "p", "generated": written, "reference": "r"}
        for step, written in ((0, "\n" * 24), (20, "one\n\ntwo" + "\n" * 17 + "three"))
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    page = write_report([run]).read_text(encoding="utf-8")
    assert "\n" * 17 not in page
    text = _StrictParser(page).text
    assert names(text, "24", "17", "one\n\ntwo", "three")


def test_an_average_is_no_class(write_run: Callable[..., Path]) -> None:
    run, row = write_run("a"), {"precision": 1.0, "recall": 0.5, "f1-score": 0.7, "support": 3}
    (run / "eval_report.json").write_text(json.dumps({"per_class": {"PER": row, "micro avg": row}}), encoding="utf-8")
    assert [each.name for each in load_results(run).classes] == ["PER"]


def test_several_runs_are_drawn_over_each_other(write_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [write_run("a", learning_rate=1e-3), write_run("b<i>", 10, learning_rate=2e-3)]
    path = write_report(runs, tmp_path / "page.html")
    page = _StrictParser(path.read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", page.text)
    assert names(text, "2 runs", "learning_rate 0.001 0.002", "steps 20 10", "final accuracy 0.8000 0.8000")
    assert "i" not in page.tags
    drawn = [value for name, value in page.attributes if name == "class" and value and value.startswith("strong run")]
    assert {"strong run0", "strong run1"} == set(drawn)


def test_a_file_that_is_no_report_is_not_replaced(write_run: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.html"
    path.write_text("my own page", encoding="utf-8")
    with pytest.raises(UsageError, match=naming(str(path), "--output")):
        write_report([write_run("a")], path)
    assert path.read_text(encoding="utf-8") == "my own page"
    path.unlink()
    assert write_report([tmp_path / "a"], path) == write_report([tmp_path / "a"], path), "its own is"


def test_settings_that_are_no_defaults_come_first(write_run: Callable[..., Path]) -> None:
    """Whoever set them: those of a resumed run are all from its config.yaml."""
    run = write_run("a", task="causal_lm", num_samples=3, max_new_tokens=128, lora_target_modules="all-linear")
    chosen, left = split_settings(load_history(run))
    assert [key for key, _, _ in chosen] == [
        "num_samples", "num_train_epochs", "output_dir", "seed", "task",
    ]  # fmt: skip
    assert ("max_new_tokens", "128") in left


def test_starts_are_listed_and_marked(write_run: Callable[..., Path]) -> None:
    run = write_run("a", num_starts=2)
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    (run / "environments").mkdir()
    first = {"start_step": 0, "topology": {"num_processes": 1, "strategy": "one process", "device": "cpu"}}
    (run / "environments" / "start_0001.json").write_text(json.dumps(first), encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({**environment, "start_step": 12}), encoding="utf-8")
    starts = load_starts(load_history(run))
    assert [row[:4] for row in tabulate_starts(starts)] == [["1", "0", "1", "one process"], ["2", "12", "2", "DDP"]]
    page = write_report([run]).read_text(encoding="utf-8")
    assert page.count(">start 2</text>") == page.count("over steps") > 4


@pytest.mark.parametrize("content", ["", "[]", '{"per_class": 3}', '{"labels": ["a"], "confusion_matrix": [[1, 2]]}',
                                     '{"calibration": {"bins": [{"low": 1}]}, "hardest": [1]}'])  # fmt: skip
def test_results_that_cannot_be_read_are_left_out(write_run: Callable[..., Path], content: str) -> None:
    run = write_run("a")
    (run / "eval_report.json").write_text(content, encoding="utf-8")
    results = load_results(run)
    assert (results.classes, results.confusion, results.calibration, results.hardest) == ([], None, None, [])
    assert write_report([run]).exists()


def test_a_confusion_matrix_is_normalized_by_label() -> None:
    confusion = Confusion(["a", "b<", "c"], [[3, 1, 0], [0, 0, 0], [2, 0, 6]])
    assert normalize(confusion.counts) == [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]]
    assert list_confusions(confusion, 2) == [("c", "a", 2, 0.25), ("a", "b<", 1, 0.25)]
    drawn = draw_confusion(confusion)
    assert drawn.count("<rect") == 9
    assert "c → a: 2, 25.0%" in drawn
    assert "b&lt;" in drawn
    assert "b<" not in drawn


def test_a_run_without_a_step_has_a_page(write_run: Callable[..., Path]) -> None:
    run = write_run("a", state="running")
    (run / "metrics.jsonl").unlink()
    assert "over steps" not in write_report([run]).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.3, 0.3, [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
        (-3, 12, [-5, 0, 5, 10, 15]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_hold_the_range(low: float, high: float, expected: list[float]) -> None:
    assert choose_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "limit", "expected"),
    [
        (0.97, 0.97, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1.0, 1.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.4, 0.97, 1.0, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        (0.998, 0.999, 1.0, [0.95, 0.96, 0.97, 0.98, 0.99, 1]),
        (0.013, 0.032, 1.0, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
        (0.0, 0.001, 1.0, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
        (81.0, 99.0, 100.0, [80, 85, 90, 95, 100]),
    ],
)
def test_no_score_is_drawn_beyond_its_limits(low: float, high: float, limit: float, expected: list[float]) -> None:
    assert find_limit([low, high], is_lower_better=False) == limit
    assert choose_ticks(low, high, limit=limit) == pytest.approx(expected)
    assert find_limit([low, high], is_lower_better=True) is None


def test_a_single_evaluation_has_its_value_beside_it() -> None:
    chart = draw_chart(Chart("accuracy", (1, 20), [Series(dots=[(20, 0.97)])], limit=1.0))
    assert ">0.9700</text>" in chart
    assert "evaluation" not in chart, "one point is no line"


def test_a_long_curve_keeps_its_spikes() -> None:
    points = [(float(step), math.sin(step / 1e4)) for step in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    thin = thin_out(points)
    assert len(thin) <= 601
    assert (77_777.0, 50.0) in thin
    assert thin == sorted(thin)
    assert smooth([(1, 1.0), (2, 4.0), (3, 1.0)], 1) == [(1, 2.5), (2, 2.0), (3, 2.5)]


def test_points_are_drawn_where_they_belong() -> None:
    chart = draw_chart(Chart("loss", (1, 3), [Series([(1, 0.0), (3, 1.0)])]))
    assert '<polyline points="58,190 508,18" class="strong"/>' in chart


def test_a_page_that_cannot_be_written_is_told(write_run: Callable[..., Path]) -> None:
    run = write_run("a")
    (run / "report.html").mkdir()
    with pytest.raises(Unsuitable, match=naming(str(run / "report.html"), "Is a directory")):
        write_report([run])
    assert not list(run.glob(".report.html.*"))
