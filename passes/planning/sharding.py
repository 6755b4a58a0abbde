"""Which ops and weights tensor parallelism divides, read off the data flow of a function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moec.ir import Function, Module, Op, TensorType, Value, WeightRef

Role = Literal["whole", "column", "row", "heads", "tokens"]
"""Part of an op that one of `tp` devices does: all of it, its share of output columns, of the summed width (an
all-reduce follows), of the heads, or of the tokens."""

ATTENTION = ("attn.mla", "attn.mla_absorbed", "attn.heads")
_BEFORE_HEADS = ("unflatten", "rope", "split", "linear.heads", "norm.rms", "clamp")
_AFTER_HEADS = ("flatten", "linear.heads")


@dataclass(frozen=True)
class Cut:
    """A weight that tensor parallelism divides along `axis`; `heads` when head by head; `joined`: two parts in one.

    `groups` are the heads of keys and values in it: where they are fewer than the devices, several hold the same one.
    """

    name: str
    axis: int
    heads: int = 0
    joined: bool = False
    groups: int = 0

    def parts(self, tp: int) -> int:
        """Parts that `tp` devices make of it."""
        return min(tp, self.groups) if self.groups else tp


def roles(function: Function) -> dict[int, Role]:
    """The role of every op, by `id(op)`.

    Attention with a norm over the widths of all heads is whole: no device has all that the norm sums.
    """
    found: dict[int, Role] = {id(op): "whole" for op in function.ops}
    made = function.producer()
    users: dict[Value, list[Op]] = {}
    for op in function.ops:
        for operand in op.operands:
            if isinstance(operand, Value):
                users.setdefault(operand, []).append(op)
    for op in [] if wide_norm(function) else function.ops:
        if op.name == "cache.append_heads":
            found[id(op)] = "heads"
            for operand in op.operands[2:4]:
                _before(operand, made, found)
        if op.name in ATTENTION:
            found[id(op)] = "heads"
            for operand in op.operands[:2]:
                _before(operand, made, found)
            _after(op, users, found)
    routed = [op for op in function.ops if op.name == "moe.dispatch"]
    for op in [] if routed else function.ops:
        if op.name == "swiglu":
            _feed_forward(op, made, users, found)
    for op in routed:
        found.update(dict.fromkeys(map(id, routed_region(function, op)), "tokens"))
    return found


def routed_region(function: Function, dispatch: Op) -> list[Op]:
    """The ops that depend on what is dispatched and on nothing else that is computed: router, experts, shared ones."""
    inside: set[Value | WeightRef] = {dispatch.operands[0]}
    region = []
    for op in function.ops:
        values = [o for o in op.operands if isinstance(o, Value) and isinstance(o.type, TensorType)]
        if values and all(v in inside for v in values):
            region.append(op)
            inside.update(op.results)
    return region


def wide_norm(function: Function) -> bool:
    """Whether queries or keys pass a norm over all heads together before they are divided into heads."""
    made = function.producer()
    for op in function.ops:
        if op.name == "cache.append_heads" or op.name in ATTENTION:
            ahead: dict[int, Role] = {}
            for operand in op.operands[:4]:
                _before(operand, made, ahead)
            for norm in (o for o in function.ops if id(o) in ahead and o.name == "norm.rms"):
                t = norm.result.type
                assert isinstance(t, TensorType)
                if len(t.shape) == 2:
                    return True
    return False


def key_heads(function: Function) -> dict[int, int]:
    """Ops that make keys and values of attention with grouped heads, by `id(op)`, and how many heads of them."""
    made = function.producer()
    found: dict[int, int] = {}
    for op in (o for o in function.ops if o.name == "cache.append_heads"):
        keys = op.operands[2].type
        assert isinstance(keys, TensorType)
        ahead: dict[int, Role] = {}
        for operand in op.operands[2:4]:
            _before(operand, made, ahead)
        found.update(dict.fromkeys(ahead, int(keys.shape[1])))  # type: ignore[arg-type]
    return found


def before_attention(module: Module) -> set[str]:
    """Names of the weights whose product attention takes up directly."""
    found: set[str] = set()
    for function in module.functions.values():
        made = function.producer()
        ahead: dict[int, Role] = {}
        for op in (o for o in function.ops if o.name in ATTENTION):
            for operand in op.operands[:2]:
                _before(operand, made, ahead)
        for op in function.ops:
            weight = op.operands[1] if ahead.get(id(op)) == "column" else None
            if isinstance(weight, WeightRef):
                found.add(weight.name)
    return found


def _before(operand: object, made: dict[Value, Op], found: dict[int, Role]) -> None:
    op = made.get(operand) if isinstance(operand, Value) else None
    if op is not None and op.name in _BEFORE_HEADS:
        found[id(op)] = "heads"
        _before(op.operands[0], made, found)
    elif op is not None and op.name == "linear":
        found[id(op)] = "column"


def _after(op: Op, users: dict[Value, list[Op]], found: dict[int, Role]) -> None:
    for user in users.get(op.result, []):
        if user.name in _AFTER_HEADS:
            found[id(user)] = "heads"
            _after(user, users, found)
        elif user.name == "linear":
            found[id(user)] = "row"


def _feed_forward(op: Op, made: dict[Value, Op], users: dict[Value, list[Op]], found: dict[int, Role]) -> None:
    source = op.operands[0]
    up = made.get(source) if isinstance(source, Value) else None
    if up is not None and up.name == "linear":
        found[id(up)], found[id(op)] = "column", "column"
        for user in users.get(op.result, []):
            if user.name == "linear":
                found[id(user)] = "row"


def sharded_weights(module: Module) -> Iterator[Cut]:
    """The weights that tensor parallelism divides, once each."""
    seen: set[str] = set()
    for function in module.functions.values():
        for op, role in ((op, r) for op, r in zip(function.ops, roles(function).values(), strict=True)):
            weight = op.operands[1] if op.name == "linear" else None
            if role in ("column", "row") and isinstance(weight, WeightRef) and weight.name not in seen:
                seen.add(weight.name)
                heads, joined = _divided(function, op, role)
                groups = key_heads(function).get(id(op), 0)
                yield Cut(weight.name, 0 if role == "column" else 1, heads, joined, groups)


def _divided(function: Function, op: Op, role: Role) -> tuple[int, bool]:
    """Heads among which an attention projection is divided, and whether a weight holds gate and up."""
    attention = next((o for o in function.ops if o.name in ATTENTION), None)
    users = [o for o in function.ops if op.results[0] in o.operands]
    if any(o.name == "swiglu" for o in users):
        return 0, True
    source = next((o for o in function.ops if op.operands[0] in o.results), None)
    if (source is not None and source.name == "swiglu") or attention is None:
        return 0, False
    q = attention.operands[0].type
    assert isinstance(q, TensorType)
    return int(q.shape[1]), False  # type: ignore[arg-type]
