"""What must hold on any target: more work never takes less time, faster hardware never more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec import targets
from moec.targets import Target
from moec.targets.cost import op_time
from moec.targets.cost.physics import throttled

NAMES = ["h800-ep144", "h20", "h200", "b200", "mi300x"]
SIZES = st.integers(1, 8192)
WIDTHS = st.sampled_from([512, 1536, 2048, 4096, 7168])
HEADS = st.sampled_from([8, 16, 32, 64, 128])
DTYPES = st.sampled_from(["bf16", "fp8", "fp8_block"])

rows: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"op": st.just("gemm"), "m": SIZES, "n": WIDTHS, "k": WIDTHS, "dtype": DTYPES}),
    st.fixed_dictionaries(
        {"op": st.just("mla_decode"), "batch": st.integers(1, 512), "context": SIZES, "heads": HEADS}
    ),
    st.fixed_dictionaries(
        {"op": st.just("mla_prefill"), "batch": st.integers(1, 64), "new_tokens": st.just(64),
         "context": st.integers(64, 8192), "heads": HEADS}
    ),
    st.fixed_dictionaries(
        {"op": st.just("moe_experts"), "rows": SIZES, "experts": st.integers(1, 64), "hidden": WIDTHS,
         "inter": WIDTHS, "dtype": DTYPES}
    ),
    st.fixed_dictionaries(
        {"op": st.sampled_from(["moe_dispatch", "moe_combine"]), "tokens": SIZES, "hidden": WIDTHS,
         "top_k": st.integers(1, 8), "experts": st.sampled_from([64, 256, 288]),
         "ep": st.sampled_from([8, 16, 32, 64, 144]), "mode": st.sampled_from(["low_latency", "normal"])}
    ),
    st.fixed_dictionaries(
        {"op": st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]),
         "bytes": st.integers(0, 1 << 30), "ranks": st.sampled_from([2, 8, 16, 64, 144])}
    ),
)  # fmt: skip


def bounds_us(row: dict[str, Any], target: Target) -> float:
    """No op beats the data sheet: useful work at peak rate, and its traffic at peak bandwidth."""
    cost, device = op_time(row, target), target.device
    network = row["op"].startswith(("moe_d", "moe_c", "all_", "reduce"))
    if network:
        link = max(target.scale_up().bandwidth, target.node.scale_out_per_device)
        return cost.sent_bytes / link * 1e6
    rate = device.matrix_rate("fp8") if "dtype" in row and row["dtype"] != "bf16" else device.matrix_rate("bf16")
    return max(cost.flops / rate, cost.bytes / device.memory_bandwidth) * 1e6


@settings(max_examples=150, deadline=None)
@given(rows, st.sampled_from(NAMES))
def test_nothing_beats_the_data_sheet(row: dict[str, Any], name: str) -> None:
    target = targets.load(name)
    assert op_time(row, target).time_us >= 0.97 * bounds_us(row, target)


GROWING = {
    "gemm": "m",
    "mla_decode": "context",
    "mla_prefill": "context",
    "moe_experts": "rows",
    "moe_dispatch": "tokens",
    "moe_combine": "tokens",
    "all_reduce": "bytes",
    "all_gather": "bytes",
    "reduce_scatter": "bytes",
    "all_to_all": "bytes",
}


@settings(max_examples=150, deadline=None)
@given(rows, st.sampled_from(NAMES))
def test_sixteen_times_the_work_takes_longer(row: dict[str, Any], name: str) -> None:
    """Tiles and waves make small steps uneven; sixteen-fold work is beyond all of that, and flops grow with it."""
    target, key = targets.load(name), GROWING[row["op"]]
    more = {**row, key: row[key] * 16}
    small, large = op_time(row, target), op_time(more, target)
    assert large.time_us >= small.time_us * 0.999
    assert large.bytes >= small.bytes
    assert large.flops >= small.flops
    assert large.sent_bytes >= small.sent_bytes


@settings(max_examples=100, deadline=None)
@given(rows, st.sampled_from(["memory", "matrix", "scale_up", "scale_out"]))
def test_faster_hardware_is_never_slower(row: dict[str, Any], part: str) -> None:
    slow = targets.load("h800-ep144")
    node, device = slow.node, slow.device
    if part == "memory":
        fast = replace(slow, device=replace(device, memory_bandwidth=2 * device.memory_bandwidth))
    elif part == "matrix":
        fast = replace(slow, device=replace(device, matrix_rates={k: 2 * v for k, v in device.matrix_rates.items()}))
    elif part == "scale_up":
        link = slow.scale_up()
        fast = replace(slow, node=replace(node, scale_up=replace(link, bandwidth=2 * link.bandwidth)))
    else:
        link = slow.scale_out()
        fast = replace(slow, node=replace(node, scale_out=replace(link, bandwidth=2 * link.bandwidth)))
    assert op_time(row, fast).time_us <= op_time(row, slow).time_us * (1 + 1e-9)


def test_uneven_groups_cost_as_many_tiles_as_they_fill() -> None:
    target = targets.load("h800")
    row = {"op": "grouped_gemm", "n": 4096, "k": 7168, "dtype": "fp8_block"}
    even = op_time({**row, "groups": 4, "m_per_group": 256}, target)
    skewed = op_time({**row, "groups": 4, "m_per_group": [1021, 1, 1, 1]}, target)
    empty = op_time({**row, "groups": 4, "m_per_group": [1024, 0, 0, 0]}, target)
    assert even.flops == skewed.flops == empty.flops
    assert skewed.time_us > even.time_us
    assert empty.bytes < skewed.bytes == even.bytes


def test_without_fp8_units_weights_are_still_half_the_bytes() -> None:
    a100 = targets.load("a100")
    row = {"op": "gemm", "m": 1, "n": 7168, "k": 16384}
    fp8, bf16 = (op_time({**row, "dtype": dtype}, a100) for dtype in ("fp8_block", "bf16"))
    assert fp8.time_us < 0.6 * bf16.time_us
    large = {**row, "m": 16384}
    fp8, bf16 = (op_time({**large, "dtype": dtype}, a100) for dtype in ("fp8_block", "bf16"))
    assert fp8.time_us == pytest.approx(bf16.time_us, rel=0.25)


def test_longer_messages_wait_less() -> None:
    """Latency shows on small collectives, bandwidth on large ones."""
    target = targets.load("h800-ep32")
    row = {"op": "all_reduce", "ranks": 32}
    assert op_time({**row, "bytes": 1024}, target).bound == "latency"
    assert op_time({**row, "bytes": 1 << 30}, target).bound == "network"


def test_long_products_lose_clock() -> None:
    """A short product runs at the full clock, a long one at what the power limit sustains."""
    target = targets.load("h100")
    assert throttled(target, 5e-6, sustained=0.8) == pytest.approx(5e-6, rel=0.01)
    assert throttled(target, 0.1, sustained=0.8) == pytest.approx(0.1 / 0.8, rel=0.01)
    assert throttled(target, 0.1, sustained=1.0) == 0.1


DOUBLINGS = [1, 2, 3, 4, 8, 16, 17, 32, 64, 100, 128, 256, 512, 1000, 2048, 8192, 65536]
FAR: list[tuple[str, dict[str, Any]]] = [
    *(("m", {"op": "gemm", "n": n, "k": k, "dtype": dtype})
      for n, k in ((1, 1), (100, 100), (576, 7168), (2112, 7168), (129280, 7168)) for dtype in ("bf16", "fp8")),
    *(("m", {"op": "gemm", "n": n, "k": k, "dtype": "fp8_block"}) for n, k in ((576, 512), (24576, 1536))),
    *(("n", {"op": "gemm", "m": m, "k": 7168, "dtype": dtype}) for m in (1, 7, 128) for dtype in ("bf16", "fp8_block")),
    *(("k", {"op": "gemm", "m": m, "n": 4096, "dtype": dtype}) for m in (1, 4096) for dtype in ("bf16", "fp8_block")),
    *(("context", {"op": "mla_decode", "batch": batch, "heads": heads, "kv_dtype": dtype})
      for batch in (1, 32, 1024) for heads in (1, 8, 16, 128) for dtype in ("bf16", "fp8")),
    *(("batch", {"op": "mla_decode", "context": context, "heads": heads})
      for context in (1, 300, 131072) for heads in (8, 128)),
    *(("heads", {"op": "mla_decode", "batch": batch, "context": context})
      for batch in (1, 128) for context in (1, 8192)),
    *(("new_tokens", {"op": "mla_prefill", "batch": 1, "context": 65536, "heads": heads, "form": form})
      for heads in (1, 128) for form in ("plain", "absorbed")),
    *(("rows", {"op": "moe_experts", "experts": experts, "hidden": 7168, "inter": 2048, "dtype": dtype,
                "layout": layout})
      for experts in (1, 8, 256) for dtype in ("bf16", "fp8_block") for layout in ("masked", "contiguous")),
]  # fmt: skip


@pytest.mark.parametrize("name", ["h100", "h200", "h800", "a100", "mi300x", "cpu"])
def test_far_outside_the_fit_more_work_still_takes_longer(name: str) -> None:
    """One expert, one head, single rows, odd widths, a million tokens: tiles and waves may save a tenth, not more."""
    target = targets.load(name)
    for key, row in FAR:
        before = 0.0
        for value in DOUBLINGS:
            cost = op_time({**row, key: value}, target)
            assert 0 < cost.time_us < 1e12
            assert cost.time_us >= 0.9 * before, (row, key, value)
            before = cost.time_us


def test_attention_of_a_cpu_runs_on_the_units_that_its_kernels_use() -> None:
    """Matrix tiles for the latent cache where there is AMX; FP32 on vector units for the rest."""
    device = targets.load("cpu").device
    rates = {**device.matrix_rates, "bf16": 1e15}
    decode = {"op": "mla_decode", "batch": 1, "context": 4096, "heads": 16}
    prefill = {"op": "mla_prefill", "batch": 1, "new_tokens": 256, "context": 4096, "heads": 16}

    def on(isa: tuple[str, ...], row: dict[str, Any], **change: Any) -> float:
        return op_time(row, replace(targets.load("cpu"), device=replace(device, isa=isa, **change))).time_us

    for row, isa, same in ((decode, ("avx2",), True), (decode, ("amx_bf16",), False), (prefill, ("amx_bf16",), True)):
        assert (on(isa, row, matrix_rates=rates) == on(isa, row)) == same


def test_half_the_heads_under_tensor_parallelism_never_cost_more() -> None:
    target = targets.load("h200")
    for batch in (1, 16, 128, 512):
        for context in (128, 2048, 32768):
            row = {"op": "mla_decode", "batch": batch, "context": context}
            times = [op_time({**row, "heads": heads}, target).time_us for heads in (8, 16, 32, 64, 128)]
            assert times == sorted(times)
            assert times[-1] < 16 * times[0]


def test_more_bandwidth_alone_helps_as_far_as_memory_binds() -> None:
    """The H200 is the H100 with other memory: between the same time and the ratio of their bandwidths."""
    h100, h200 = targets.load("h100"), targets.load("h200")
    ratio = h200.device.memory_bandwidth / h100.device.memory_bandwidth
    for key, row in FAR:
        for value in (1, 128, 8192):
            slow, fast = (op_time({**row, key: value}, target).time_us for target in (h100, h200))
            assert 1 - 1e-9 <= slow / fast <= ratio + 1e-9
    decode = {"op": "mla_decode", "batch": 256, "context": 32768, "heads": 16}
    assert op_time(decode, h100).time_us / op_time(decode, h200).time_us > 0.9 * ratio
