"""How a model lies on devices: attention in replicas of `tp` devices, experts over `ep` devices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.ir import Module, TensorType
from moec.ir.issue import entries
from moec.passes.planning.balance import placement_limit
from moec.passes.planning.errors import CutBlock, WrongLayout, WrongRedundancy
from moec.passes.planning.precision import BLOCK, Recipe
from moec.passes.planning.sharding import sharded_weights
from moec.targets import Target

_MOST = 1 << 20
# A placement may leave the busiest device this far above the mean before another slot a device is taken for replicas.
_UNEVEN = 1.25


@dataclass(frozen=True)
class Layout:
    """`dp` attention replicas of `tp` devices each; routed experts, `slots` with copies, over groups of `ep` devices.

    All of it `pp` times, one for each pipeline stage.
    Shared experts and what is neither attention nor a dense feed-forward are replicated; each device of a replica then
    takes its part of the tokens.
    """

    tp: int
    dp: int
    ep: int
    experts: int
    slots: int
    pp: int = 1
    block: int = 1
    """Width of the scale blocks that tensor parallelism must not cut."""
    pad: bool = False

    @property
    def ranks(self) -> int:
        """Devices in use."""
        return self.tp * self.dp * self.pp

    @property
    def slots_per_device(self) -> int:
        """Experts that one device hosts."""
        return self.slots // self.ep


@dataclass(frozen=True)
class LayoutRequest:
    """Degrees asked for; None leaves a choice to `resolve`."""

    ranks: int | None = None
    tp: int = 1
    dp: int | None = None
    ep: int | None = None
    redundant: int | None = None
    pp: int = 1
    pad: bool = False
    """Fill up the widths of feed-forwards with zeros where scale blocks would be cut."""


def resolve(module: Module, target: Target, recipe: Recipe, asked: LayoutRequest) -> tuple[Layout, Target]:
    """The layout, and the target at its size.

    Ranks default to the target's, or to as many as the degrees need; `ep` to all ranks of a stage; redundant experts to
    the fewest that divide. Raises WrongLayout, WrongRedundancy, CutBlock, WrongRanks or NoLink.
    """
    for name in ("ranks", "tp", "dp", "ep", "pp"):
        value = getattr(asked, name)
        if value is not None and not 1 <= value <= _MOST:
            raise WrongLayout(message=f"{name} must lie in 1..{_MOST}, got {value}")
    if asked.redundant is not None and not 0 <= asked.redundant <= _MOST:
        raise WrongLayout(message=f"redundant experts must lie in 0..{_MOST}, got {asked.redundant}")
    tp, pp, experts = asked.tp, asked.pp, expert_count(module)
    ranks = asked.ranks or (
        tp * pp * asked.dp if asked.dp else max(target.cluster.ranks, tp * pp, (asked.ep or 1) * pp)
    )
    if pp > max(1, layers := layer_count(module)):
        raise WrongLayout(message=f"PP {pp}, but the model has {layers} layers")
    if ranks % pp:
        raise WrongLayout(message=f"{ranks} ranks do not divide by PP {pp}; try PP {_divisor(ranks, pp)}")
    stage = ranks // pp
    of = f"{stage} ranks of a stage" if pp > 1 else f"{ranks} ranks"
    if stage % tp:
        raise WrongLayout(message=f"{of} do not divide by TP {tp}; try TP {_divisor(stage, tp)}")
    dp = stage // tp
    sized = _sized(target, ranks)
    if asked.dp not in (None, dp):
        degrees = f"TP {tp} x DP {asked.dp}" + (f" x PP {pp}" if pp > 1 else "")
        raise WrongLayout(message=f"{degrees} makes {tp * pp * (asked.dp or 0)} ranks, not {ranks}")
    ep = asked.ep or (stage if experts else 1)
    if stage % ep:
        raise WrongLayout(message=f"{of} do not divide by EP {ep}; try EP {_divisor(stage, ep)}")
    if ep > 1 and not experts:
        raise WrongLayout(message=f"EP {ep}, but the model has no routed experts")
    slots = _slots(experts, ep, asked.redundant)
    _check_tp(module, tp, recipe, asked.pad)
    if tp > sized.node.devices:
        raise WrongLayout(message=f"TP {tp} exceeds the {sized.node.devices} devices of a {target.name} node")
    return Layout(tp, dp, ep, experts, slots, pp, BLOCK if recipe.blocks else 1, asked.pad), sized


def layer_count(module: Module) -> int:
    """Layers that the phases repeat."""
    repeats = (op for op in (o for entry in entries(module)[:1] for o in entry.ops) if op.name == "repeat")
    counts = [int(op.attrs["last"]) - int(op.attrs["first"]) + 1 for op in repeats]  # type: ignore[arg-type]
    return sum(counts)


def _sized(target: Target, ranks: int) -> Target:
    """The target with so many ranks; those of a CPU without a network are processes of one machine."""
    if target.kind == "cpu" and target.node.scale_out is None:
        node = replace(target.node, devices=max(target.node.devices, ranks))
        target = replace(target, node=node)
    return target.with_ranks(ranks)


def expert_count(module: Module) -> int:
    """Routed experts of the model; 0 for a dense one."""
    return next((int(op.attrs["experts"]) for _, op in module.ops() if op.name == "moe.dispatch"), 0)  # type: ignore[arg-type]


def fewest_slots(experts: int, ep: int) -> int:
    """The fewest slots that divide over `ep` devices: what a layout takes that is not told otherwise."""
    return experts + -experts % ep


def levelling_slots(experts: int, ep: int) -> int:
    """The fewest slots, or one more a device where those cannot even out the loads that are expected of a router."""
    fewest = fewest_slots(experts, ep)
    return fewest + ep if placement_limit(experts, fewest, ep) > _UNEVEN else fewest


def _slots(experts: int, ep: int, redundant: int | None) -> int:
    if not experts:
        if redundant:
            raise WrongLayout(message=f"--redundant {redundant}, but the model has no routed experts")
        return 0
    if redundant is None:
        return fewest_slots(experts, ep)
    if (experts + redundant) % ep:
        proposal = redundant + -(experts + redundant) % ep
        slots = experts + proposal
        raise WrongRedundancy(
            experts=experts, redundant=redundant, ep=ep, proposal=proposal, slots=slots, each=slots // ep
        )
    return experts + redundant


def _check_tp(module: Module, tp: int, recipe: Recipe, pad: bool) -> None:
    if tp == 1:
        return
    for cut in sharded_weights(module):
        weight = module.weights[cut.name]
        assert isinstance(weight.type, TensorType)
        width = int(weight.type.shape[cut.axis])  # type: ignore[arg-type]
        if cut.heads and cut.heads % tp:
            raise WrongLayout(message=f"TP {tp} does not divide {cut.heads} heads; try TP {_divisor(cut.heads, tp)}")
        if cut.groups % tp and tp % max(cut.groups, 1):
            fits = next(n for n in range(tp, 0, -1) if not ((cut.groups % n and n % cut.groups) or cut.heads % n))
            message = f"TP {tp} neither divides {cut.groups} heads of keys and values nor is a multiple of them"
            raise WrongLayout(message=f"{message}; try TP {fits}")
        # Gate and up projection lie one after the other in one weight; each is cut on its own.
        parts = 2 if cut.joined else 1
        block = BLOCK if recipe.blocks else 1
        if not (pad and not cut.heads):
            check_blocks(cut.name, width // parts, cut.parts(tp), block, can_pad=not cut.heads)


def check_blocks(weight: str, width: int, tp: int, block: int, can_pad: bool = True) -> None:
    """Raise CutBlock unless `width` divides into `tp` parts of whole blocks."""
    if width % (tp * block):
        fits = [n for n in range(2, tp) if tp % n == 0 and width % (n * block) == 0]
        padded = padded_width(width, tp, block)
        advice = (
            f", or --pad to fill it up to {padded}" if can_pad else f" (--pad cannot help: {padded} is no whole head)"
        )
        raise CutBlock(
            tp=tp, weight=weight, width=width, part=f"{width / tp:g}", block=block,
            proposal=f"TP {max(fits, default=1)}", padding=advice,
        )  # fmt: skip


def padded_width(width: int, tp: int, block: int) -> int:
    """The least width from `width` on that divides into `tp` parts of whole blocks."""
    return -(-width // (tp * block)) * tp * block


def _divisor(of: int, wanted: int) -> int:
    """The largest divisor of `of` not above `wanted`."""
    return next(d for d in range(min(of, wanted), 0, -1) if of % d == 0)
