"""The result: which expert stands in which slot of which device, and how its tokens are shared among its replicas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moec.passes.placement.packing import Packing
from moec.passes.placement.problem import Floats, Ints, Problem


@dataclass(frozen=True)
class Placement:
    """Experts in slots, for every layer.

    `physical_to_logical_map` int64[layers, slots]: the expert in each slot; device d owns the slots
    d * slots_per_device and following, node k the devices k * (devices / nodes) and following. Every expert stands in
    at least one slot. `replica_shares` float64[layers, slots]: the part of its expert's tokens that a slot takes; the
    shares of the replicas of an expert sum to 1.
    """

    physical_to_logical_map: Ints
    replica_shares: Floats
    experts: int
    devices: int
    nodes: int = 1

    @classmethod
    def of_packing(cls, problem: Problem, packing: Packing, *, even: bool) -> Placement:
        """Make a placement of a packing: even shares, or shares in proportion to the loads that the slots carry."""
        mapping = packing.experts.reshape(problem.layers, problem.slots)
        weight = np.ones(mapping.shape) if even else packing.sizes.reshape(mapping.shape)
        return cls(
            mapping,
            normalised_shares(mapping, weight, problem.experts),
            problem.experts,
            problem.devices,
            problem.nodes,
        )

    @property
    def layers(self) -> int:
        return int(self.physical_to_logical_map.shape[0])

    @property
    def slots(self) -> int:
        return int(self.physical_to_logical_map.shape[1])

    @property
    def slots_per_device(self) -> int:
        return self.slots // self.devices

    @property
    def replica_counts(self) -> Ints:
        """int64[layers, experts]: slots that hold each expert."""
        return counts_of(self.physical_to_logical_map, self.experts)

    @property
    def has_even_shares(self) -> bool:
        """Whether the replicas of every expert take equal shares."""
        counts = np.take_along_axis(self.replica_counts, self.physical_to_logical_map, axis=1)
        return bool(np.allclose(self.replica_shares * counts, 1.0))

    def slot_loads(self, loads: Floats) -> Floats:
        """float64[layers, slots]: what each slot carries of `loads` [layers, experts]."""
        return np.asarray(np.take_along_axis(loads, self.physical_to_logical_map, axis=1) * self.replica_shares)

    def device_loads(self, loads: Floats) -> Floats:
        """float64[layers, devices]"""
        return np.asarray(self.slot_loads(loads).reshape(self.layers, self.devices, -1).sum(axis=2))

    def greatest_loads(self, loads: Floats) -> Floats:
        """Load of the fullest device of each layer; float64[layers]."""
        return np.asarray(self.device_loads(loads).max(axis=1))


def counts_of(mapping: Ints, experts: int) -> Ints:
    """How often each expert occurs in each row of `mapping` [layers, slots]; int64[layers, experts]."""
    layers = len(mapping)
    flat = (mapping + np.arange(layers)[:, None] * experts).ravel()
    return np.bincount(flat, minlength=layers * experts).reshape(layers, experts)


def normalised_shares(mapping: Ints, weight: Floats, experts: int) -> Floats:
    """`weight` [layers, slots] scaled so that the slots of an expert sum to 1; even shares where all weigh nothing."""
    layers = len(mapping)
    flat = (mapping + np.arange(layers)[:, None] * experts).ravel()
    total = np.bincount(flat, weights=weight.ravel(), minlength=layers * experts)[flat].reshape(mapping.shape)
    counts = np.take_along_axis(counts_of(mapping, experts), mapping, axis=1)
    return np.where(total > 0, weight / np.where(total > 0, total, 1.0), 1.0 / counts)
