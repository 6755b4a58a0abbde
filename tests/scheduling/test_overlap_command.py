"""`moec overlap`: the fields of its answer, its trace, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from task_graphs import decode_layer, random_tasks
from typer.testing import CliRunner

from moec.cli import overlap
from moec.errors import InputError
from moec.passes.scheduling import Schedule, check, graph_from_json

app = typer.Typer()
overlap.register(app)


@app.callback()
def several_commands() -> None:
    """Keeps `overlap` a command of its own, as in `moec`."""


def run(*arguments: str) -> str:
    answer = CliRunner().invoke(app, ["overlap", *arguments], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return answer.stdout


@pytest.fixture
def decode_file(tmp_path: Path) -> Path:
    path = tmp_path / "decode.json"
    path.write_text(json.dumps(decode_layer()))
    return path


def test_json_answer_of_a_graph_that_repeats(decode_file: Path) -> None:
    answer = json.loads(run(str(decode_file), "--json"))
    assert answer["interval_us"] == pytest.approx(1150)
    assert answer["interval_bound_us"] == pytest.approx(1150)
    assert answer["optimal"] is True
    assert set(answer["order"]) == {"sm", "nic"}
    assert sorted(answer["order"]["nic"]) == ["combine.0", "combine.1", "dispatch.0", "dispatch.1"]
    assert answer["utilisation"]["nic"] == pytest.approx(1100 / 1150)
    check(graph_from_json(decode_layer()), Schedule(answer["start_us"], interval_us=answer["interval_us"]))


def test_json_answer_of_a_graph_that_runs_once(tmp_path: Path) -> None:
    path = tmp_path / "once.json"
    path.write_text(json.dumps(random_tasks(2, 7)))
    answer = json.loads(run(str(path), "--json"))
    assert answer["interval_us"] is None and answer["interval_bound_us"] is None
    ends = [answer["start_us"][name] + us for name, us in answer["duration_us"].items()]
    assert answer["makespan_us"] == pytest.approx(max(ends))


def test_report_names_bound_gap_and_exposed_time(decode_file: Path) -> None:
    report = run(str(decode_file))
    assert "interval  1150 us an iteration, bound 1150 us, gap 0.00% (proven optimal)" in report
    assert "interval resources 1100 us" in report
    assert "of communication alone" in report


def test_the_gap_is_printed_when_nothing_is_proven(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps(random_tasks(0, 50)))
    report = run(str(path), "--time-limit", "0.01")
    assert "gap" in report and "proven" not in report


def test_trace_shows_every_resource_and_the_exposed_time(decode_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    run(str(decode_file), "--json", "--trace", str(out))
    events = json.loads(out.read_text())["traceEvents"]
    tracks = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert {"sm", "nic", "exposed communication"} <= set(tracks)
    assert sum(e["ph"] == "X" and e["name"] == "attn0.0" for e in events) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["decode.json", "trace.json"]


def test_wrong_input_reaches_the_user(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the task graph"):
        run(str(tmp_path / "missing.json"))
