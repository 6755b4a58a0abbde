"""mla-absorb: re-associate the latent up-projections of multi-head latent attention where that costs less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from moec.ir import Function, Module, Op, TensorType, Value, WeightRef
from moec.ir.builder import weight_ref
from moec.ir.dims import bind
from moec.ir.optable import OPS, operand_type
from moec.ir.rewrite import clone_function, derive_weight, fresh_names, remove_dead
from moec.passes.base import Context, Edit, Outcome, Pass, PassError
from moec.targets import Target

FORMS = ("auto", "absorbed", "plain")


@dataclass(frozen=True)
class MlaAbsorb(Pass):
    """Attend over the latent cache instead of expanded keys and values (DeepSeek-V2, arXiv 2405.04434, sec. 2.1.2).

    Consumes `attn.mla(q, linear(cache.read, kv_b))`; produces `linear.heads` with W_UK on the query side,
    `attn.mla_absorbed`, and `linear.heads` with W_UV behind it, (q·W_UK)·c = q·(W_UK·c). The form of each phase is the
    one whose ops cost less on the target at the compiled batch and context; `prefill` and `decode` force one. Results
    change by rounding only.
    """

    name: ClassVar[str] = "mla-absorb"
    tolerance: ClassVar[float] = 1e-5
    prefill: str = "auto"
    decode: str = "auto"

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        for function in list(module.functions.values()):
            phase = str(function.attrs.get("phase", ""))
            found = [op for op in function.ops if op.name == "attn.mla"]
            sites = [op for op in found if over_cached_latent(function, op)]
            if len(sites) < len(found):
                out.warnings.append(f"@{function.name}: keys and values are not one projection of a cached latent")
            if not sites:
                continue
            if phase not in ("prefill", "decode"):
                out.warnings.append(f"@{function.name}: attribute phase is neither prefill nor decode")
                continue
            form, reason = self.choose(module, function, phase, ctx)
            out.notes.append(f"@{function.name}: {form}, {reason}")
            out.matched += len(sites)
            if form == "absorbed":
                for op in sites:
                    absorb(module, function, op)
                remove_dead(function)
                fresh_names(function)
        if not any(op.name == "attn.mla" for _, op in module.ops()) and any(
            op.name == "attn.heads" for _, op in module.ops()
        ):
            out.notes.append("keys and values are cached per head: there is no latent to absorb")
        elif not out.matched and not out.warnings:
            out.warnings.append("no attn.mla over a cached latent: nothing to absorb")
        return out

    def choose(self, module: Module, function: Function, phase: str, ctx: Context) -> tuple[str, str]:
        """The form of a phase and the reason, with both predicted times."""
        wanted = self.prefill if phase == "prefill" else self.decode
        if wanted not in FORMS:
            raise PassError(name=self.name, message=f"{phase} must be one of {', '.join(FORMS)}, got {wanted!r}")
        absorbed = clone_function(function)
        for op in [o for o in absorbed.ops if o.name == "attn.mla" and over_cached_latent(absorbed, o)]:
            absorb(module, absorbed, op)
        remove_dead(absorbed)
        tokens = 1 if phase == "decode" else min(ctx.limits.chunk, ctx.limits.context)
        batch = ctx.limits.batch if phase == "decode" else 1
        times = {}
        for name, f in (("plain", function), ("absorbed", absorbed)):
            times[name] = predicted_time(f, tokens, ctx.limits.context, batch, ctx.target)
        shown = f"plain {times['plain'] * 1e6:.0f} us, absorbed {times['absorbed'] * 1e6:.0f} us a layer"
        shown += f" ({tokens} tokens of {batch} sequences at context {ctx.limits.context} on {ctx.target.name})"
        if wanted != "auto":
            return wanted, f"as asked ({shown})"
        return min(times, key=lambda k: times[k]), shown


def predicted_time(function: Function, tokens: int, context: int, batch: int, target: Target) -> float:
    """Seconds of one layer: for each op the larger of compute and memory time; weights are read once for the batch."""
    rows = {s: tokens for op in function.ops for r in op.results for s in r.type.symbols()}
    symbols = {**rows, "T": tokens, "S": context, "C": context, "B": 1, "N": 1, "P": 1, "R": 1}
    total = 0.0
    for op in function.ops:
        types = [operand_type(o) for o in op.operands]
        results = [r.type for r in op.results]
        rule = OPS[op.name]
        weights = sum(
            bind(t.nbytes(), symbols)
            for o, t in zip(op.operands, types, strict=True)
            if isinstance(o, WeightRef) and isinstance(t, TensorType)
        )
        moved = bind(rule.bytes_read(types, results, op.attrs), symbols)
        moved += bind(rule.bytes_written(types, results, op.attrs), symbols)
        flops = bind(rule.flops(types, results, op.attrs), symbols) * batch
        traffic = min(weights, moved) + max(0, moved - weights) * batch
        total += max(flops / target.device.matrix_rate(_dtype(op)), traffic / target.device.memory_bandwidth)
    return total


def _dtype(op: Op) -> str:
    first = op.operands[0].type if op.operands else None
    name = first.dtype if isinstance(first, TensorType) else "bf16"
    return {"f32": "fp32", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8"}.get(name, name)


def over_cached_latent(function: Function, op: Op) -> bool:
    """Whether an `attn.mla` reads keys and values that one unquantised weight projects from the cache."""
    producer = function.producer()
    kv = op.operands[1]
    project = producer.get(kv) if isinstance(kv, Value) else None
    if project is None or project.name != "linear" or len(project.operands) != 2:
        return False
    latent, up = project.operands
    read = producer.get(latent) if isinstance(latent, Value) else None
    plain = isinstance(up, WeightRef) and isinstance(up.type, TensorType) and not (up.type.quant or up.type.layout)
    return plain and read is not None and read.name == "cache.read"


def absorb(module: Module, function: Function, op: Op) -> None:
    """Replace one `attn.mla` over an up-projected cached latent by the absorbed form."""
    producer = function.producer()
    q, kv, _, seq, pos, _ = op.operands
    assert isinstance(q, Value) and isinstance(kv, Value)
    project = producer[kv]
    latent, up = project.operands[:2]
    assert isinstance(latent, Value) and isinstance(up, WeightRef)
    read = producer[latent]
    cache, layer, pages, _ = read.operands
    nope, v = int(op.attrs["nope"]), int(op.attrs["v"])  # type: ignore[arg-type]
    assert isinstance(q.type, TensorType)
    heads, width = int(q.type.shape[1]), int(q.type.shape[2])  # type: ignore[arg-type]
    w_uk, w_uv = _split_up_projection(module, up, heads, nope, v)
    edit = Edit(module, function, MlaAbsorb.name)
    q_nope, q_rope = edit.insert(op, "split", q, attrs={"sizes": (nope, width - nope)})
    (q_latent,) = edit.insert(op, "linear.heads", q_nope, w_uk)
    attrs = {"scale": op.attrs["scale"], "context": "C"}
    (summed,) = edit.insert(op, "attn.mla_absorbed", q_latent, q_rope, cache, layer, seq, pos, pages, attrs=attrs)
    op.name, op.operands, op.attrs = "linear.heads", [summed, w_uv], {}
    op.loc = edit.location(op.loc)


def _split_up_projection(module: Module, up: WeightRef, heads: int, nope: int, v: int) -> tuple[WeightRef, WeightRef]:
    """W_UK `[h, rank, nope]` and W_UV `[h, v, rank]` of `kv_b[h·(nope + v), rank]`, declared beside it."""
    source = module.weights[up.name]
    assert isinstance(source.type, TensorType)
    rank = int(source.type.shape[1])  # type: ignore[arg-type]
    by_head: tuple[str, dict[str, object]] = ("weight.reshape", {"shape": (heads, nope + v, rank)})
    steps: Mapping[str, list[tuple[str, dict[str, object]]]] = {
        "k": [
            by_head,
            ("weight.slice", {"axis": 1, "start": 0, "stop": nope}),
            ("weight.transpose", {"perm": (0, 2, 1)}),
        ],
        "v": [by_head, ("weight.slice", {"axis": 1, "start": nope, "stop": nope + v})],
    }
    refs = []
    for part, program in steps.items():
        name = f"{up.name}.{part}"
        if name not in module.weights:
            module.weights[name] = derive_weight(name, source, program)
        refs.append(weight_ref(module.weights[name], up.indices))
    return refs[0], refs[1]
