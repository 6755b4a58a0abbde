"""What the command line says to options, arguments and commands that it does not take."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moec import __version__

WRONG = {
    "foo": "No such command 'foo' (see moec --help)",
    "ir shw": "No such command 'shw'. Did you mean 'show'? (see moec ir --help)",
    "compile --nope": "No such option: --nope ",
    "overlap --trac x": "No such option: --trac ",
    "run": "Missing argument 'artifact' (see moec run --help)",
    "compile tiny-deepseek-v3 --batch two": "Invalid value for '--batch'",
}


def moec(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moec", *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_is_one_line(arguments: str) -> None:
    done = moec(*arguments.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"moec: error: {WRONG[arguments]}")
    assert done.stderr.endswith(" --help)\n")


@pytest.mark.parametrize("group", ["", "ir", "targets"])
def test_a_bare_group_shows_its_commands(group: str) -> None:
    done = moec(*group.split())
    assert done.returncode == 2 and not done.stderr
    assert "Commands:" in done.stdout


def test_version() -> None:
    done = moec("--version")
    assert (done.returncode, done.stdout) == (0, f"moec {__version__}\n")


def test_a_timeout_of_one_process_is_refused() -> None:
    done = moec("run", "any", "--prompt-ids", "1", "--timeout", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moec: error: --timeout is for several processes: start them with torchrun\n"


def test_an_emulated_card_of_one_process_is_refused() -> None:
    done = moec("bench", "any", "--link", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "moec: error: --link emulates the network card of each of several ranks: start them with torchrun\n"
    )


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_has_headings_defaults_and_examples(flag: str) -> None:
    done = moec("compile", flag)
    assert done.returncode == 0 and done.stdout.startswith("Usage: moec compile [OPTIONS] MODEL\n")
    for heading in ("Model and weights:", "Several devices:", "Examples:\n  moec compile tiny-deepseek-v3 --out"):
        assert f"\n\n{heading}" in done.stdout
    assert "[default: the model's, at most 4096; at least 1]" in " ".join(done.stdout.split())
    assert "<" not in done.stdout and "{model}" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "any", "--prompt-ids", "1", "--max-new-tokens", "9" * 400], "Invalid value for '--max-new-tokens': a"),
        (["plan", "any", "--page", ""], "Invalid value for '--page': the path is empty"),
        (["compile", "any", "--out="], "Invalid value for '--out': the path is empty"),
        (["quantise", "", "--out", "q"], "Invalid value for 'folder': the path is empty"),
        (["run", "a\nb", "--prompt-ids", "1"], r"a\nb is not an artifact: no such folder"),
        (
            ["simulate", "any", "--spread", "1e30"],
            "Invalid value for '--spread': Input should be less than or equal to 5",
        ),
        (["plan", "tiny-deepseek-v3", "--schedule", "1f1b"], "--schedule is for training: add --phase train"),
        (["plan", "tiny-deepseek-v3", "--phase", "train", "--batch", "4"], "--batch is for serving: leave it away"),
        (["run", "any", "--prompt-ids", "1", "--temperature", "1e-320"], "temperature must be 0 (the most probable "),
    ],
    ids=str,
)
def test_values_that_nobody_means(arguments: list[str], says: str) -> None:
    done = moec(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"moec: error: {says}")


def test_a_long_word_is_shortened() -> None:
    done = moec("run", "any", "--prompt-ids", "x" * 5000)
    assert done.returncode == 2 and len(done.stderr) < 500


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["plan", "tiny-deepseek-v3", "--what-if", "a\nb"], r"--what-if a\nb: "),
     (["compile", "tiny-deepseek-v3", "--plan-only", "--pass", "a\nb"], r"--pass a\nb: ")],
)  # fmt: skip
def test_what_a_user_wrote_stays_on_one_line(arguments: list[str], says: str) -> None:
    done = moec(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"moec: error: {says}")
