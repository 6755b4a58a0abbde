"""`moec plan --phase train`: a training step through a pipeline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from moec.cli.options import UsageError
from moec.cli.output import note
from moec.cli.plan_tables import layout_text, size_text

if TYPE_CHECKING:
    from moec.ir import Module
    from moec.passes.planning import TrainingPlan, TrainOptions
    from moec.targets import Target

_DEFAULT_STAGES = 16
_DEFAULT_EXPERTS = 64
_DEFAULT_BATCH = 15360


def default_layout(module: Module, ranks: int, pp: int | None, ep: int | None) -> tuple[int, int]:
    """Stages and expert group where not given: 16 and 64 as DeepSeek-V3 was trained, or as far as the ranks allow."""
    from moec.passes.planning.layout import expert_count, layer_count

    if pp is None:
        pp = _DEFAULT_STAGES if ranks % _DEFAULT_STAGES == 0 and layer_count(module) >= _DEFAULT_STAGES else 1
    stage = max(1, ranks // pp)
    if ep is None:
        ep = max(e for e in range(1, min(stage, _DEFAULT_EXPERTS) + 1) if stage % e == 0) if expert_count(module) else 1
    return pp, ep


def default_batch(replicas: int, micro_batch: int) -> int:
    """Sequences of a step where not given: 15,360, rounded to what the replicas divide."""
    together = max(1, replicas * micro_batch)
    return max(1, round(_DEFAULT_BATCH / together)) * together


def run_training(model: str, module: Module, targets: list[Target], options: TrainOptions, as_json: bool) -> None:
    """Plan the step on each target and print it."""
    from moec.passes.planning import make_training_plan, training_json

    plans = [make_training_plan(module, target, options) for target in targets]
    for plan in plans:
        if not plan.fits:
            worst = max(plan.memory, key=lambda m: m.total)
            capacity = plan.target.device.memory_bytes
            note(
                f"warning: training does not fit: {worst.total / 1e9:.1f} GB on a device of {capacity / 1e9:.1f} GB; "
                "use more stages (--pp), more ranks or smaller micro-batches"
            )
    if as_json:
        found = [training_json(plan) for plan in plans]
        print(json.dumps(found[0] if len(found) == 1 else {"plans": found}, allow_nan=False))
        return
    for plan in plans:
        _print(model, plan)


def _print(model: str, plan: TrainingPlan) -> None:
    o = plan.options
    print(f"{model} on {plan.target.name}: training, {layout_text(plan.layout)}, recipe {plan.recipe.name}")
    print(
        f"  {o.global_batch} sequences of {o.sequence} tokens: {plan.micro_batches} micro-batches a replica, "
        f"schedule {o.schedule}, balance {plan.balance:.2f}"
    )
    parts = {f"1{kind.replace('&', '')}": time for kind, time in plan.parts.items() if time}
    named = {**parts, "bubble": plan.bubble_s, "optimiser": plan.optimiser_s}
    print(f"\nstep {plan.step_s:.3f} s: " + ", ".join(f"{name} {time:.2f}" for name, time in named.items()))
    chunk = plan.chunk
    print(
        f"  a chunk (one micro-batch in the slowest stage): forward {chunk.forward * 1e3:.1f} ms, backward "
        f"{chunk.backward * 1e3:.1f} ms (weights {chunk.weight * 1e3:.1f} ms), both overlapped "
        f"{chunk.overlapped * 1e3:.1f} ms"
    )
    cell = plan.cell
    print(
        f"  overlapped: computation {cell.compute_us / 1e3:.1f} ms beside exchanges of {cell.exchange_us / 1e3:.1f} ms"
        f"; bound by {'computation' if cell.compute_us >= cell.exchange_us else 'the network'}"
    )
    if (layer := plan.layer) is not None:
        proven = "proven least" if layer.solution.optimal else f"bound {layer.bound_us / 1e3:.2f}"
        print(
            f"  a layer of it as scheduled: {layer.interval_us / 1e3:.2f} ms ({proven}); in DualPipe's published order "
            f"{layer.published_us / 1e3:.2f} ms"
        )
        print(f"    computes {' '.join(layer.order['compute'])}")
        print(f"    exchanges {' '.join(layer.order['link'])}")
    print(
        f"  bubble by the published formula {plan.formula_bubble_s:.2f} s; "
        f"sends of {plan.send_s * 1e3:.2f} ms between stages"
    )
    print(f"  layers of the stages: {', '.join(map(str, plan.split))}")
    print(f"\n{plan.tokens_per_day / 1e9:.2f} billion tokens a day")
    for kind in plan.flops_per_token:
        gflops = plan.flops_per_token[kind] / 1e9
        print(
            f"  {kind:10} attention: {gflops:.1f} GFLOP a token, {plan.tflops(kind):.0f} TFLOP/s a device, "
            f"MFU {plan.mfu(kind):.2%} of the BF16 peak"
        )
    print(f"\nmemory of a device, of {size_text(plan.target.device.memory_bytes)}:")
    print(f"  {'rank':>4} {'total':>9} {'weights':>9} {'gradients':>10} {'optimiser':>10} {'activations':>12}")
    for rank, m in enumerate(plan.memory):
        sizes = (m.total, m.weights, m.gradients, m.optimiser, m.activations)
        shown = [size_text(size) for size in sizes]
        print(
            f"  {rank:4} {shown[0]:>9} {shown[1]:>9} {shown[2]:>10} {shown[3]:>10} {shown[4]:>12}"
            f"  ({m.micro_batches} micro-batches)"
        )
    print()


def check_schedule(schedule: str) -> None:
    """Raises UsageError for a schedule that is not known."""
    from moec.errors import near
    from moec.simulate.pipeline import SCHEDULES

    if schedule not in SCHEDULES:
        raise UsageError(message=f"unknown --schedule {schedule!r}{near(schedule, list(SCHEDULES))}")
