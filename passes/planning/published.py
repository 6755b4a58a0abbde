"""Closed forms beside the numbers that papers print: sizes, bounds and traffic that need no calibration.

Sources: "Insights into DeepSeek-V3", arXiv 2505.09343 (here: insights), and the DeepSeek-V3 technical report, arXiv
2412.19437 (report), DeepSeek-V2, arXiv 2405.04434, and the Kimi-K2 model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moec.ir import Module, TensorType
from moec.ir.stats import active_parameters, parameters, weight_elements
from moec.passes.planning.plan import hidden_size
from moec.targets import topology
from moec.targets.cost import closed_forms

MODELS = ("deepseek-v3", "deepseek-v2", "kimi-k2")
"""Presets whose modules `rows` takes."""


@dataclass(frozen=True)
class Row:
    """One number: `value` as computed here, `published` as printed there (None where nothing is printed)."""

    name: str
    value: float
    unit: str
    published: float | None
    source: str
    note: str = ""


def mtp_parameters(module: Module) -> tuple[int, int]:
    """Parameters of one multi-token-prediction module: with its projection [2 x hidden -> hidden], and without.

    One more layer of the last kind, two norms of its inputs and one of its output; embedding and head are shared
    (report, sec. 2.2).
    """
    stacked = [w for w in module.weights.values() if any(name == "l" for name, _, _ in w.indices)]
    last = max(stop for w in stacked for name, _, stop in w.indices if name == "l")
    layer = sum(
        weight_elements(w) // (stop - start)
        for w in stacked
        for name, start, stop in w.indices
        if name == "l" and stop == last
    )
    hidden = hidden_size(module)
    return layer + 2 * hidden * hidden + 3 * hidden, layer + 3 * hidden


def training_gflops(module: Module, sequence: int = 4096) -> float:
    """GFLOP of forward and backward for one token, causal attention."""
    embedding = sum(weight_elements(w) for w in module.weights.values() if w.name == "embed")
    layers, heads, key, value = attention_sizes(module)
    active = active_parameters(module)
    return closed_forms.training_flops_per_token(active, embedding, layers, heads, key, value, sequence) / 1e9


def attention_sizes(module: Module) -> tuple[int, int, int, int]:
    """Layers, heads, and widths of a key and of a value, of a module with attention in the plain form."""
    from moec.ir.optable import operand_type
    from moec.passes.planning.layout import layer_count

    attention = next(op for _, op in module.ops() if op.name == "attn.mla")
    query = operand_type(attention.operands[0])
    assert isinstance(query, TensorType)
    heads, key = (int(d) for d in query.shape[1:])  # type: ignore[arg-type]
    return layer_count(module), heads, key, int(attention.attrs["v"])  # type: ignore[arg-type]


def rows(modules: Mapping[str, Module]) -> list[Row]:
    """All rows; `modules`: the imported presets of MODELS."""
    return [*_caches(), *_parameters(modules), *_training(modules), *_speed(), *_traffic(), *_networks()]


def _caches() -> list[Row]:
    table = "insights, Table 1"
    unit = "B a token"
    return [
        Row("KV cache, DeepSeek-V3", closed_forms.mla_cache_bytes(61, 512, 64), unit, 70_272, table),
        Row("KV cache, Qwen-2.5 72B", closed_forms.gqa_cache_bytes(80, 8, 128), unit, 327_680, table),
        Row("KV cache, LLaMA-3.1 405B", closed_forms.gqa_cache_bytes(126, 8, 128), unit, 516_096, table),
    ]


def _parameters(modules: Mapping[str, Module]) -> list[Row]:
    found = []
    published = {
        "deepseek-v3": (671, 37, "report, sec. 1"),
        "deepseek-v2": (236, 21, "arXiv 2405.04434"),
        "kimi-k2": (1000, 32, "model card: 1 T"),
    }
    for name, (total, active, source) in published.items():
        module = modules[name]
        found.append(Row(f"parameters, {name}", parameters(module) / 1e9, "B", total, source))
        found.append(Row(f"active parameters, {name}", active_parameters(module) / 1e9, "B", active, source))
    whole, without = mtp_parameters(modules["deepseek-v3"])
    found.append(Row("MTP module, deepseek-v3", whole / 1e9, "B", 11.61, "checkpoint"))
    found.append(Row("MTP module without its projection", without / 1e9, "B", 11.51, "checkpoint"))
    return found


def _training(modules: Mapping[str, Module]) -> list[Row]:
    table, unit = "insights, Table 2", "GFLOP a token"
    qwen = closed_forms.training_flops_per_token(72.706e9, 152_064 * 8192, 80, 64, 128, 128, 4096) / 1e9
    llama = closed_forms.training_flops_per_token(405.85e9, 128_256 * 16_384, 126, 128, 128, 128, 4096) / 1e9
    other = "the convention that gives the other three rows does not give the printed number"
    return [
        Row("training, DeepSeek-V2", training_gflops(modules["deepseek-v2"]), unit, 155, table),
        Row("training, DeepSeek-V3", training_gflops(modules["deepseek-v3"]), unit, 250, table),
        Row("training, Qwen-2.5 72B", qwen, unit, 394, table, other),
        Row("training, LLaMA-3.1 405B", llama, unit, 2448, table),
    ]


def _speed() -> list[Row]:
    section = "insights, sec. 2.3.2"
    found = []
    for fabric, bandwidth, exchange, token, rate in (
        ("InfiniBand", 50e9, 120.96, 14.76, 67.0),
        ("NVL72", 900e9, 6.72, 0.82, 1200.0),
    ):
        paper = closed_forms.published_speed_limit(bandwidth)
        found += [
            Row(f"decode bound, {fabric}: exchange", paper.exchange * 1e6, "us", exchange, section),
            Row(f"decode bound, {fabric}: token", paper.token * 1e3, "ms", token, section, "hidden 7000, 61 layers"),
            Row(f"decode bound, {fabric}: rate", paper.tokens_per_s, "tokens/s", rate, section),
        ]
        for layers, note in ((61, "hidden 7168, 61 layers"), (58, "hidden 7168, 58 MoE layers")):
            real = closed_forms.speed_limit(bandwidth, hidden=7168, layers=layers, tokens=32, fan_out=9)
            name = f"decode bound, {fabric}, {layers} layers of the real width"
            found.append(Row(f"{name}: exchange", real.exchange * 1e6, "us", None, section, note))
            found.append(Row(f"{name}: token", real.token * 1e3, "ms", None, section, note))
    return found


def _traffic() -> list[Row]:
    traffic = closed_forms.routed_traffic(nodes=8, top_k=8, node_limit=4)
    section, unit = "insights, sec. 4.3", "copies a token"
    return [
        Row("scale-out traffic, most without forwarding", 8, unit, 8, section),
        Row("scale-out traffic, expected without forwarding", traffic.without_forwarding, unit, None, section),
        Row("scale-out traffic, most with forwarding", traffic.at_most, unit, 4, section),
        Row("scale-out traffic, expected with forwarding", traffic.with_forwarding, unit, None, section),
        Row(
            "experts at the price of four nodes",
            closed_forms.free_experts(160e9, 50e9, 4),
            "",
            13,
            "report, sec. 3.2.2",
        ),
    ]


def _networks() -> list[Row]:
    table = "insights, Table 3"
    found = []
    networks = {
        "FT2": (topology.fat_tree_2(64), 2048, 96, 2048, 9, 4.39),
        "MPFT": (topology.multi_plane_fat_tree_2(64, 8), 16_384, 768, 16_384, 72, 4.39),
        "FT3": (topology.fat_tree_3(64), 65_536, 5120, 131_072, 491, 7.5),
        "SF": (topology.slim_fly(64), 32_928, 1568, 32_928, 146, 4.4),
        "DF": (topology.dragonfly(64, 511), 261_632, 16_352, 384_272, 1522, 5.8),
    }
    prices = topology.Prices()
    for name, (net, endpoints, switches, links, cost, each) in networks.items():
        dollars = net.price(prices)
        found += [
            Row(f"{name}: endpoints", net.endpoints, "", endpoints, table),
            Row(f"{name}: switches", net.switches, "", switches, table),
            Row(f"{name}: links", net.all_links, "", links, table),
            Row(f"{name}: cost", dollars / 1e6, "M$", cost, table),
            Row(f"{name}: cost of an endpoint", dollars / net.endpoints / 1e3, "k$", each, table),
        ]
    return found
