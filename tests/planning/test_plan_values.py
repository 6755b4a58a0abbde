"""What the planner answers: sums, directions, published sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

import moec
from moec import targets
from moec.ir import Module
from moec.ir.stats import parameters
from moec.passes.planning import LayoutRequest, Options, Plan, changed, make_plan
from moec.passes.planning.forms import first_change
from moec.passes.planning.timing import Stage, paired


@cache
def model(name: str) -> Module:
    return moec.trace(name).ir


@cache
def plan(name: str, target: str, options: Options, what_if: str = "") -> Plan:
    loaded = targets.load(target)
    return make_plan(model(name), changed(loaded, what_if) if what_if else loaded, options)


V3 = ("deepseek-v3", "h800-ep144", Options())
LITE = ("deepseek-v2-lite", "h800", Options(batch=16, chunk=4096))


@pytest.mark.parametrize("case", [V3, LITE])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_step_is_the_sum_of_its_ops(case: tuple[str, str, Options], phase: str) -> None:
    found = plan(*case).phases[phase]
    assert found.serial_us == pytest.approx(sum(op.cost.time_us for op in found.ops))
    assert found.step_us <= found.serial_us
    assert found.per_device * found.step_us * 1e-6 == pytest.approx(found.tokens / found.layout.tp)
    assert found.total == pytest.approx(found.per_device * found.layout.ranks)


def test_layers_count_as_often_as_they_repeat() -> None:
    ops = {op.name: op.calls for op in plan(*V3).phases["decode"].ops}
    assert ops["moe_layers.attn.o"] == 58
    assert ops["dense_layers.attn.o"] == 3
    assert ops["head"] == 1


def test_attention_flops_of_the_plain_form_are_those_of_the_causal_pairs() -> None:
    found = plan(*V3).phases["prefill"]
    attention = sum(op.cost.flops for op in found.ops if op.op == "mla_prefill")
    pairs = 4096 * 4097 // 2
    assert attention == 61 * 4 * 128 * pairs * 2 * (128 + 64 + 128)


def test_product_flops_are_two_for_each_active_parameter() -> None:
    # Every matrix but the embedding and the experts that a token does not use multiplies each token once; prefill
    # computes the head for the last token of a prompt only.
    found = plan("deepseek-v3", "h800-ep32", Options(balance=1.0)).phases["prefill"]
    products = sum(op.useful_flops for op in found.ops if op.op == "gemm" and op.name != "head")
    experts = sum(op.useful_flops for op in found.ops if op.op == "moe_experts")
    router = sum(op.useful_flops for op in found.ops if op.op == "router")
    published_active = 37e9
    assert (products + experts + router) / found.tokens == pytest.approx(
        2 * (published_active - 129280 * 7168), rel=0.03
    )


def test_fp8_weights_of_all_ranks_hold_every_parameter_once() -> None:
    module, options = model("deepseek-v3"), Options(layout=LayoutRequest(ranks=1))
    found = plan("deepseek-v3", "h800", options)
    held = found.phases["decode"].memory.weights
    # One byte a parameter; embedding, head, gate and norms take two, scales 4 bytes for 128x128.
    assert parameters(module) == 671026419200
    assert held == pytest.approx(671e9, rel=0.01)
    assert held > 671e9
    assert found.warnings
    assert "--ranks 16" in found.warnings[0]


def test_experts_divide_over_the_ranks_and_the_rest_is_replicated() -> None:
    whole = plan("deepseek-v3", "h800", Options()).phases["decode"].memory.weights
    ep32 = plan("deepseek-v3", "h800-ep32", Options(layout=LayoutRequest(redundant=0))).phases["decode"].memory.weights
    routed = 58 * 256 * 3 * 7168 * 2048 * (1 + 4 / 128**2)
    assert whole - ep32 == pytest.approx(routed * 31 / 32, rel=1e-6)


def test_cache_takes_the_published_bytes_a_token() -> None:
    memory = plan(*V3).phases["decode"].memory
    assert memory.kv_cache == 128 * 4096 * 70_272  # Insights into DeepSeek-V3, arXiv 2505.09343, Table 1: 70.272 KB


def test_forms_on_the_h800() -> None:
    found = plan(*V3)
    assert found.phases["decode"].choice.form == "absorbed"
    assert found.phases["prefill"].choice.form == "plain"
    assert found.phases["prefill"].choice.crossover is None


def test_the_crossover_is_where_the_choice_flips() -> None:
    options = Options(batch=1, layout=LayoutRequest(ranks=1))
    crossover = plan("deepseek-v3", "h800", options).phases["decode"].choice.crossover
    assert crossover is not None
    forms = [
        plan("deepseek-v3", "h800", replace(options, context=context)).phases["decode"].choice.form
        for context in (crossover - 1, crossover)
    ]
    assert forms == ["plain", "absorbed"]


def test_less_bandwidth_favours_the_absorbed_form_that_reads_less() -> None:
    def ratio(what_if: str, phase: str) -> float:
        options = Options(batch=8, prompt=65536, chunk=512)
        times = plan("deepseek-v2-lite", "h800", options, what_if).phases[phase].choice.times_us
        return times["plain"] / times["absorbed"]

    assert ratio("memory_bandwidth=0.1x", "prefill") > ratio("", "prefill")
    assert ratio("memory_bandwidth=0.1x", "decode") > 1


def test_first_change_finds_the_exact_place() -> None:
    for place in (2, 3, 17, 999, 1000):
        assert first_change(lambda n, place=place: n >= place, 1, 1000) == place  # type: ignore[misc]
    assert first_change(lambda n: n > 1000, 1, 1000) is None


@pytest.mark.parametrize(("field", "values"), [("batch", (8, 32, 128, 300)), ("context", (256, 1024, 4096, 30000))])
def test_decode_takes_longer_with_more_work(field: str, values: tuple[int, ...]) -> None:
    times = [
        plan("deepseek-v3", "h800-ep144", replace(Options(overlap="off"), **{field: value})).phases["decode"].step_us  # type: ignore[arg-type]
        for value in values
    ]
    assert times == sorted(times)
    assert times[0] < times[-1]


@pytest.mark.parametrize("key", ["memory_bandwidth", "matrix_rate", "scale_up", "scale_out", "fp8_rate", "nvlink"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_better_hardware_is_never_slower(key: str, phase: str) -> None:
    factors = ("0.1x", "0.5x", "2x", "10x")
    times = [plan(*V3, f"{key}={factor}").phases[phase].step_us for factor in factors]
    assert times == sorted(times, reverse=True)


def test_less_memory_bandwidth_makes_decode_memory_bound() -> None:
    slow = plan(*V3, "memory_bandwidth=0.1x").phases["decode"]
    assert slow.bound == "memory"
    assert slow.step_us > 3 * plan(*V3).phases["decode"].step_us


def test_overlap_is_declined_where_it_loses() -> None:
    small = replace(V3[2], batch=2)
    auto, on = (plan("deepseek-v3", "h800-ep144", replace(small, overlap=o)).phases["decode"] for o in ("auto", "on"))
    assert on.paired_us is not None
    assert on.step_us == on.paired_us > auto.step_us == auto.serial_us
    assert not auto.overlapped
    assert plan(*V3).phases["decode"].overlapped


def test_two_micro_batches_against_hand_arithmetic() -> None:
    # Attention 10 and experts 6 between a dispatch of 4 and a combine of 8:
    # max(4, 10) + max(4, 6) + max(8, 6) + max(8, 10).
    assert paired([Stage(10, 4), Stage(6, 8)]) == 10 + 6 + 8 + 10
    assert paired([Stage(10)]) == 20
    # Two of the four microseconds take all cores: nothing hides them.
    assert paired([Stage(10, 4, busy_us=2)]) == 24
    # Half of the computation waits for memory, which the exchange uses for 4 us in all.
    assert paired([Stage(10, 8, memory_us=5, traffic_us=4)]) == 24


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_overlap_never_beats_the_busier_of_computation_and_exchanges(phase: str) -> None:
    found = plan(*V3).phases[phase]
    assert found.paired_us is not None
    assert found.paired_us > max(found.choice.cost.communication_us, 0.5 * found.serial_us) * 0.9
    assert found.exposed_us >= 0


def test_uneven_experts_cost_time() -> None:
    even, uneven = (plan("deepseek-v3", "h800-ep32", Options(balance=b)) for b in (1.0, 0.39))
    for phase in ("prefill", "decode"):
        assert uneven.phases[phase].step_us > even.phases[phase].step_us
        assert uneven.phases[phase].mfu < even.phases[phase].mfu


def test_tensor_parallel_attention_divides_weights_and_adds_collectives() -> None:
    one, four = (
        plan("deepseek-v3", "h800-ep32", Options(layout=LayoutRequest(tp=tp))).phases["decode"] for tp in (1, 4)
    )
    assert four.memory.weights < one.memory.weights
    assert not any(op.op == "all_reduce" for op in one.ops)
    reduced = [op for op in four.ops if op.op == "all_reduce"]
    assert {op.name for op in reduced} == {"moe_layers.attn.o", "dense_layers.attn.o", "dense_layers.mlp.down"}
    assert sum(op.cost.flops for op in four.ops) < sum(op.cost.flops for op in one.ops)


def test_long_prompts_are_computed_in_chunks() -> None:
    whole, parts, many = (
        plan("deepseek-v2-lite", "h800", Options(prompt=16384, chunk=chunk)).phases["prefill"]
        for chunk in (16384, 4096, 512)
    )
    assert whole.tokens == parts.tokens == many.tokens == 16384
    assert whole.step_us < parts.step_us < many.step_us


def test_devices_without_fp8_say_what_they_do_instead() -> None:
    found = plan("deepseek-v2-lite", "a100", Options(batch=4))
    assert any("no FP8 matrix units" in note for note in found.notes)
    assert plan(*LITE).recipe.name == "deepseek-v3"
    assert not any("FP8" in note for note in plan(*LITE).notes)


@pytest.mark.parametrize("name", ["deepseek-v2", "moonlight-16b", "kimi-k2", "bench-4b", "tiny-deepseek-v3"])
def test_every_model_has_a_plan(name: str) -> None:
    limit = 256 if name.startswith("tiny") else 4096
    for target in ("cpu", "h100"):
        found = plan(name, target, Options(batch=2, context=limit, prompt=limit, chunk=limit))
        assert found.time_per_token_ms > 0
        assert found.first_token_ms > 0
