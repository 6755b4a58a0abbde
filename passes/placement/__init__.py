"""Expert placement: replicas, slots and shares from recorded loads.

    problem = Problem.of(loads, devices=32, slots_per_device=9, devices_per_node=8)
    result = place(problem)
    result.placement.physical_to_logical_map      # int64[layers, slots]
    result.balance                                # greatest device load / proven lower bound, by layer

`exact`, `formats`, `traffic`, `summary` and `report` hold the exact solver, the files, traffic between nodes, the
figures, and the page.
"""

from moec.passes.placement.placement import Placement
from moec.passes.placement.problem import Problem, Shares, smallest_slots
from moec.passes.placement.solve import DEFAULT_SLACK, Result, place

__all__ = ["DEFAULT_SLACK", "Placement", "Problem", "Result", "Shares", "place", "smallest_slots"]
