"""`moec run --compare`: an artifact's kernels and weights against the checkpoint that it was made from, op by op."""

from moec.compare.compare import LongPrompt, compare
from moec.compare.report import report
from moec.compare.result import Comparison, OpError

__all__ = ["Comparison", "LongPrompt", "OpError", "compare", "report"]
