"""share-heads: products per head read their slices from a weight that is stored whole anyway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moec.ir import Function, Module, Op, TensorType, Weight, WeightRef
from moec.ir.builder import weight_ref
from moec.ir.rewrite import retype
from moec.passes.base import Context, Outcome, Pass

Step = tuple[str, tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class Slice:
    """Rows `part` = (start, stop, rows of a head) of the matrix `of`, each head's transposed or not."""

    of: str
    part: tuple[int, int, int]
    transposed: bool


@dataclass(frozen=True)
class ShareHeads(Pass):
    """Let absorbed and plain attention read one copy of the latent's up-projection.

    Consumes `linear.heads` over a weight whose program slices the program of another weight by head, where both are in
    use and hold the same elements under the same scale blocks; produces `linear.heads` with `part` (and `transposed`)
    over that other weight. The slices are no longer stored. Tolerance 0: the values are the same. On CPUs the row-lane
    layout fixes which dim a kernel walks, so a transposed slice stays a copy of its own.
    """

    name: ClassVar[str] = "share-heads"

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        if ctx.target.kind == "cpu":
            out.warnings.append(f"kernels of {ctx.target.name} read slices by head in a layout of their own")
            return out
        whole = _read_whole(module)
        shared: dict[str, str] = {}
        alone: set[str] = set()
        for _, op in module.ops():
            ref = op.operands[1] if op.name == "linear.heads" and "part" not in op.attrs else None
            if not isinstance(ref, WeightRef):
                continue
            found = next((s for name in whole if (s := slice_of(module.weights[ref.name], module.weights[name]))), None)
            if found is None:
                alone.add(ref.name)
                continue
            source = module.weights[found.of]
            if why := _cut_block(source, found):
                out.notes.append(f"@{ref.name} stays a copy of its own: {why}")
                continue
            op.operands[1] = weight_ref(source, ref.indices)
            op.attrs |= {"part": found.part, **({"transposed": True} if found.transposed else {})}
            shared[ref.name] = found.of
            out.matched += 1
        used = {o.name for _, op in module.ops() for o in op.operands if isinstance(o, WeightRef)}
        for name, of in shared.items():
            if name not in used:
                size = _bytes(module.weights.pop(name))
                out.notes.append(f"@{name} is read from @{of}: {size / 1e6:.1f} MB less")
        retype(module)
        if alone:
            out.notes.append(f"{', '.join(f'@{n}' for n in sorted(alone))}: nothing else reads what they are slices of")
        return out


def _read_whole(module: Module) -> list[str]:
    """Weights that a `linear` reads."""
    refs = (op.operands[1] for _, op in module.ops() if op.name == "linear")
    return list(dict.fromkeys(r.name for r in refs if isinstance(r, WeightRef)))


def slice_of(weight: Weight, of: Weight) -> Slice | None:
    """How `weight` is a slice by head of `of`, or None: their programs agree but for the slicing."""
    mine, whole = _steps(weight.program), _steps(of.program)
    at = next((i for i, (name, _) in enumerate(mine) if name == "weight.reshape"), None)
    if at is None or mine[:at] != whole[:at] or weight.indices != of.indices or at + 1 >= len(mine):
        return None
    shape = dict(mine[at][1])["shape"]
    name, given = mine[at + 1]
    cut = dict(given)
    if name != "weight.slice" or len(shape) != 3 or cut["axis"] != 1:
        return None
    rest = mine[at + 2 :]
    turned = bool(rest) and rest[0] == ("weight.transpose", (("perm", (0, 2, 1)),))
    if rest[turned:] != whole[at:] or not isinstance(of.type, TensorType) or len(of.type.shape) != 2:
        return None
    return Slice(of.name, (int(cut["start"]), int(cut["stop"]), int(shape[1])), turned)


def _steps(program: Function) -> list[Step]:
    """The ops of a program with their attributes; programs of several branches do not compare equal by accident."""
    numbers = {v: i for i, v in enumerate([*program.args, *(r for op in program.ops for r in op.results)])}
    return [(_named(op, numbers), tuple(sorted(op.attrs.items()))) for op in program.ops]


def _named(op: Op, numbers: dict[Any, int]) -> str:
    """The op's name, with the places of its operands where there are several."""
    return op.name if len(op.operands) < 2 else f"{op.name} {[numbers.get(o) for o in op.operands]}"


def _cut_block(weight: Weight, found: Slice) -> str:
    """Why the scales of a weight do not follow a slice of it, if so: a kernel has one for each tile that it sums."""
    t = weight.type
    assert isinstance(t, TensorType)
    if t.quant is None:
        return ""
    block = t.quant.block[0]
    start, stop, rows = found.part
    if block != t.quant.block[-1]:
        return f"scales of {t} lie along rows, a head's product runs across them"
    cut = block and any(n % block for n in found.part)
    return f"a head's rows {start}..{stop} of {rows} do not follow blocks of {block}" if cut else ""


def _bytes(weight: Weight) -> int:
    t = weight.type
    assert isinstance(t, TensorType)
    size = t.nbytes()
    assert isinstance(size, int)
    return size * weight.points()
