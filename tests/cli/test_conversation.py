"""What `moec run` says to a chat model: turns from a file, a system prompt, settings; wrong ones are one line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moec.cli.conversation import NotASetting, NotMessages, conversation, settings

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_turns_of_a_file_a_system_prompt_and_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "turns.json"
    file.write_text(json.dumps(TURNS))
    asked = {"role": "user", "content": "c"}
    assert conversation("c", str(file), "s") == [{"role": "system", "content": "s"}, *TURNS, asked]
    assert conversation(None, str(file), None) == TURNS
    assert conversation("c", None, None) == [asked]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"messages": TURNS})))
    assert conversation(None, "-", None) == TURNS


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{", "is not JSON"), ("[]", "holds no messages"), ("{}", "holds no messages"), ('"x"', "holds no messages"),
        ('["x"]', "message 0 has no role"), ('[{"content": "x"}]', "message 0 has no role"),
        ('[{"role": "user"}, {"role": 3}]', "message 1 has no role"),
    ],
)  # fmt: skip
def test_files_that_hold_no_conversation(text: str, names: str, tmp_path: Path) -> None:
    file = tmp_path / "turns.json"
    file.write_text(text)
    with pytest.raises(NotMessages, match=names) as error:
        conversation(None, str(file), None)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_two_system_prompts(tmp_path: Path) -> None:
    with pytest.raises(NotMessages, match="cannot be read"):
        conversation(None, str(tmp_path / "none.json"), None)
    file = tmp_path / "turns.json"
    file.write_text(json.dumps([{"role": "system", "content": "x"}]))
    with pytest.raises(NotMessages, match="begins with a system prompt"):
        conversation("c", str(file), "s")


def test_settings_are_json_or_text() -> None:
    given = settings(["enable_thinking=false", "effort=high", "n=3", 'x={"a": [1]}', "e="])
    assert given == {"enable_thinking": False, "effort": "high", "n": 3, "x": {"a": [1]}, "e": ""}
    for wrong in ("thinking", "=1", "a b=1", "messages=[]", "add_generation_prompt=false"):
        with pytest.raises(NotASetting):
            settings([wrong])


@pytest.mark.parametrize("option", [("--system", "s"), ("--chat-set", "a=1")])
def test_options_of_conversations_without_one(option: tuple[str, str], refused: Callable[..., Any]) -> None:
    assert f"{option[0]} goes with --chat or --messages" in refused("run", "m.moec", "--prompt", "x", *option)
