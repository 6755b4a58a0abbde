"""Whatever schedule the verifier accepts gives the results of the program without one, bit for bit; drawn at random.

Streams run in random orders, CPU ranks follow the turns read off the text. Two ranks of small models in one process.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_schedules import by_streams, by_turns, drawn, in_order, mutated, split_plan

import moec
from moec.codegen.scheduled import Turn, arrange
from moec.codegen.turn_order import UnorderedTurns, check_turns
from moec.ir import Module, VerifyError, parse_module, print_module, verify
from moec.ir.rewrite import clone_module
from moec.passes.planning import LayoutRequest

SEED = int(os.environ.get("MOEC_SEED", "1"))
TARGET = Path(__file__).parents[2] / "benchmarks" / "cpu_with_network.yaml"
SMALL = {
    "hidden_size": "32", "num_attention_heads": "4", "num_key_value_heads": "2", "head_dim": "8", "vocab_size": "64",
    "num_experts_per_tok": "2",
}  # fmt: skip
QWEN = {**SMALL, "num_experts": "8", "moe_intermediate_size": "16"}
GPT_OSS = {**SMALL, "num_local_experts": "8", "intermediate_size": "16"}
CASES: dict[str, Callable[[], Any]] = {
    "dp2-ep2": lambda: split_plan("tiny-deepseek-v3", 4, LayoutRequest(ranks=2), 2),
    "tp2-ep2": lambda: split_plan("tiny-deepseek-v3", 4, LayoutRequest(ranks=2, tp=2), 2),
    "three-parts": lambda: split_plan("tiny-deepseek-v3", 5, LayoutRequest(ranks=2), 3),
    # Both ropes of a layer stand in one line of the model; two layers in one function.
    "grouped-heads": lambda: split_plan("qwen3-30b-a3b", 3, LayoutRequest(ranks=2), 2, **QWEN),
    "layers-in-pairs": lambda: split_plan("gpt-oss-20b", 8, LayoutRequest(ranks=2), 2, **GPT_OSS),
}
FAST = ("tp2-ep2", "layers-in-pairs")


@cache
def case(name: str) -> tuple[Module, Module, list[torch.Tensor], int]:
    """The module split, the same before, what it computes, micro-batches."""
    plan = CASES[name]()
    count = int(str(plan.ir.functions["decode"].attrs["micro_batches"]))
    split = clone_module(plan.ir)
    del split.functions["prefill"]
    return split, plan.unscheduled, in_order(split), count


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def turned(name: str, scheduled: Module) -> tuple[Module, list[Turn]]:
    _, unsplit, _, count = case(name)
    base = clone_module(unsplit)
    turns = arrange(base, scheduled, "decode")
    check_turns(base, "decode", turns, count)
    return base, turns


def explore(name: str, seed: int, changes: int) -> tuple[int, int]:
    """One schedule and changes to it; returns how many of these were accepted and refused."""
    split, _, wanted, count = case(name)
    draw = random.Random(seed)
    module = drawn(split, seed)
    text = print_module(module)
    module = parse_module(text)
    assert print_module(module) == text
    verify(module)
    accepted = refused = 0
    for change in range(changes + 1):
        other = mutated(module, draw) if change else module
        try:
            verify(other)
        except VerifyError as error:
            explained(str(error))
            refused += 1
            continue
        accepted += change > 0
        if print_module(other) == text and change:
            continue
        module = other
        assert same(by_streams(module, seed + change), wanted), f"seed {seed}, change {change}"
        base, turns = turned(name, module)
        assert same(by_turns(split, base, turns, count), wanted), f"seed {seed}, change {change}, turns"
    return accepted, refused


def explained(message: str) -> None:
    """A refusal names an op or event and says why."""
    assert re.search(r"@\S+", message), message
    assert re.search(r"comm\.|event|linear|attn|moe|norm|add|cache|buffer|rope|mul|rows|%", message), message
    assert re.search(
        r"without waiting|adds rows to the cache behind|reused too early|nothing records|recorded only behind"
        r"|wait for each other|two results|takes \d+ bytes|defined|before its|use of|no buffer|buffers for"
        r"|unknown value",
        message,
    ), message


@pytest.mark.parametrize("name", FAST)
def test_schedules_give_the_same_bits(name: str) -> None:
    totals = [explore(name, SEED * 1000 + k, 6) for k in range(2)]
    accepted, refused = map(sum, zip(*totals, strict=True))
    assert accepted and refused


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_schedules_give_the_same_bits(name: str) -> None:
    totals = [explore(name, SEED * 1000 + 100 + k, 20) for k in range(int(os.environ.get("MOEC_COUNT", "40")))]
    accepted, refused = map(sum, zip(*totals, strict=True))
    print(f"{name}: {len(totals)} schedules, {accepted} changes accepted, {refused} refused")
    assert accepted and refused


def test_the_compilers_own_schedule_of_layers_in_pairs() -> None:
    """Layers of a pair have caches of their own; their numbers pass from round to round."""
    split, _, wanted, count = case("layers-in-pairs")
    plan = moec.trace("gpt-oss-20b", {"num_hidden_layers": "8", **GPT_OSS}).optimize(
        str(TARGET), batch=4, context=16, layout=LayoutRequest(ranks=2), recipe="fp32",
        passes=["split-microbatches{count=2,phase=decode}", "overlap{phase=decode}"],
    )  # fmt: skip
    scheduled = clone_module(plan.ir)
    del scheduled.functions["prefill"]
    verify(scheduled)
    assert "event.wait" in print_module(scheduled) and same(by_streams(scheduled, SEED), wanted)
    base, turns = turned("layers-in-pairs", scheduled)
    assert same(by_turns(split, base, turns, count), wanted)


def test_turns_out_of_order_are_refused() -> None:
    """Any two turns of one micro-batch exchanged, one left out, one twice: refused, or the results stay."""
    name = FAST[0]
    split, _, wanted, count = case(name)
    base, turns = turned(name, drawn(split, SEED))
    draw = random.Random(SEED)
    refused = 0
    for trial in range(300):
        other = turns.copy()
        i, j = sorted(draw.sample(range(len(turns)), 2))
        if trial % 3 == 0:
            other.insert(j, other.pop(i))
        elif trial % 3 == 1:
            del other[i]
        else:
            other.insert(j, other[i])
        try:
            check_turns(base, "decode", other, count)
        except UnorderedTurns as error:
            assert re.search(r"step \d+, micro-batch \d.*(before|cannot|twice|never)", str(error))
            refused += 1
            continue
        if refused < 250 and trial % 30 == 0:
            assert same(by_turns(split, base, other, count), wanted)
    assert refused > 200
