"""The page of one run: whole, self-contained, and never a way into the browser of who opens it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from onecurve.launcher.errors import Unsuitable
from onecurve.launcher.views.charts import choose_ticks, draw_chart, smooth, thin_out
from onecurve.launcher.views.report import write_report
from tests.launcher.conftest import Onecurve
from tests.messages import naming

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
        "eval accuracy 0.8000",
        "restarts 1",
        "seed 7 flag",
        "topology strategy DDP",
    ):
        assert told in text, told
    assert page.tags.count("svg") == 5  # Loss, learning rate, gradient norm, rate, accuracy.
    assert dict(page.attributes).keys().isdisjoint({"src", "href", "onload", "onerror"})


def test_a_hostile_run_is_only_text(hostile_run: Path) -> None:
    path = write_report(hostile_run)
    raw = path.read_text(encoding="utf-8")
    page = _StrictParser(raw)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count("document.title='owned'") >= 12
    assert "http" not in raw.replace("http-equiv", "")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser: apt-get install chromium")
def test_a_browser_runs_nothing_of_it(hostile_run: Path) -> None:
    page = write_report(hostile_run).as_uri()
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={hostile_run / 'browser'}"]
    result = subprocess.run(
        ["chromium", *options, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True
    )
    title = re.search(r"<title>(.*?)</title>", result.stdout, re.DOTALL)
    assert title is not None
    assert title[1].startswith("a&lt;b&gt;: &lt;/title&gt;"), "the script would have renamed the page"
    assert result.stdout.count("<svg") >= 5


def test_the_last_samples_are_shown(write_run: Callable[..., Path]) -> None:
    run = write_run("a")
    lines = [
        {"step": step, "row": row, "prompt": f"p{row}", "generated": f"g{step}-{row}", "reference": "r"}
        for step in (10, 20)
        for row in (3, 4)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = _StrictParser(write_report(run).read_text(encoding="utf-8")).text
    assert re.findall(r"\bg\d+-\d\b", text) == ["g20-3", "g20-4"]


def test_a_run_without_a_step_has_a_page(write_run: Callable[..., Path]) -> None:
    run = write_run("a", state="running")
    (run / "metrics.jsonl").unlink()
    assert "<svg" not in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.3, 0.3, [0.3, 0.305, 0.31, 0.315, 0.32, 0.325, 0.33]),
        (-3, 12, [-5, 0, 5, 10, 15]),
        (0, 0, [0, 0.02, 0.04, 0.06, 0.08, 0.1]),
    ],
)
def test_ticks_are_round_and_hold_the_range(low: float, high: float, expected: list[float]) -> None:
    assert choose_ticks(low, high) == pytest.approx(expected)


def test_a_long_curve_keeps_its_spikes() -> None:
    points = [(float(step), math.sin(step / 1e4)) for step in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    thin = thin_out(points)
    assert len(thin) <= 601
    assert (77_777.0, 50.0) in thin
    assert thin == sorted(thin)
    assert smooth([(1, 1.0), (2, 4.0), (3, 1.0)], 1) == [(1, 2.5), (2, 2.0), (3, 2.5)]


def test_points_are_drawn_where_they_belong() -> None:
    chart = draw_chart("loss", (1, 3), [(1, 0.0), (3, 1.0)], [])
    assert '<polyline points="62,212 628,12" class="strong"/>' in chart


def test_a_page_that_cannot_be_written_is_told(write_run: Callable[..., Path]) -> None:
    run = write_run("a")
    (run / "report.html").mkdir()
    with pytest.raises(Unsuitable, match=naming(str(run / "report.html"), "Is a directory")):
        write_report(run)
    assert not list(run.glob(".report.html.*"))
