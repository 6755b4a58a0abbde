"""The module of one pipeline stage: its entries under their plain names, its layers' weights alone."""

from __future__ import annotations

from dataclasses import replace

from moec.ir import Module, WeightRef
from moec.ir.mesh import mesh_of
from moec.ir.module import ENTRIES
from moec.ir.rewrite import clone_module, remove_unused


def stage_module(module: Module, stage: int) -> Module:
    """What the ranks of a stage run; the module itself where there is one stage."""
    if mesh_of(module).pp == 1:
        return module
    out = clone_module(module)
    for name, function in list(out.functions.items()):
        if "stage" not in function.attrs:
            continue
        del out.functions[name]
        if function.attrs["stage"] == stage:
            function.name = name.removesuffix(f".{stage}")
            out.functions[function.name] = function
    remove_unused(out)
    for name, layers in _layers(out).items():
        weight = out.weights[name]
        (index, _, _), *rest = weight.indices
        out.weights[name] = replace(weight, indices=((index, layers.start, layers.stop), *rest))
    return out


def with_entries(module: Module, other: Module, names: list[str]) -> Module:
    """A copy of a module whose entries `names`, and what they call, are those of another one with the same weights."""
    out, donor = clone_module(module), clone_module(other)
    others = [n for n in out.functions if n.partition(".")[0] in ENTRIES and n not in names]
    kept = {called for name in others for called in _reached(out, name)}
    for name in names:
        for called in _reached(out, name).keys() - kept:
            del out.functions[called]
    taken = {called for name in names for called in _reached(donor, name)}
    # What is called stands before who calls it.
    out.functions = {**{n: f for n, f in donor.functions.items() if n in taken}, **out.functions}
    return out


def _reached(module: Module, name: str) -> dict[str, None]:
    """A function and those that it calls."""
    found = {name: None}
    for op in module.functions[name].ops:
        if "func" in op.attrs:
            found |= _reached(module, str(op.attrs["func"]))
    return found


def _layers(module: Module) -> dict[str, range]:
    """The layers in which each weight with a layer index is used."""
    found: dict[str, range] = {}
    for _, op in module.ops():
        if op.name != "repeat":
            continue
        first, last = op.attrs["first"], op.attrs["last"]
        assert isinstance(first, int) and isinstance(last, int)
        for inner in module.functions[str(op.attrs["func"])].ops:
            for ref in (o for o in inner.operands if isinstance(o, WeightRef)):
                indices = module.weights[ref.name].indices
                if indices and indices[0][0] == "l":
                    old = found.get(ref.name, range(first, last + 1))
                    found[ref.name] = range(min(old.start, first), max(old.stop, last + 1))
    return found
