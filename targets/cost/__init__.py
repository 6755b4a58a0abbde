"""What an op costs on a target: `op_time({"op": "gemm", "m": 128, ...}, target) -> Cost`."""

from moec.targets.cost.errors import Uncalibrated, UnknownOp, WrongRow, WrongRowsFile
from moec.targets.cost.result import Bound, Cost
from moec.targets.cost.row import OPS, Key, Op, Row, op_time

__all__ = [
    "OPS",
    "Bound",
    "Cost",
    "Key",
    "Op",
    "Row",
    "Uncalibrated",
    "UnknownOp",
    "WrongRow",
    "WrongRowsFile",
    "op_time",
]
