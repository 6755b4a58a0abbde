"""Plan a model on a target before anything is compiled: `make_plan(module, target, Options(...)) -> Plan`."""

from moec.passes.planning.advice import Alternative, alternatives
from moec.passes.planning.errors import CutBlock, NothingFits, WrongLayout, WrongPlan, WrongRedundancy, WrongWhatIf
from moec.passes.planning.layout import Layout, LayoutRequest
from moec.passes.planning.memory import Memory
from moec.passes.planning.plan import Options, PhasePlan, Plan, make_plan
from moec.passes.planning.report import as_json, search_json, training_json
from moec.passes.planning.search import Candidate, Found, search
from moec.passes.planning.sweep import Point, sweep
from moec.passes.planning.training import TrainingPlan, TrainOptions, make_training_plan
from moec.passes.planning.whatif import KNOBS, changed

__all__ = [
    "KNOBS",
    "Alternative",
    "Candidate",
    "CutBlock",
    "Found",
    "Layout",
    "LayoutRequest",
    "Memory",
    "NothingFits",
    "Options",
    "PhasePlan",
    "Plan",
    "Point",
    "TrainOptions",
    "TrainingPlan",
    "WrongLayout",
    "WrongPlan",
    "WrongRedundancy",
    "WrongWhatIf",
    "alternatives",
    "as_json",
    "changed",
    "make_plan",
    "make_training_plan",
    "search",
    "search_json",
    "sweep",
    "training_json",
]
