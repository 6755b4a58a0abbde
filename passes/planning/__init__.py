"""Plan a model on a target before anything is compiled: `make_plan(module, target, Options(...)) -> Plan`."""

from moec.passes.planning.errors import CutBlock, WrongLayout, WrongPlan, WrongRedundancy, WrongWhatIf
from moec.passes.planning.layout import Layout, LayoutRequest
from moec.passes.planning.memory import Memory
from moec.passes.planning.plan import Options, PhasePlan, Plan, make_plan
from moec.passes.planning.report import as_json
from moec.passes.planning.whatif import KNOBS, changed

__all__ = [
    "KNOBS",
    "CutBlock",
    "Layout",
    "LayoutRequest",
    "Memory",
    "Options",
    "PhasePlan",
    "Plan",
    "WrongLayout",
    "WrongPlan",
    "WrongRedundancy",
    "WrongWhatIf",
    "as_json",
    "changed",
    "make_plan",
]
