"""Pipeline stages: the layers divided over `pp`, each stage an entry function of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from moec.ir import Function, Module, Op, TensorType, Value
from moec.ir.mesh import Mesh
from moec.ir.optable import OPS, infer
from moec.ir.rewrite import clone_function, fresh_names, remove_dead
from moec.passes.base import Outcome, PassError
from moec.passes.sharding.edit import PASS


def split_stages(module: Module, mesh: Mesh, out: Outcome) -> int:
    """Replace every entry `@name` by `@name.0` .. `@name.(pp - 1)`; returns how many stages were made."""
    if mesh.pp == 1:
        return 0
    called = {str(op.attrs["func"]) for _, op in module.ops() if op.name == "repeat"}
    entries = [f for f in module.functions.values() if f.name not in called]
    for entry in entries:
        ranges = _layers(entry, mesh.pp)
        for stage in range(mesh.pp):
            name = f"{entry.name}.{stage}"
            function = _stage(module, entry, name, stage, mesh, ranges[stage])
            _own_layers(module, function, stage)
            module.functions[name] = function
        del module.functions[entry.name]
    for name in called:
        del module.functions[name]
    shown = ", ".join(f"{layers.start}-{layers.stop - 1}" for layers in _layers(entries[0], mesh.pp))
    out.notes.append(f"layers of the stages: {shown}")
    return mesh.pp * len(entries)


def _own_layers(module: Module, function: Function, stage: int) -> None:
    """Give a stage its own copies of layer functions: later passes schedule each stage alone."""
    for op in [o for o in function.ops if o.name == "repeat"]:
        name = str(op.attrs["func"])
        copy = f"{name}.{stage}"
        module.functions[copy] = clone_function(module.functions[name], copy)
        op.attrs["func"] = copy


def _layers(entry: Function, stages: int) -> list[range]:
    """The layers of each stage, as even as they go; raises PassError when there are too few."""
    repeats = [op for op in entry.ops if op.name == "repeat"]
    bounds = [(op.attrs["first"], op.attrs["last"]) for op in repeats]
    total = sum(b - a + 1 for a, b in bounds if isinstance(a, int) and isinstance(b, int))
    if total < stages:
        raise PassError(name=PASS, message=f"PP {stages} for {total} layers; choose at most PP {max(1, total)}")
    start = min(int(op.attrs["first"]) for op in repeats)  # type: ignore[arg-type]
    cuts = [start + total * s // stages for s in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(cuts)]


def _stage(module: Module, entry: Function, name: str, stage: int, mesh: Mesh, layers: range) -> Function:
    function = clone_function(entry, name)
    function.attrs["stage"] = stage
    last = mesh.pp - 1
    ops: list[Op] = []
    new: dict[Value, Value] = {}
    repeats = [op for op in function.ops if op.name == "repeat"]
    for op in function.ops:
        op.operands = [new.get(o, o) if isinstance(o, Value) else o for o in op.operands]
        if op.name != "repeat":
            ops.append(op)
            continue
        if op is repeats[0] and stage > 0:
            received = _receive(module, op.operands[0], mesh, stage - 1, "activations", op)
            ops.append(received)
            op.operands[0] = received.result
        first, stop = _meet(op, layers)
        if first < stop:
            op.attrs["first"], op.attrs["last"] = first, stop - 1
            ops.append(op)
        else:
            assert isinstance(op.operands[0], Value)
            new[op.results[0]] = op.operands[0]
        if op is repeats[-1] and stage < last:
            value = new.get(op.results[0], op.results[0])
            ops.append(_op(module, "comm.send", [value], {**_pp(mesh), "to": stage + 1}, op))
    function.ops = ops
    function.returns = [new.get(v, v) for v in function.returns]
    result = function.returns[0]
    near = function.producer()[result]
    if stage < last:
        received = _receive(module, result, mesh, last, "logits", near)
        ops.append(received)
        function.returns = [received.result]
    else:
        ops += [_op(module, "comm.send", [result], {**_pp(mesh), "to": other}, near) for other in range(last)]
    remove_dead(function)
    fresh_names(function)
    return function


def _meet(op: Op, layers: range) -> tuple[int, int]:
    """The layers of a `repeat` that a stage runs, as first and stop."""
    return max(int(op.attrs["first"]), layers.start), min(int(op.attrs["last"]) + 1, layers.stop)  # type: ignore[arg-type]


def _pp(mesh: Mesh) -> dict[str, str | int]:
    return {"axis": "pp", "ranks": mesh.pp}


def _receive(module: Module, like: object, mesh: Mesh, source: int, carries: str, near: Op) -> Op:
    """A receive of a value of the type of `like`."""
    t = like.type if isinstance(like, Value) else None
    assert isinstance(t, TensorType) and len(t.shape) == 2 and isinstance(t.shape[1], int)
    attrs = {**_pp(mesh), "source": source, "dtype": t.dtype, "rows": str(t.shape[0]), "width": t.shape[1]}
    return _op(module, "comm.recv", [], {**attrs, "carries": carries}, near)


def _op(module: Module, name: str, operands: Sequence[Value], attrs: dict[str, str | int], near: Op) -> Op:
    results = [Value(f"{name}.{i}", t) for i, t in enumerate(infer(OPS[name], operands, attrs, module))]
    return Op(name, list(operands), dict(attrs), results, near.loc.through(PASS) if near.loc else None)
