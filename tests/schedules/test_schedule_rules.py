"""Schedules changed by hand into something illegal are refused, with the ops and the reason."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from moec.ir import VerifyError, parse_module, print_module, verify

Text = Callable[..., str]


def refused(text: str) -> str:
    module = parse_module(text)
    with pytest.raises(VerifyError) as caught:
        verify(module)
    return str(caught.value)


def lines_with(text: str, word: str) -> list[int]:
    return [i for i, line in enumerate(text.splitlines()) if word in line]


def without(text: str, line: int) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(lines[:line] + lines[line + 1 :])


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_schedule_holds_and_round_trips(schedule_text: Text, phase: str) -> None:
    text = schedule_text(phase)
    module = parse_module(text)
    verify(module)
    assert print_module(module) == text


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_every_wait_is_needed(schedule_text: Text, phase: str) -> None:
    """Whichever wait is taken away, some op then uses what another stream may still compute, or a buffer too early."""
    text = schedule_text(phase)
    waits = lines_with(text, "event.wait")
    assert len(waits) >= 4
    for line in waits:
        assert re.search(r"without waiting for|reused too early", refused(without(text, line)))


def test_a_missing_wait_names_both_ops(schedule_text: Text) -> None:
    text = schedule_text()
    experts = next(i for i in lines_with(text, "moe.experts"))
    wait = max(i for i in lines_with(text, "event.wait") if i < experts)
    message = refused(without(text, wait))
    assert "moe.experts" in message and "comm.dispatch" in message
    assert "on stream compute uses what" in message and "on stream comm computes" in message
    assert "record an event" in message and "> " in message


def test_every_signal_is_needed(schedule_text: Text) -> None:
    text = schedule_text()
    for line in lines_with(text, "event.record"):
        assert re.search(r"event\S* \d+|without waiting|reused too early", refused(without(text, line)))


def test_rows_are_added_to_the_cache_before_they_are_read(schedule_text: Text) -> None:
    """Both orders keep every wait, on one stream: only one of them is what the model says."""
    lines = schedule_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if "cache.append" in line and "micro_batch = 1" in line)
    reader = next(i for i in range(at, len(lines)) if "attn.mla" in lines[i] and "micro_batch = 1" in lines[i])
    lines.insert(reader, lines.pop(at))
    message = refused("".join(lines))
    assert "adds rows to the cache behind" in message and "attn.mla" in message and "cache.append" in message


def test_a_wait_without_a_signal(schedule_text: Text) -> None:
    text = schedule_text()
    line = lines_with(text, "event.wait")[0]
    changed = text.splitlines(keepends=True)
    changed[line] = re.sub(r"event = \d+", "event = 99", changed[line])
    assert "waits for event 99, which nothing records" in refused("".join(changed))


def test_a_cycle_between_streams(schedule_text: Text) -> None:
    """Dispatch waits for what computation records only after it has waited for dispatch."""
    text = schedule_text()
    lines = text.splitlines(keepends=True)
    dispatch = lines_with(text, "comm.dispatch")[0]
    experts = next(i for i in lines_with(text, "moe.experts") if i > dispatch)
    indent = "    "
    lines.insert(experts + 1, f"{indent}event.record {{event = 90, stream = compute}}\n")
    lines.insert(dispatch, f"{indent}event.wait {{event = 90, stream = comm}}\n")
    message = refused("".join(lines))
    assert "streams wait for each other" in message
    assert "comm.dispatch" in message and "moe.experts" in message and "event.record 90" in message


def test_a_signal_that_comes_too_late(schedule_text: Text) -> None:
    text = schedule_text()
    lines = text.splitlines(keepends=True)
    dispatch = lines_with(text, "comm.dispatch")[0]
    lines.insert(dispatch + 1, "    event.record {event = 90, stream = comm}\n")
    lines.insert(dispatch, "    event.wait {event = 90, stream = compute}\n")
    assert "event 90, which is recorded only behind this line" in refused("".join(lines))


def test_a_buffer_reused_too_early(schedule_text: Text) -> None:
    """The shared expert is given the buffer that dispatch, beside it, reads."""
    text = schedule_text()
    lines = text.splitlines(keepends=True)
    routed = lines_with(text, "norm.add_rms")[-1]
    read = re.search(r"buffers = \[\d+, (\d+)\]", lines[routed])
    shared = next(i for i in lines_with(text, "shared.gate_up") if i > routed and "linear" in lines[i])
    assert read is not None
    lines[shared] = re.sub(r"buffers = \[\d+\]", f"buffers = [{read[1]}]", lines[shared])
    message = refused("".join(lines))
    assert f"buffer {read[1]} is reused too early" in message or f"has {read[1]}" in message
    assert "may still read it" in message or "still has to read" in message


def test_every_change_of_a_buffer_is_judged(schedule_text: Text) -> None:
    """All results in one buffer: two results of one op, or something that is still read."""
    text = re.sub(r"buffers = \[[^\]]*\]", lambda m: re.sub(r"\d+", "0", m[0]), schedule_text())
    text = re.sub(r"buffer_bytes = \[[^\]]*\]", "buffer_bytes = [999999999]", text)
    assert re.search(r"reused too early|two results", refused(text))


def test_memory_within_the_plan(schedule_text: Text) -> None:
    text = schedule_text()
    assert "the plan allows 1000" in refused(re.sub(r"memory_bytes = \d+", "memory_bytes = 1000", text))
    small = re.sub(r"buffer_bytes = \[(\d+)", "buffer_bytes = [1", text)
    assert re.search(r"takes \d+ bytes, buffer 0 has 1", refused(small))
    few = re.sub(r"buffer_bytes = \[[^\]]*\]", "buffer_bytes = [999999999]", text)
    assert "the entry has 1" in refused(few)


def test_ops_of_a_stream_need_no_events() -> None:
    """On one stream every order of the text is kept, so that no event is needed; without streams nothing is checked."""
    text = """module @m {version = 1} {
  func @f(%x: f32[4, 8]) -> f32[4, 8] {
    %0 = add %x, %x {stream = a} : f32[4, 8]
    %1 = add %0, %x {stream = a} : f32[4, 8]
    return %1
  }
}
"""
    verify(parse_module(text))
    assert "add %0, %x on stream b uses what" in refused(text.replace("%0, %x {stream = a}", "%0, %x {stream = b}"))
    verify(parse_module(text.replace("%0, %x {stream = a}", "%0, %x")))


def test_placement_is_typed(schedule_text: Text) -> None:
    from moec.ir import ParseError

    with pytest.raises(ParseError, match=r"attribute sms of norm\.rms must be int"):
        parse_module(re.sub(r"sms = \d+", "sms = many", schedule_text()))
