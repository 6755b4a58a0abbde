"""`report.html`: what the page says, that it is sound HTML without network, and how a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from wrong_passes import SMALL

import moec
from moec.ir import Module
from moec.passes.base import Context, Outcome
from moec.passes.canonicalise import Canonicalise
from moec.passes.op_times import op_times, step_us

VOID = {"meta", "input", "link", "br", "img"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Tags balanced or closed implicitly by the standard's rules, ids once, texts by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()
        self.section = ""
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == ["html"] or not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        if given.get("id"):
            self.ids[str(given["id"])] += 1
        if tag == "h2":
            self.section = str(given.get("id"))
        for name in ("href", "src"):
            if given.get(name):
                self.links.append(str(given[name]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data + " "


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """DeepSeek-V3's decode step on 144 H800, and its plan."""
    folder = tmp_path_factory.mktemp("decode")
    return folder, moec.trace("deepseek-v3").optimize("h800-ep144", phase="decode", dump=folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The small model on this CPU with measured numerics."""
    folder = tmp_path_factory.mktemp("small")
    traced = moec.trace("tiny-deepseek-v3", SMALL)
    return folder, traced.optimize("cpu", context=64, chunk=16, verify="numerics", dump=folder)


@pytest.fixture(params=["decode", "small"])
def dumped(request: pytest.FixtureRequest) -> tuple[Path, Any]:
    found: tuple[Path, Any] = request.getfixturevalue(request.param)
    return found


def test_the_page_is_sound_and_stands_alone(dumped: tuple[Path, Any]) -> None:
    text = (dumped[0] / "report.html").read_text()
    page = Page(text)
    assert max(page.ids.values()) == 1
    inside = [link for link in page.links if not link.startswith("data:image/")]
    assert inside and all(link.startswith("#") and link[1:] in page.ids for link in inside)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"\{\{[A-Z]+\}\}", text)


def test_it_answers_where_low_precision_came_in_and_what_it_costs(decode: tuple[Path, Any]) -> None:
    """The pass is linked, weights and predicted steps stand before and after it, and casts are priced."""
    folder, plan = decode
    answers = Page((folder / "report.html").read_text()).texts["answers"]
    number = [r.name for r in plan.records].index("fp8-cast") + 1
    assert f"FP8 (E4M3) came in with pass {number}, fp8-cast" in " ".join(answers.split())
    assert "quantising activations, decode" in answers
    assert "an element is rounded by at most 6.25%" in answers
    scheduled, total = step_us(plan.ir, op_times(plan.ir, plan.context), "decode")
    assert scheduled < 0.8 * total
    assert f"One step of decode takes {scheduled / 1e3:.2f} ms" in answers
    assert f"hidden as pass {len(plan.records)}, overlap found" in " ".join(answers.split())
    assert f"one op after the other it would be {total / 1e3:.2f} ms" in answers
    assert "Kept in 16 bits or more: embed, rope_table" in " ".join(answers.split())
    assert "no prediction" not in answers


def test_measured_numerics_are_told(small: tuple[Path, Any]) -> None:
    folder, plan = small
    page = Page((folder / "report.html").read_text())
    moved = next(r.moved for r in plan.records if r.name == "fp8-cast")
    assert 0.02 < moved < 0.2
    assert f"results moved by {moved:.2g} (relative, measured" in page.texts["answers"]
    assert page.texts["summary"].count("results moved by") == len(plan.records)


def test_every_op_is_in_the_table_and_in_a_picture(dumped: tuple[Path, Any]) -> None:
    folder, plan = dumped
    text = (folder / "report.html").read_text()
    ops = list(plan.ir.ops())
    assert text.count('<rect class="op') == len(ops)
    assert text.count('<details class="graph"') == len(plan.ir.functions)
    table = text[text.index('id="optable"') : text.index('id="weights"')]
    assert table.count("<tr>") == len(ops) + 1
    assert "unknown" not in table


def test_boxes_of_a_picture_do_not_overlap(dumped: tuple[Path, Any]) -> None:
    text = (dumped[0] / "report.html").read_text()
    for picture in re.findall(r"<svg.*?</svg>", text, re.S):
        boxes = [
            tuple(map(int, b)) for b in re.findall(r'<rect class="op[^>]*x="(-?\d+)" y="(\d+)" width="(\d+)"', picture)
        ]
        for i, (x, y, width) in enumerate(boxes):
            assert not any(y == v and abs(x - u) < width for u, v, _ in boxes[i + 1 :])


def test_a_crash_keeps_the_passes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Canonicalise, module: Module, ctx: Context) -> Outcome:
        if calls:
            raise MemoryError
        calls.append(1)
        return Outcome(notes=["first time"])

    calls: list[int] = []
    monkeypatch.setattr(Canonicalise, "run", crash)
    with pytest.raises(MemoryError):
        moec.trace("tiny-deepseek-v3", SMALL).optimize("cpu", context=64, chunk=16, dump=tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "first time" in page.texts["summary"]
    assert "select-kernels" in page.texts["summary"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)")
def test_a_browser_shows_it(dumped: tuple[Path, Any], tmp_path: Path) -> None:
    """The script runs (the pass in the address stands open, all others closed) and the screenshot is a full page."""
    address = f"file://{dumped[0] / 'report.html'}#pass4"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--window-size=1500,2000"]
    shown = subprocess.run(
        [str(CHROMIUM), *options, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert re.search(r'<details class="pass" id="pass4"[^>]* open', shown)
    assert not re.search(r'<details class="pass" id="pass3"[^>]* open', shown)
    picture = tmp_path / "report.png"
    subprocess.run(
        [str(CHROMIUM), *options, f"--screenshot={picture}", address.partition("#")[0]],
        capture_output=True,
        timeout=120,
        check=True,
    )
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1500, 2000)
    assert len(data) > 50_000, "an empty page compresses to less"
