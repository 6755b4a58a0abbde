"""The page: one file, no network, a mark for every op, and axes that hold their values."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import moec
from moec import targets
from moec.files import NotWritten
from moec.passes.planning import Options, make_plan
from moec.passes.planning.page import write_page
from moec.passes.planning.plots import linear_axis, log_axis, roofline


def test_the_page_holds_its_plots_and_loads_nothing(tmp_path: Path) -> None:
    module = moec.trace("deepseek-v2-lite").ir
    plan = make_plan(module, targets.load("h800"), Options(batch=16, chunk=4096))
    path = tmp_path / "plan.html"
    write_page(path, "deepseek-v2-lite <x>", module, [plan])
    text = path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.html"]
    assert "{{" not in text
    assert "deepseek-v2-lite &lt;x&gt; on h800" in text
    assert not re.search(r"(src|href)\s*=|@import|url\(", text)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 6  # roofline and breakdown of two phases, two curves over the batch
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_a_point_lies_under_the_roof() -> None:
    module = moec.trace("deepseek-v2-lite").ir
    phase = make_plan(module, targets.load("h800"), Options(batch=16, chunk=4096)).phases["prefill"]
    root = ElementTree.fromstring(roofline(phase))
    circles = root.findall("circle")
    shown = [op for op in phase.ops if op.cost.flops and op.cost.bytes and not op.communication]
    assert len(circles) == len(shown)
    top = min(float(p.split(",")[1]) for line in root.findall("polyline") for p in line.attrib["points"].split())
    assert all(float(c.attrib["cy"]) >= top - 0.1 for c in circles)


@pytest.mark.parametrize("high", [0.003, 0.7, 1.0, 9.99, 1234.0])
def test_linear_axes_end_just_above_the_value(high: float) -> None:
    axis = linear_axis(high, 0, 100)
    assert high <= axis.high <= 2 * high
    assert 2 <= len(axis.ticks) <= 7
    assert axis.at(axis.high) == 100


def test_log_axes_span_the_values() -> None:
    axis = log_axis(0.03, 5000, 0, 100)
    assert (axis.low, axis.high) == pytest.approx((0.01, 10000))
    assert axis.at(1) == pytest.approx(100 / 3)


def test_an_unwritable_page_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotWritten, match="No such file"):
        write_page(tmp_path / "no" / "plan.html", "m", moec.trace("deepseek-v2-lite").ir, [])
