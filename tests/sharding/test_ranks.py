"""Artifacts over several processes against one process: the same numbers on every mesh, and no rank left waiting."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_schedules import drawn as drawn_schedule
from rank_models import BATCH, CASES, CHUNK, CONTEXT, Case, compiled, launch, results, skewed

import moec
from moec.ir import verify
from moec.passes.planning.layout import LayoutRequest

BOUND = 1e-5
"""Greatest difference of logits over the greatest logit."""
SLOW = pytest.mark.slow
FAST = ("ep3-redundant", "dp2-tp2-ep4-forwarded", "pp2")
WINDOWS = (20, 13, 9)
"""Windows whose losses are computed, by their tokens."""
PROMPTS = [[5, 6, 7, 8, 9, 10, 11] * 3, [3]]
"""Uneven, and fewer than replicas: some rank has no prompt at all."""


def agree(model: Path | str, mesh: str | Case, recipe: str, tmp: Path, seed: int = 0, bound: float = BOUND) -> None:
    """Prefill whole, in chunks and token by token, losses, and generation, equal those of one process on every rank."""
    case = CASES[mesh] if isinstance(mesh, str) else mesh
    one = moec.load(compiled(model, tmp / "one.moec", recipe), threads=1)
    ids = np.random.default_rng(seed).integers(0, one.vocab, (3, 20))
    windows = [row[:n] for row, n in zip(ids, WINDOWS, strict=True)]
    ranks = results(
        case.ranks, compiled(model, tmp / "many.moec", recipe, case), tmp / "out",
        ids=ids.tolist(), prompts=PROMPTS, new=6, windows=[w.tolist() for w in windows],
        parts=2 if case.request.pp > 1 else 1,
    )  # fmt: skip
    tokens = one.generate(PROMPTS, 6, stop=())
    losses = np.concatenate([one.losses(w) for w in windows])
    replicas = case.ranks // case.request.tp // case.request.pp
    for rank, found in enumerate(ranks):
        assert np.abs(found["losses"] - losses).max() / losses.max() < bound
        replica = rank // case.request.tp % replicas
        assert found["fed"] == sum(WINDOWS[replica::replicas]), "windows are spread over the replicas"
        for chunk in (None, 7, 1):
            expected = one.logits(ids, chunk=chunk)
            worst = np.abs(found[f"logits_{chunk}"] - expected).max() / np.abs(expected).max()
            assert worst < bound, f"chunk={chunk}: {worst}"
        assert json.loads(str(found["tokens"])) == tokens


def refused(model: Path | str, name: str, recipe: str, words: str) -> None:
    """Nothing is compiled where a layout does not fit a model: one line when planned."""
    case = CASES[name]
    with pytest.raises(moec.errors.InputError, match=words):
        moec.trace(str(model)).optimize(
            "cpu", batch=BATCH, context=CONTEXT, chunk=CHUNK, recipe=recipe, layout=case.request, passes=case.passes
        )


@pytest.mark.parametrize("name", FAST)
def test_ranks_equal_one_process(name: str, tmp_path: Path) -> None:
    agree(skewed("many-groups", tmp_path / "hf"), name, "fp32", tmp_path)


@SLOW
@pytest.mark.parametrize("recipe", ["fp32", "weight-only"])
@pytest.mark.parametrize("name", CASES)
def test_tiny_on_every_mesh(name: str, recipe: str, tmp_path: Path) -> None:
    """The trained model; FP8 weights are the same bytes on every rank, so that the bound stays."""
    if recipe == "weight-only" and CASES[name].request.tp > 1:
        refused(
            "tiny-deepseek-v3", name, recipe, r"q_b: 192 over \d devices is \d+, not a multiple of its 128-wide scale"
        )
        return
    agree("tiny-deepseek-v3", name, recipe, tmp_path)


@SLOW
def test_placement_from_a_file_changes_no_result(tmp_path: Path) -> None:
    """Experts moved between ranks, popular ones copied, unequal shares: the same numbers as in one process."""
    file = tmp_path / "placement.json"
    row = [*range(15, -1, -1), 0, 1, 2, 3]
    shares = [0.3 if e < 4 and s < 16 else 0.7 if s >= 16 else 1.0 for s, e in enumerate(row)]
    found = {"physical_to_logical_map": [row, row], "replica_shares": [shares, shares]}
    file.write_text(json.dumps(found))
    case = Case(LayoutRequest(ranks=2), (f"shard{{placement={file}}}",))
    agree(skewed("many-groups", tmp_path / "hf"), case, "fp32", tmp_path)


@SLOW
@pytest.mark.parametrize("variant", ["v3", "half-split-rope", "no-dense-tied", "v2-groups", "all-dense"])
@pytest.mark.parametrize("name", CASES)
def test_small_models_on_every_mesh(name: str, variant: str, tmp_path: Path) -> None:
    model = skewed(variant, tmp_path / "hf", seed=3)
    asked = CASES[name].request
    if variant == "all-dense" and ((asked.ep or 1) > 1 or asked.redundant):
        refused(model, name, "fp32", r"(--redundant 4|EP 2), but the model has no routed experts")
        return
    agree(model, name, "fp32", tmp_path, seed=3)


@SLOW
@pytest.mark.parametrize("name", ["tp2", "tp2-ep2", "tp4"])
@pytest.mark.parametrize(("family", "seed"), [("mixtral", 1), ("qwen3_moe", 2), ("gpt_oss", 3), ("qwen3", 4)])
def test_grouped_heads_on_every_mesh(family: str, seed: int, name: str, tmp_path: Path) -> None:
    """Heads of keys and values cut, or one for several ranks; experts stacked in the checkpoint and one by one."""
    from random_configs import make_model

    sizes = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 48}
    make_model(family, seed, **sizes).save_pretrained(tmp_path / "hf")
    if family == "gpt_oss" and CASES[name].request.ep == 1:
        refused(tmp_path / "hf", name, "fp32", r"experts with biases are not cut by width; choose --ep \d")
        return
    agree(tmp_path / "hf", name, "fp32", tmp_path, seed=seed)


@SLOW
def test_fp8_blocks_over_tensor_parallel_ranks(tmp_path: Path) -> None:
    """Whole 128x128 blocks on every rank: the same FP8 weights as in one process.

    Sums over other parts differ in their last bit, which can turn the rounding of a cached BF16 value: a wider bound.
    """
    sizes = {
        "num_attention_heads": 4, "num_key_value_heads": 4, "v_head_dim": 64, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 256,
    }  # fmt: skip
    agree(skewed("block-sizes", tmp_path / "hf", **sizes), "tp2", "weight-only", tmp_path, bound=1e-3)


@pytest.mark.parametrize("via", [pytest.param("direct", marks=pytest.mark.slow), "node"])
def test_traffic_between_nodes_is_what_arithmetic_says(via: str, tmp_path: Path) -> None:
    """Two nodes of two ranks: a row for each pair on the other node, or one for each token that needs it."""
    case = Case(LayoutRequest(ranks=4), (f"shard{{via={via},per_node=2}}",))
    model = skewed("v3", tmp_path / "hf")
    ids = np.random.default_rng(2).integers(0, 211, (4, 9)).tolist()
    ranks = results(
        4, compiled(model, tmp_path / "m.moec", "fp32", case), tmp_path / "out", ids=ids, chunks=[None], watch=True
    )
    for rank, found in enumerate(ranks):
        sent = json.loads(str(found["sent"]))["ep"]
        far = [r for r in range(4) if r // 2 != rank // 2]
        hidden, k = 96, 3
        rows = 0
        for routed in json.loads(str(found["routed"])):
            nodes = np.asarray(routed).reshape(-1, k) // 2 // 2
            other = nodes != rank // 2
            rows += int(other.sum() if via == "direct" else other.any(1).sum())
        extra = 0 if via == "direct" else 2 * k
        dispatched, combined = rows * (hidden + extra) * 4, _came(ranks, rank, via, k) * hidden * 4
        assert sum(sent[r] for r in far) == dispatched + combined


def _came(ranks: list[dict[str, np.ndarray]], rank: int, via: str, k: int) -> int:
    """Rows that came from the other node for this rank: it sends as many back."""
    total = 0
    for source in [r for r in range(4) if r // 2 != rank // 2]:
        for routed in json.loads(str(ranks[source]["routed"])):
            slots = np.asarray(routed).reshape(-1, k)
            if via == "direct":
                total += int((slots // 2 == rank).sum())
            elif source % 2 == rank % 2:
                total += int((slots // 2 // 2 == rank // 2).any(1).sum())
    return total


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for two ranks."""
    return compiled("tiny-deepseek-v3", tmp_path_factory.mktemp("pair") / "m.moec", "fp32", CASES["ep2"])


IN_EXCHANGE = r"layer 2 \(combine, deepseek_v3/model.py:\d+, shard\) of step \d+"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        pytest.param(
            "kill", r"rank 1 died or was stopped: no sign of life for [\d.]+ s, rank 0 waits in .*layer \d", marks=SLOW
        ),
        ("kill before sending", rf"rank 1 died or was stopped: .* s, rank 0 waits in {IN_EXCHANGE}$"),
        pytest.param("stop", r"rank 1 died or was stopped: .*rank 0 waits in ", marks=SLOW),
        pytest.param(
            "stop before sending", rf"rank 1 died or was stopped: .*rank 0 waits in {IN_EXCHANGE}$", marks=SLOW
        ),
        pytest.param(
            "hang", r"rank 1 stopped answering after layer 3 \(combine.*: rank 0 waits in the agree", marks=SLOW
        ),
        ("hang before sending", rf"rank 1 stopped answering in {IN_EXCHANGE}: rank 0 waits in layer 2 \(combine"),
        pytest.param(
            "hang behind sending",
            rf"rank 1 stopped answering in {IN_EXCHANGE}: rank 0 waits in layer 3 \(dispatch",
            marks=SLOW,
        ),
        pytest.param("error", "rank 1: Input/output error", marks=SLOW),
    ],
)
def test_a_rank_that_fails_ends_all_with_one_line(how: str, words: str, pair: Path) -> None:
    began = time.monotonic()
    request = {"artifact": str(pair), "prompts": [[1, 2, 3], [4]], "new": 40, "timeout": 4}
    done = launch(2, {**request, "fail": how, "rank": 1, "step": 20}, seconds=60)
    lines = [line for line in done.stderr.splitlines() if line.startswith("moec: error:")]
    assert done.returncode == 1 and len(lines) == 1 and re.search(words, lines[0]), done.stderr
    assert time.monotonic() - began < 60


@SLOW
@pytest.mark.parametrize(
    ("recipe", "seed", "what"), [("fp32", 5, "weights"), ("bf16", None, "program"), ("fp32", None, "")]
)
def test_ranks_with_different_artifacts(recipe: str, seed: int | None, what: str, pair: Path, tmp_path: Path) -> None:
    """Before the first step: the same program over other weights, another program, and the same bytes elsewhere."""
    plan = moec.trace("tiny-deepseek-v3").optimize(
        "cpu", batch=BATCH, context=CONTEXT, chunk=CHUNK, recipe=recipe, layout=CASES["ep2"].request
    )
    other = plan.compile(tmp_path / "other.moec", random_weights=seed).path
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "run.sh"
    script.write_text(f'exec {sys.executable} -m moec run $([ $RANK = 1 ] && echo {other} || echo {pair}) "$@"\n')
    done = subprocess.run(
        [*command, "--no-python", "bash", str(script), "--prompt-ids", "1", "--max-new-tokens", "2", "--threads", "1"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("moec: error:")]
    if not what:
        assert done.returncode == 0 and not lines, done.stderr
        return
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    assert lines[0].startswith("moec: error: rank 1 has another artifact than rank 0: ")
    assert re.search(rf"{what} [0-9a-f]{{12}} instead of [0-9a-f]{{12}}", lines[0])


@SLOW
def test_a_rank_whose_weights_are_cut_short_is_named(pair: Path, tmp_path: Path) -> None:
    """Found behind the comparison of artifacts: all end with its cause, none waits for it."""
    other = tmp_path / "other.moec"
    shutil.copytree(pair, other)
    with (other / "weights" / "rank-00001.safetensors").open("r+b") as file:
        file.truncate(100_000)
    done = launch(2, {"artifact": str(pair), "other": str(other), "other_rank": 1, "prompts": [[1]], "new": 2})
    assert done.returncode == 1
    assert re.search(r"RankInputFailed: rank 1: .*rank-00001.safetensors: truncated", done.stderr), done.stderr


@SLOW
def test_ranks_with_other_prompts_are_named(pair: Path, tmp_path: Path) -> None:
    """Before the first step: replicas with prompts of their own would wait for each other, or print half of each."""
    script = tmp_path / "run.sh"
    script.write_text(f'exec {sys.executable} -m moec run {pair} --prompt-ids $((RANK + 1)) --max-new-tokens 2 "$@"\n')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--no-python", "bash", str(script), "--threads", "1"], capture_output=True, text=True, timeout=100
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("moec: error:")]
    assert done.returncode != 0 and len(lines) == 1 and "rank 1 was given other prompts" in lines[0], done.stderr


@SLOW
def test_the_command_prints_once(pair: Path) -> None:
    """`torchrun -m moec run --json`: rank 0 prints one object, the tokens are those of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moec"]
    arguments = ["run", str(pair), "--prompt-ids", "5,6,7", "--max-new-tokens", "5", "--threads", "1", "--json"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=100)
    one = moec.load(compiled("tiny-deepseek-v3", pair.parent / "one.moec"), threads=1)
    assert json.loads(done.stdout)["token_ids"] == one.generate([5, 6, 7], 5), done.stderr


def test_micro_batches_that_hide_their_exchanges(pair: Path, tmp_path: Path) -> None:
    """Exchanges under way beside computation change no bit; other sizes of products change rounding only."""
    kinds = [("whole", 0, True), ("waiting", 2, False), ("hidden", 2, True)]
    for rank in results(2, pair, tmp_path, micro_batches=kinds):
        assert np.array_equal(rank["decoded_hidden"], rank["decoded_waiting"])
        whole = rank["decoded_whole"]
        assert np.abs(rank["decoded_hidden"] - whole).max() < 1e-4 * whole.std()


SCHEDULED: dict[str, dict[str, int]] = {
    "deepseek_v3": {},
    # Both ropes of a layer stand in one line; two layers in one function.
    "qwen3_moe": {"num_hidden_layers": 3},
    "gpt_oss": {"num_hidden_layers": 8},
}


@SLOW
@pytest.mark.parametrize("drawn", [0, 1])
@pytest.mark.parametrize("family", SCHEDULED)
def test_ranks_follow_the_schedule_of_their_artifact(family: str, drawn: int, tmp_path: Path) -> None:
    """Turns read off the scheduled text, the compiler's or one that is drawn: tokens of one process, and no bit changed
    by waiting for every exchange."""
    target = str(Path(__file__).parents[2] / "benchmarks" / "cpu_with_network.yaml")
    passes = ["split-microbatches{count=2,phase=decode}", "overlap{phase=decode}"]
    model = "tiny-deepseek-v3"
    if family != "deepseek_v3":
        from random_configs import make_model

        sizes = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 48}
        make_model(family, 5, **sizes, **SCHEDULED[family]).save_pretrained(tmp_path / "hf")
        model = str(tmp_path / "hf")
    plan = moec.trace(model).optimize(
        target, batch=4, context=64, layout=LayoutRequest(ranks=2), recipe="fp32", passes=passes[: 2 - drawn]
    )
    if drawn:
        plan = replace(plan, ir=drawn_schedule(plan.ir, drawn))
        verify(plan.ir)
    many = plan.compile(tmp_path / "many.moec").path
    assert json.loads((many / "plan.json").read_text())["entries"]["decode"]["turns"]
    one = moec.load(compiled(model, tmp_path / "one.moec", "fp32"), threads=1)
    kinds = [("whole", 0, True), ("waiting", -1, False), ("hidden", -1, True)]
    for rank in results(2, many, tmp_path / "out", micro_batches=kinds, prompts=PROMPTS, new=6):
        assert json.loads(str(rank["tokens"])) == one.generate(PROMPTS, 6, stop=())
        assert np.array_equal(rank["decoded_hidden"], rank["decoded_waiting"])
        assert np.abs(rank["decoded_hidden"] - rank["decoded_whole"]).max() < 1e-4 * rank["decoded_whole"].std()


def test_one_process_for_several_ranks(pair: Path) -> None:
    with pytest.raises(moec.errors.InputError, match=r"split over 2 ranks.*torchrun --nproc-per-node 2"):
        moec.load(pair)
