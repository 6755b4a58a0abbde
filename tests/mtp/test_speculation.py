"""Speculative decoding: the same tokens as without, whatever is drafted, and pages that come back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from chain_engine import ChainEngine
from mtp_oracle import FOLDER
from scipy.stats import chisquare

from moec.cli import main
from moec.runtime import Model
from moec.runtime.errors import WrongOption
from moec.runtime.sampling import Sampling, nucleus
from moec.runtime.scheduler import Request, Scheduler
from moec.runtime.speculate import Speculation


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_greedy_tokens_are_those_of_plain_decoding(model: Model, heldout: list[int], drafts: int) -> None:
    """More prompts than places, of lengths up to several chunks; sequences accept different numbers of drafts."""
    prompts = [heldout[:300], heldout[500:517], heldout[700:701], heldout[800:1000], heldout[1000:1064]]
    plain = model.complete(prompts, 48, stop=())
    done = model.complete(prompts, 48, stop=(), speculate=drafts)
    assert done.tokens == plain.tokens
    assert model.engine.pool.free == model.engine.pool.pages
    rates = done.rates
    assert rates.decoded_tokens == plain.rates.decoded_tokens
    assert 0 < rates.accepted_tokens < rates.drafted_tokens and rates.decode_steps < plain.rates.decode_steps
    # Each sequence and step yields one token besides the kept ones; the end of a sequence may cut a step short.
    assert rates.acceptance is not None and rates.acceptance > 0.3


def test_a_sequence_may_fill_the_context(model: Model, heldout: list[int]) -> None:
    prompt, room = heldout[:500], model.context - 500 + 1
    assert model.generate(prompt, room, stop=(), speculate=3) == model.generate(prompt, room, stop=())


def test_stop_tokens_end_within_a_step(model: Model, heldout: list[int]) -> None:
    (plain,) = model.complete(heldout[:50], 40, stop=()).tokens
    for stop in {plain[5], plain[11], plain[12]}:
        expected = plain[: plain.index(stop) + 1]
        assert model.generate(heldout[:50], 40, stop=[stop], speculate=3) == expected


def test_requests_that_arrive_over_time(model: Model, heldout: list[int]) -> None:
    given = [heldout[i * 97 : i * 97 + 1 + 41 * i] for i in range(6)]
    alone = [model.generate(p, 12, stop=()) for p in given]
    streamed: dict[int, list[int]] = {}
    server = model.serve(lambda request, token: streamed.setdefault(request.number, []).append(token), speculate=2)
    requests = []
    for i, p in enumerate(given):
        requests.append(server.submit(p, 12, stop=()))
        for _ in range(i % 3):
            server.step()
    server.run()
    assert [r.tokens for r in requests] == alone == [streamed[i] for i in range(6)]
    assert model.engine.pool.free == model.engine.pool.pages


def test_more_drafts_than_compiled_are_refused(model: Model) -> None:
    with pytest.raises(WrongOption, match="speculate must be 0 to 3, as compiled, is 4"):
        model.generate([1, 2], 4, speculate=4)


def test_the_command_reports_what_was_kept(
    artifact: Path,
    model: Model,
    heldout: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = ",".join(map(str, heldout[:80]))
    for extra in ([], ["--speculate", "2"]):
        arguments = ["run", str(artifact), "--prompt-ids", ids, "--max-new-tokens", "20", "--json", *extra]
        monkeypatch.setattr("sys.argv", ["moec", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        found = json.loads(capsys.readouterr().out)
        assert found["token_ids"] == model.generate(heldout[:80], 20)
        assert ("acceptance_rate" in found) == bool(extra)


# What follows runs on a stand-in whose logits depend on every token in its pages.


def chain_prompts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, ChainEngine.VOCAB, rng.integers(1, 40)) for _ in range(count)]


def run(scheduler: Scheduler, sampling: Sampling, new: int = 30, count: int = 9) -> list[Request]:
    requests = [scheduler.submit(p, new, sampling) for p in chain_prompts(count)]
    while scheduler.busy:
        scheduler.step()
    return requests


@pytest.mark.parametrize("skill", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("drafts", [1, 4])
def test_any_draft_gives_the_same_tokens(skill: float, drafts: int) -> None:
    """Drafts that are always wrong, sometimes, and never; every state that the draft gets is checked."""
    expected = run(Scheduler(ChainEngine(skill)), Sampling())
    scheduler = Speculation(ChainEngine(skill), drafts)
    got = run(scheduler, Sampling())
    assert [r.tokens for r in got] == [r.tokens for r in expected]
    engine = scheduler.engine
    assert engine.pool.free == engine.pool.pages
    rate = scheduler.rates.acceptance
    assert rate is not None and (rate == skill if skill in (0.0, 1.0) else 0.2 < rate < 0.8)


@pytest.mark.parametrize("skill", [0.0, 0.6])
def test_sampled_tokens_have_the_distribution_of_the_model(skill: float) -> None:
    """Frequencies of the first three new tokens against their exact probabilities, at a temperature and a nucleus."""
    engine = ChainEngine(skill, vocab=4)
    temperature, top_p = 1.3, 0.9
    prompt = np.array([1, 3, 2])
    scheduler = Speculation(engine, 3)
    requests = [scheduler.submit(prompt, 4, Sampling(temperature, top_p, 5)) for _ in range(4000)]
    while scheduler.busy:
        scheduler.step()
    counts = np.zeros((4, 4, 4))
    for request in requests:
        counts[tuple(request.tokens[:3])] += 1
    expected = np.zeros((4, 4, 4))
    for tokens in np.ndindex(4, 4, 4):
        probability = 1.0
        for i, token in enumerate(tokens):
            probability *= nucleus(engine.logits_after([*prompt, *tokens[:i]]), temperature, top_p)[token]
        expected[tokens] = probability * len(requests)
    assert not counts[expected == 0].any()
    likely = expected > 5
    rest = counts[(expected > 0) & ~likely].sum(), expected[(expected > 0) & ~likely].sum()
    seen, wanted = np.append(counts[likely], rest[0]), np.append(expected[likely], rest[1])
    kept = wanted > 0
    assert chisquare(seen[kept], wanted[kept]).pvalue > 1e-3


def test_the_same_seed_gives_the_same_tokens_whatever_runs_beside() -> None:
    sampling = Sampling(0.9, 0.95, 3)
    together = run(Speculation(ChainEngine(0.5), 2), sampling)
    again = run(Speculation(ChainEngine(0.5, batch=1), 2), sampling)
    assert [r.tokens for r in together] == [r.tokens for r in again]


@pytest.mark.parametrize("drafts", [1, 3])
def test_the_benchmark_reports_both_sides(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, drafts: int
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((FOLDER / "heldout.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    options = ["--text", str(text), "--prompt-tokens", "40", "--new-tokens", "12", "--repeat", "1", "--batch", "2"]
    monkeypatch.setattr("sys.argv", ["moec", "bench", str(artifact), "--speculate", str(drafts), *options, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and found["same_tokens"] and found["prompts"] == 8
    assert 0.3 < found["agreement"] < 0.9 and 0.2 < found["acceptance"] <= 1
    assert 1 < found["tokens_per_step"] <= 1 + drafts
    step, draft, verify = (found[f"{key}_ms"] for key in ("step", "draft", "verify"))
    expected = found["tokens_per_step"] * step / (draft + verify)
    assert found["expected_speed_up"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speculate", "4"], "speculate must be 1 to 3, as compiled, is 4"),
        (["--speculate", "1", "--batch", "9"], "batch must be 1 to 3, as compiled, is 9"),
        (["--speculate", "1", "--profile"], "--speculate is a measurement of its own"),
        (["--text", "x.txt"], "--text gives the prompts of --speculate: give both"),
        (["--speculate", "1", "--text", "no-such-file"], "no-such-file"),
    ],
)
def test_wrong_measurements_cost_one_line(
    artifact: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["moec", "bench", str(artifact), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    found = capsys.readouterr()
    assert ended.value.code == 2 and not found.out
    assert message in found.err and found.err.count("\n") == 1
