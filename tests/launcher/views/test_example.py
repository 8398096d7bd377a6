"""An example is shown so that people see what is learned, in colour and without."""

from __future__ import annotations

from onecurve.launcher.views.example import format_example


def test_targets_stand_in_brackets_and_in_green() -> None:
    text = format_example([("Say", False), ("\n", False), ("It", True), (" is", True), ("<end>", False)])
    assert text.plain == "Say|\\n⟦It| is⟧<end>"
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans] == [
        ("Say|\\n", "dim"),
        ("⟦It| is⟧", "green"),
        ("<end>", "dim"),
    ]
