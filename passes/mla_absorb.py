"""mla-absorb: re-associate the latent up-projections of multi-head latent attention where that costs less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from moec.ir import Function, Module, Op, TensorType, Value, WeightRef
from moec.ir.builder import weight_ref
from moec.ir.patterns import Pattern, match
from moec.ir.rewrite import clone_function, derive_weight, fresh_names, remove_dead
from moec.passes.absorption import ABSORBED, PLAIN, Forms, attention_ops
from moec.passes.base import Context, Edit, Outcome, Pass, PassError
from moec.passes.folding import Fold, apply, folds

FORMS = ("auto", ABSORBED, PLAIN)
FOLD = ("auto", "never", "always")
ATTENTION = ("attn.mla", "attn.mla_absorbed")
OVER_LATENT = Pattern(
    "attn.mla", (None, Pattern("linear", (Pattern("cache.read", bind="read"), WeightRef), bind="project"))
)
LONGEST = 1 << 17
"""Context up to which a crossover is looked for."""


@dataclass(frozen=True)
class MlaAbsorb(Pass):
    """Attend over the latent cache instead of expanded keys and values (DeepSeek-V2, arXiv 2405.04434, sec. 2.1.2).

    Consumes `attn.mla(q, linear(cache.read, kv_b))`; produces `linear.heads` with W_UK on the query side,
    `attn.mla_absorbed`, and `linear.heads` with W_UV behind it, (q·W_UK)·c = q·(W_UK·c). The form of each phase is the
    one whose ops cost less on the target at the compiled batch and context; `prefill` and `decode` force one, `queries`
    is the number of tokens that a sequence decodes at once (0: as compiled). `fold` multiplies W_UQ by W_UK and W_UV by
    W_O beforehand where that takes less time and reads no more (`never`, `always`: in any case). Results change by
    rounding only.
    """

    name: ClassVar[str] = "mla-absorb"
    tolerance: ClassVar[float] = 1e-5
    prefill: str = "auto"
    decode: str = "auto"
    queries: int = 0
    fold: str = "auto"

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
            form = self.choose(module, function, phase, ctx, out)
            out.matched += len(sites)
            if form == "absorbed":
                for op in sites:
                    absorb(module, function, op)
                for site in [o for o in function.ops if o.name == "attn.mla_absorbed"]:
                    self.fold_products(module, function, site, phase, ctx, out)
                remove_dead(function)
                fresh_names(function)
        if not any(op.name == "attn.mla" for _, op in module.ops()) and any(
            op.name == "attn.heads" for _, op in module.ops()
        ):
            out.notes.append("keys and values are cached per head: there is no latent to absorb")
        elif not out.matched and not out.warnings:
            out.warnings.append("no attn.mla over a cached latent: nothing to absorb")
        return out

    def choose(self, module: Module, function: Function, phase: str, ctx: Context, out: Outcome) -> str:
        """The form of a phase; notes both times, the crossover, the counts behind them and what folding would cost."""
        wanted = self.prefill if phase == "prefill" else self.decode
        sparse = any(op.name == "attn.mla" and len(op.operands) == 7 for op in function.ops)
        if sparse and wanted == "auto":
            # Over chosen positions the plain form would expand all of them first.
            wanted = ABSORBED
        if wanted not in FORMS:
            raise PassError(name=self.name, message=f"{phase} must be one of {', '.join(FORMS)}, got {wanted!r}")
        if self.fold not in FOLD:
            raise PassError(name=self.name, message=f"fold must be one of {', '.join(FOLD)}, got {self.fold!r}")
        if not 0 <= self.queries <= 64:
            raise PassError(name=self.name, message=f"queries must lie in 0..64, got {self.queries}")
        queries = self.queries_of(ctx)
        absorbed = clone_function(function)
        sites = [o for o in absorbed.ops if o.name == "attn.mla" and over_cached_latent(absorbed, o)]
        for op in sites:
            absorb(module, absorbed, op)
        new = next(o for o in absorbed.ops if o.name == "attn.mla_absorbed")
        old = next(o for o in function.ops if o.name == "attn.mla" and over_cached_latent(function, o))
        ops = {PLAIN: attention_ops(function, old), ABSORBED: attention_ops(absorbed, new)}
        forms = Forms(phase, ops, ctx, queries)
        times = forms.typical_us()
        limits, decode = ctx.limits, phase == "decode"
        tokens = queries if decode else min(limits.chunk, limits.context)
        shown = f"plain {times[PLAIN]:.0f} us, absorbed {times[ABSORBED]:.0f} us of a layer's attention "
        shown += f"({tokens} tokens of {limits.batch if decode else 1} sequences at context {limits.context} on "
        form = wanted if wanted != "auto" else min(times, key=lambda k: times[k])
        out.notes.append(
            f"@{function.name}: {form}, {'as asked, ' if wanted != 'auto' else ''}{shown}{ctx.target.name}); "
            f"{_crossover(forms, LONGEST)}"
        )
        out.details.append(f"@{function.name}: {forms.symbolic()}")
        layers = sum(_layers(module, f) for f in module.functions.values() if _same_attention(f, phase))
        found = folds(module, absorbed, new, self.tokens(phase, ctx), ctx) if decode else []
        if found:
            total = sum(f.parameters for f in found) * layers / 1e9
            said = "; ".join(f"{f}: {f.verdict(self.fold)}" for f in found)
            line = f"folding over {layers} layers: {total:.2f} G parameters more ({said})"
            out.details.append(f"@{function.name}: {line}")
        out.figures.append(forms.figure(LONGEST))
        return form

    def queries_of(self, ctx: Context) -> int:
        """Tokens that a sequence decodes at once."""
        return self.queries or 1 + ctx.limits.drafts

    def tokens(self, phase: str, ctx: Context) -> int:
        """New tokens of a step."""
        limits = ctx.limits
        return self.queries_of(ctx) * limits.batch if phase == "decode" else min(limits.chunk, limits.context)

    def fold_products(
        self, module: Module, function: Function, site: Op, phase: str, ctx: Context, out: Outcome
    ) -> None:
        """Fold the projections around an absorbed attention where that wins, or in any case when it was asked for."""
        if self.fold == "never":
            return
        found = folds(module, function, site, self.tokens(phase, ctx), ctx)
        if self.fold == "always" and len(found) < 2:
            have = {f.side for f in found}
            sides = [side for side in ("query", "output") if side not in have]
            out.warnings.append(f"@{function.name}: {' and '.join(sides)} are no products that could be folded")
        for fold in found:
            if fold.wins or self.fold == "always":
                apply(module, function, fold, Edit(module, function, self.name))
                out.notes.append(f"@{function.name}: folded {fold}{_lost(fold)}")


def _lost(fold: Fold) -> str:
    return "; scales of quantised weights are lost: quantised again by the recipe" if fold.lossy else ""


def _crossover(forms: Forms, limit: int) -> str:
    at = forms.crossover(limit)
    return f"no crossover up to context {limit}" if at is None else f"crossover at context {at}"


def _same_attention(function: Function, phase: str) -> bool:
    return function.attrs.get("phase") == phase and any(op.name in ATTENTION for op in function.ops)


def _layers(module: Module, function: Function) -> int:
    """How many layers a function stands for."""
    for _, op in module.ops():
        if op.name == "repeat" and op.attrs["func"] == function.name:
            return int(op.attrs["last"]) - int(op.attrs["first"]) + 1  # type: ignore[arg-type]
    return 1


def over_cached_latent(function: Function, op: Op) -> bool:
    """Whether an `attn.mla` reads keys and values that one unpacked weight projects from the cache."""
    found = match(function, op, OVER_LATENT)
    if found is None or len(found["project"].operands) != 2:
        return False
    up = found["project"].operands[1].type
    return isinstance(up, TensorType) and not up.layout


def absorb(module: Module, function: Function, op: Op) -> None:
    """Replace one `attn.mla` over an up-projected cached latent by the absorbed form."""
    found = match(function, op, OVER_LATENT)
    assert found is not None
    q, _, _, seq, pos, _, *chosen = op.operands
    up = found["project"].operands[1]
    assert isinstance(q, Value) and isinstance(up, WeightRef)
    cache, layer, pages, _ = found["read"].operands
    nope, v = int(op.attrs["nope"]), int(op.attrs["v"])  # type: ignore[arg-type]
    assert isinstance(q.type, TensorType)
    heads, width = int(q.type.shape[1]), int(q.type.shape[2])  # type: ignore[arg-type]
    w_uk, w_uv = _split_up_projection(module, up, heads, nope, v)
    edit = Edit(module, function, MlaAbsorb.name)
    q_nope, q_rope = edit.insert(op, "split", q, attrs={"sizes": (nope, width - nope)})
    (q_latent,) = edit.insert(op, "linear.heads", q_nope, w_uk)
    attrs = {"scale": op.attrs["scale"], "context": "C"}
    operands = (q_latent, q_rope, cache, layer, seq, pos, pages, *chosen)
    (summed,) = edit.insert(op, "attn.mla_absorbed", *operands, attrs=attrs)
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
