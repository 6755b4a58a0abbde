"""Hardware descriptions: `load("h800-ep144")`, `names()`, `check(path)`; op costs: `moec.targets.cost`."""

from moec.targets.document import Problem
from moec.targets.errors import NoLink, TargetFileError, UnknownTarget, WrongRanks
from moec.targets.load import assumed_from, check, load, names
from moec.targets.schema import Cluster, Device, Fp8, Link, Node, Parameter, Target, TopologyChoice

__all__ = [
    "Cluster",
    "Device",
    "Fp8",
    "Link",
    "NoLink",
    "Node",
    "Parameter",
    "Problem",
    "Target",
    "TargetFileError",
    "TopologyChoice",
    "UnknownTarget",
    "WrongRanks",
    "assumed_from",
    "check",
    "load",
    "names",
]
