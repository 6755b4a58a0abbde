"""What is to be placed, and where: the checked input of a placement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moec.passes.placement import errors

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Shares = Literal["even", "free"]

# Sums and products of so many tokens stay far from the limits of float64.
_GREATEST = 1e300
_MOST_SLOTS = 20_000_000


def numeric_array(name: str, values: Any, ndim: int, expected: str) -> Floats:
    """`values` as float64 with `ndim` dimensions; finite and not negative.

    Raises `NotNumbers`, `WrongRank`, `NotFinite` or `NegativeEntry`, naming the first offending entry.
    """
    try:
        raw = np.asarray(values)
    except ValueError:
        raise errors.WrongRank(name=name, expected=expected, shape="ragged") from None
    if raw.dtype.kind not in "iuf":
        raise errors.NotNumbers(name=name, dtype=raw.dtype)
    if raw.ndim != ndim or 0 in raw.shape:
        raise errors.WrongRank(name=name, expected=expected, shape=list(raw.shape))
    array = raw.astype(np.float64)
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        what = "NaN" if np.isnan(array[tuple(where)]) else "infinity"
        raise errors.NotFinite(name=name, what=what, where=where)
    if (array < 0).any():
        where = np.argwhere(array < 0)[0].tolist()
        raise errors.NegativeEntry(name=name, value=array[tuple(where)], where=where)
    if array.max() > _GREATEST:
        where = np.argwhere(array > _GREATEST)[0].tolist()
        raise errors.TooGreat(name=name, value=array[tuple(where)], where=where, greatest=_GREATEST)
    return array


def smallest_slots(experts: int, devices: int, redundant: int = 0) -> int:
    """Fewest slots a device that hold every expert and at least `redundant` further replicas."""
    return -(-(experts + redundant) // devices)


@dataclass(frozen=True)
class Problem:
    """Loads and the shape of the machine they are placed on.

    `loads` is float64[layers, experts]: tokens (or any measure proportional to them) per expert. `groups` > 1 binds
    each group of consecutive experts to one node (node-limited routing); 1 leaves experts free to go anywhere.
    Build it with `Problem.of`, which checks every field.
    """

    loads: Floats
    devices: int
    slots_per_device: int
    nodes: int = 1
    groups: int = 1

    @classmethod
    def of(
        cls,
        loads: Any,
        *,
        devices: int,
        slots_per_device: int,
        devices_per_node: int | None = None,
        groups: int = 1,
    ) -> Problem:
        """Check the input and build the problem; raises a subclass of `InputError` for each way it can be wrong."""
        array = numeric_array("loads", loads, 2, "[layers, experts]")
        for name, value in (("devices", devices), ("slots per device", slots_per_device), ("groups", groups)):
            if value < 1:
                raise errors.NotPositive(name=name, expected="at least 1", value=value)
        experts = array.shape[1]
        if experts > devices * slots_per_device:
            raise errors.TooFewSlots(
                experts=experts,
                slots=devices * slots_per_device,
                devices=devices,
                slots_per_device=slots_per_device,
                needed=smallest_slots(experts, devices),
            )
        if len(array) * devices * slots_per_device > _MOST_SLOTS:
            slots = len(array) * devices * slots_per_device
            raise errors.TooManySlots(slots=slots, layers=len(array), devices=devices, most=_MOST_SLOTS)
        per_node = devices if devices_per_node is None else devices_per_node
        if per_node < 1:
            raise errors.NotPositive(name="devices per node", expected="at least 1", value=per_node)
        if devices % per_node and devices > per_node:
            raise errors.DevicesDoNotDivide(devices=devices, devices_per_node=per_node)
        nodes = max(1, devices // per_node)
        _check_groups(groups, experts, nodes)
        return cls(array, devices, slots_per_device, nodes, groups)

    @property
    def layers(self) -> int:
        return int(self.loads.shape[0])

    @property
    def experts(self) -> int:
        return int(self.loads.shape[1])

    @property
    def slots(self) -> int:
        return self.devices * self.slots_per_device

    @property
    def redundant(self) -> int:
        """Slots beyond one for every expert."""
        return self.slots - self.experts

    @property
    def bound_to_nodes(self) -> bool:
        """Whether the groups restrict where an expert may go."""
        return self.groups > 1 and self.nodes > 1


def _check_groups(groups: int, experts: int, nodes: int) -> None:
    if experts % groups:
        near = max(g for g in range(1, groups + 1) if experts % g == 0)
        raise errors.GroupsDoNotDivide(
            groups=groups, what=f"{experts} experts", advice=f"every group has the same size, for example {near} groups"
        )
    if groups > 1 and groups % nodes:
        raise errors.GroupsDoNotDivide(
            groups=groups,
            what=f"over {nodes} nodes",
            advice=f"use a number of nodes that divides {groups}, or bind no groups",
        )
