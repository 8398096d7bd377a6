"""The report in a real browser: at three widths, light and dark, nothing sticks out, all can be read, and nothing is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.views.report import write_report
from tests.launcher.views.browser import Page, opened

WIDTHS = (390, 800, 1200)
_HOSTILE = "</title></script><script>document.title='owned'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>\"'"
_MANY_METRICS = [f"{kind}_{average}" for kind in ("precision", "recall", "f1") for average in ("macro", "weighted")]
# WCAG 2.2, 1.4.3: 4.5 to 1, and 3 to 1 for letters of 24 pixels, or of 18.66 in bold.
_CONTRAST = """
(() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n.length > 3 ? n[3] : 1]; };
  const mix = (top, share, below) => below.map((value, i) => top[i] * share + value * (1 - share));
  const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (color) => {
    const [r, g, b] = color.map((v) => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    const style = getComputedStyle(element), cell = element.previousElementSibling;
    if (element.parentElement?.tagName === 'g' && cell && cell.tagName === 'rect') {
      const fill = parse(getComputedStyle(cell).fill);
      return mix(fill, Number(getComputedStyle(cell).fillOpacity), behind(element.parentElement));
    }
    const own = parse(style.backgroundColor);
    return own[3] ? mix(own, own[3], behind(element.parentElement)) : behind(element.parentElement);
  };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.textContent.trim()).join('');
    if (!text || ['title', 'style'].includes(element.tagName)) continue;
    const style = getComputedStyle(element), color = parse(element.tagName === 'text' ? style.fill : style.color);
    const pair = [light(color), light(behind(element))].sort((a, b) => b - a), ratio = (pair[0] + .05) / (pair[1] + .05);
    const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    found.push([ratio / (isLarge ? 3 : 4.5), text.slice(0, 40), style.color, ratio]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()
"""
_TOO_WIDE = """
[...document.querySelectorAll('.scroll, table, dl, figure, p, li')]
  .filter((each) => each.scrollWidth > each.clientWidth + 1)
  .map((each) => each.tagName + '.' + each.className + ' ' + each.textContent.trim().slice(0, 60))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser for all tests of this file: its start takes longer than they do."""
    with opened(tmp_path_factory.mktemp("browser")) as found:
        yield found


def write_results(run: Path, num_classes: int, word: str = "class") -> None:
    """Every kind of result that a page draws, with this many classes, in words of the kind that is given."""
    names = [f"{word} {number}" for number in range(num_classes)]
    matrix = [
        [40 if row == column else (row * column) % 7 * (abs(row - column) < 3) for column in range(num_classes)]
        for row in range(num_classes)
    ]
    for row, share in enumerate((56, 57, 70, 71, 99)):  # Letters lie on cells of every color, and where it changes.
        matrix[row] = [0] * num_classes
        matrix[row][row], matrix[row][(row + 1) % num_classes] = share, 100 - share
    report = {
        "labels": names,
        "confusion_matrix": matrix,
        "per_class": {
            name: {"precision": 0.9, "recall": 0.5, "f1-score": number / num_classes, "support": 12_345}
            for number, name in enumerate(names)
        },
        "calibration": {
            "of": word,
            "error": 0.125,
            "bins": [
                {
                    "low": low / 10,
                    "high": (low + 1) / 10,
                    "count": 10 * low,
                    "probability": low / 10 + 0.05,
                    "share": 0.8,
                }
                for low in range(2, 10)
            ],
        },
        "hardest": [
            {
                "example": number,
                "loss": 9.5 - number,
                "text": f"{word} " * 40,
                "label": names[0],
                "prediction": "x" * 90,
            }
            for number in range(20)
        ],
    }
    (run / "eval_report.json").write_text(json.dumps(report), encoding="utf-8")
    samples = [
        {"step": step, "row": row, "prompt": word * 3, "generated": f"{word} at {step}", "reference": "y" * 200}
        for step in (0, 20)
        for row in range(2)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples), encoding="utf-8")
    line = {"event": "eval", "step": 20, "eval_loss": 0.5, **{f"eval_{name}": 0.97531 for name in _MANY_METRICS}}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(line) + "\n" + json.dumps({**line, "event": "test", f"test_{word}": 0.5}) + "\n")


def write_starts(run: Path, word: str) -> None:
    """Two starts on other machines, and what the training data is."""
    split = {"origin": f"{word}/data.jsonl", "examples": 12_345, "mean_tokens": 48.5, "longest": 512}
    environment = {
        "num_starts": 2, "start_step": 0, "parameters": 22_700_000, "trained_parameters": 300_000,
        "topology": {"num_processes": 4, "num_machines": 2, "strategy": word, "device": "cuda", "device_name": word},
        "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
        "data": {"train": {**split, "histogram": [3, 0, 40, 7]}, "validation": split},
    }  # fmt: skip
    (run / "environments").mkdir()
    (run / "environments" / "start_0001.json").write_text(json.dumps(environment), encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({**environment, "start_step": 11}), encoding="utf-8")


@pytest.fixture(params=["hostile", "5 classes", "50 classes", "three runs"])
def address(request: pytest.FixtureRequest, write_run: Callable[..., Path], tmp_path: Path) -> str:
    """A page of each kind."""
    word = _HOSTILE if request.param == "hostile" else "a label with a long name"
    run = write_run("a<b>" if request.param == "hostile" else "run", text_column=word, model_name_or_path=word * 2)
    write_results(run, 50 if request.param == "50 classes" else 5, word)
    write_starts(run, word)
    if request.param != "three runs":
        return write_report([run]).as_uri()
    others = [write_run(f"a_run_with_a_long_name_{number}", learning_rate=number * 1e-5) for number in range(2)]
    return write_report([run, *others], tmp_path / "runs.html").as_uri()


@pytest.mark.slow
def test_the_page_is_readable_at_every_width_and_loads_nothing(page: Page, address: str, tmp_path: Path) -> None:
    page.show(1200, "light")
    page.open(address)
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            page.show(width, scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            if width == WIDTHS[-1]:
                assert page.evaluate(_TOO_WIDE) == [], "nothing scrolls sideways"
            worst = page.evaluate(_CONTRAST)
            assert len(worst) > 50
            assert worst[0][0] >= 1, worst[:5]
        screenshot = tmp_path / f"{width}.png"
        page.take_screenshot(screenshot)
        assert struct.unpack(">I", screenshot.read_bytes()[16:20])[0] == width
    assert page.requests == [address], "the page alone was asked for"
    assert "owned" not in page.evaluate("document.title.split('<script')[0]")
    assert page.evaluate("document.querySelectorAll('script, img, iframe, link, object').length") == 0


def test_the_browser_sees_what_the_tests_look_for(page: Page, tmp_path: Path) -> None:
    """The checks above can fail: here is a page that does all of it."""
    bad: dict[str, Any] = {
        "request": "<img src='http://127.0.0.1:9/x.png'>",
        "width": "<p style='width:2000px'>wide</p>",
        "contrast": "<p style='color:#999;background:#fff'>gray</p>",
    }
    path = tmp_path / "bad.html"
    path.write_text(f"<html><body>{''.join(bad.values())}</body></html>", encoding="utf-8")
    page.show(390, "light")
    page.open(path.as_uri())
    assert "http://127.0.0.1:9/x.png" in page.requests
    assert page.evaluate("document.documentElement.scrollWidth") > 390
    assert page.evaluate(_CONTRAST)[0][0] < 1
