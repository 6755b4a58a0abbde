"""Rows: the declarative form of one call, as `moec cost` and its files take it, checked against one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from moec.errors import near
from moec.targets.cost import attention, experts, gemm, network, stream
from moec.targets.cost.errors import UnknownOp, WrongRow
from moec.targets.cost.result import Cost
from moec.targets.schema import Target

Row = Mapping[str, Any]

_MOST: Final = 1 << 50
_WITHOUT_MEANING: Final = frozenset({"op", "time_us", "name", "source"})
"""Keys of every row that do not change the cost: a measurement's time, labels."""


@dataclass(frozen=True)
class Key:
    """A key of a row: a whole number of at least `low`, one of `choices`, a flag, or numbers for each group."""

    doc: str
    default: Any = None
    required: bool = True
    low: int = 1
    choices: tuple[str, ...] = ()
    flag: bool = False
    per_group: bool = False


@dataclass(frozen=True)
class Op:
    """An op of the cost model: what it is, the keys of its rows, and its cost."""

    doc: str
    keys: Mapping[str, Key]
    cost: Callable[[Target, Mapping[str, Any]], Cost]


def _optional(doc: str, default: int, low: int = 1) -> Key:
    return Key(doc, default, required=False, low=low)


def _choice(doc: str, choices: tuple[str, ...], default: str | None = None) -> Key:
    return Key(doc, default, required=default is None, choices=choices)


_DTYPE = _choice(
    "element type of weights and activations", ("bf16", "fp8", "fp8_block", "fp8_weight", "mxfp4_weight", "f32")
)
_WIRE = ("bf16", "fp8", "fp8_block", "f32")
_LAYOUT = ("contiguous", "masked")
_FORMS = ("absorbed", "plain")
_HEADS = Key("heads on this device")
_WIDTHS = {
    "kv_rank": _optional("width of the shared latent", 512),
    "rope": _optional("width of the rotary part", 64, low=0),
    "nope": _optional("width of a plain key without the rotary part", 128),
    "v_head": _optional("width of a plain value", 128),
}


def _per_group(row: Mapping[str, Any]) -> list[int]:
    rows, groups = row["m_per_group"], row["groups"]
    if isinstance(rows, int):
        return [rows] * groups
    if len(rows) != groups:
        raise WrongRow(op="grouped_gemm", message=f"m_per_group has {len(rows)} numbers for {groups} groups")
    if not any(rows):
        raise WrongRow(op="grouped_gemm", message="m_per_group is all zero: there is nothing to compute")
    return list(rows)


def _wide(row: Mapping[str, Any], form: str) -> attention.Widths:
    return attention.widths(form, row["kv_rank"], row["rope"], row["nope"], row["v_head"])


def _prefill(target: Target, row: Mapping[str, Any]) -> Cost:
    new, context = row["new_tokens"], row["context"]
    if context < new:
        message = f"context ({context}) counts the new tokens too, so it is at least new_tokens ({new})"
        raise WrongRow(op="mla_prefill", message=message)
    wide = _wide(row, row["form"])
    return attention.mla_prefill(target, row["batch"], new, context, row["heads"], wide)


def _grouped(target: Target, row: Mapping[str, Any]) -> Cost:
    """Each head of keys and values is a request of its own, which its share of the query heads attend to."""
    heads, groups = row["heads"], row["kv_heads"]
    if heads % groups:
        raise WrongRow(op="gqa_decode", message=f"heads ({heads}) must be a multiple of kv_heads ({groups})")
    wide = attention.Widths(row["dim"], row["v_head"], False)
    return attention.mla_decode(
        target, row["batch"] * groups, row["context"], heads // groups, "bf16", wide, row["queries"]
    )


def _exchange(direction: str, wire: str) -> Op:
    def cost(target: Target, row: Mapping[str, Any]) -> Cost:
        tokens, hidden, top_k, count, ep = (row[k] for k in ("tokens", "hidden", "top_k", "experts", "ep"))
        if top_k > count:
            raise WrongRow(op=f"moe_{direction}", message=f"top_k ({top_k}) is more than experts ({count})")
        if row["mode"] == "normal":
            return network.normal(target, tokens, hidden, top_k, ep, row["dtype"], row["max_nodes"])
        return network.low_latency(target, direction, tokens, hidden, top_k, count, ep, row["dtype"])

    keys = {
        "tokens": Key("tokens of one device"),
        "hidden": Key("width of a token"),
        "top_k": Key("experts of a token"),
        "experts": Key("experts over all devices, replicas included"),
        "ep": Key("devices that share the experts; beyond one node over the scale-out link"),
        "mode": _choice("point to point, or forwarded and deduplicated", ("low_latency", "normal"), "low_latency"),
        "dtype": _choice("element type on the wire", _WIRE, wire),
        "max_nodes": _optional("nodes that node-limited routing allows a token (normal mode)", 4),
    }
    return Op(f"{direction} between tokens and the devices of their experts", keys, cost)


def _collective(name: str) -> Op:
    keys = {"bytes": Key("whole buffer of one device", low=0), "ranks": Key("devices that take part")}
    return Op(
        f"{name.replace('_', '-')} over `ranks` devices",
        keys,
        lambda target, row: network.collective(target, name, row["bytes"], row["ranks"]),
    )


OPS: Final[dict[str, Op]] = {
    "gemm": Op(
        "[m, k] x [k, n]",
        {
            "m": Key("rows of the activations"),
            "n": Key("columns of the weight"),
            "k": Key("shared width"),
            "dtype": _DTYPE,
            "quantise_a": Key("whether BF16 activations are quantised first", False, required=False, flag=True),
        },
        lambda target, r: gemm.gemm(target, r["m"], r["n"], r["k"], r["dtype"], r["quantise_a"]),
    ),
    "grouped_gemm": Op(
        "one product for each group",
        {
            "groups": Key("number of groups"),
            "m_per_group": Key("rows of each group: one number, or a list", low=0, per_group=True),
            "n": Key("columns of each weight"),
            "k": Key("shared width"),
            "dtype": _DTYPE,
            "layout": _choice("rows packed one after the other, or each group padded", _LAYOUT, "contiguous"),
        },
        lambda target, r: gemm.grouped_gemm(target, _per_group(r), r["n"], r["k"], r["dtype"], r["layout"]),
    ),
    "quantise": Op(
        "BF16 to FP8 with 1x128 scales",
        {"rows": Key("rows"), "columns": Key("columns")},
        lambda target, r: gemm.quantise(target, r["rows"], r["columns"]),
    ),
    "mla_decode": Op(
        "absorbed latent attention over a cache",
        {
            "batch": Key("requests"),
            "context": Key("cached tokens that each attends to"),
            "heads": _HEADS,
            "kv_dtype": _choice("element type of the cache", ("bf16", "fp8"), "bf16"),
            "queries": _optional("new tokens of each request (more than one with speculation)", 1),
            **_WIDTHS,
        },
        lambda target, r: attention.mla_decode(
            target, r["batch"], r["context"], r["heads"], r["kv_dtype"], _wide(r, "absorbed"), r["queries"]
        ),
    ),
    "gqa_decode": Op(
        "attention of grouped heads over a cache of keys and values per head, by the kernel of mla_decode",
        {
            "batch": Key("requests"),
            "context": Key("cached tokens that each attends to"),
            "heads": _HEADS,
            "kv_heads": Key("heads of keys and values on this device"),
            "dim": Key("width of a query and of a key"),
            "v_head": Key("width of a value"),
            "queries": _optional("new tokens of each request", 1),
        },
        _grouped,
    ),
    "mla_prefill": Op(
        "causal latent attention of new tokens",
        {
            "batch": Key("requests"),
            "new_tokens": Key("new tokens of each"),
            "context": Key("tokens attended to, the new ones included"),
            "heads": _HEADS,
            "form": _choice("absorbed (over the latent) or plain (keys and values unpacked)", _FORMS, "absorbed"),
            **_WIDTHS,
        },
        _prefill,
    ),
    "moe_experts": Op(
        "gate, up and down products of a device's experts",
        {
            "rows": Key("token-expert pairs that arrive, spread evenly"),
            "experts": Key("experts on this device"),
            "hidden": Key("width of a token"),
            "inter": Key("width inside an expert"),
            "dtype": _DTYPE,
            "layout": _choice("rows packed one after the other, or each expert padded", _LAYOUT, "masked"),
        },
        lambda target, r: experts.moe_experts(
            target, r["rows"], r["experts"], r["hidden"], r["inter"], r["dtype"], r["layout"]
        ),
    ),
    "router": Op(
        "gate product and choice of experts",
        {"tokens": Key("tokens"), "hidden": Key("width of a token"), "experts": Key("experts to choose from")},
        lambda target, r: stream.router(target, r["tokens"], r["hidden"], r["experts"]),
    ),
    "stream": Op(
        "a memory-bound kernel: norm, activation, copy",
        {"bytes": Key("device memory traffic", low=0), "flops": _optional("vector operations", 0, low=0)},
        lambda target, r: stream.stream(target, r["bytes"], r["flops"]),
    ),
    "moe_dispatch": _exchange("dispatch", "fp8"),
    "moe_combine": _exchange("combine", "bf16"),
    "send": Op(
        "one device to another, as between pipeline stages",
        {
            "bytes": Key("size of the message", low=0),
            "across": Key("whether the other is on another node", False, required=False, flag=True),
        },
        lambda target, r: network.send(target, r["bytes"], r["across"]),
    ),
    "all_reduce": _collective("all_reduce"),
    "all_gather": _collective("all_gather"),
    "reduce_scatter": _collective("reduce_scatter"),
    "all_to_all": _collective("all_to_all"),
}


def op_time(row: Row, target: Target) -> Cost:
    """The cost of one row on one device of `target`.

    Raises UnknownOp, WrongRow (missing, unknown or impossible keys), NoLink or Uncalibrated.
    """
    values = checked(row)
    return OPS[row["op"]].cost(target, values)


def checked(row: Row) -> dict[str, Any]:
    """The row's values with defaults filled in; UnknownOp or WrongRow when it is no row."""
    op = row.get("op")
    if not isinstance(op, str) or op not in OPS:
        raise UnknownOp(op=op, hint=near(str(op), list(OPS)))
    keys = OPS[op].keys
    for name in row:
        if name not in keys and name not in _WITHOUT_MEANING:
            raise WrongRow(op=op, message=f"unknown key {name!r}{near(str(name), list(keys))}")
    missing = [name for name, key in keys.items() if key.required and name not in row]
    if missing:
        docs = "; ".join(f"{name}: {keys[name].doc}" for name in missing)
        raise WrongRow(op=op, message=f"missing {', '.join(missing)} ({docs})")
    return {name: _value(op, name, key, row[name]) if name in row else key.default for name, key in keys.items()}


def _value(op: str, name: str, key: Key, value: Any) -> Any:
    if key.choices:
        if value not in key.choices:
            raise WrongRow(op=op, message=f"{name} is {value!r}; it must be one of {', '.join(key.choices)}")
        return value
    if key.flag:
        if not isinstance(value, bool):
            raise WrongRow(op=op, message=f"{name} is {value!r}; it must be true or false")
        return value
    if key.per_group and isinstance(value, list | tuple):
        return [_whole(op, f"{name}[{index}]", key.low, item) for index, item in enumerate(value)]
    return _whole(op, name, 1 if key.per_group else key.low, value)


def _whole(op: str, name: str, low: int, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= _MOST:
        raise WrongRow(op=op, message=f"{name} is {value!r}; it must be a whole number from {low} to 2^50")
    return value
