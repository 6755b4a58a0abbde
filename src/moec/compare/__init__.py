"""`moec run --compare`: an artifact's kernels and weights against the checkpoint that it was made from, op by op."""

from moec.compare.report import report
from moec.compare.result import Comparison, OpError
from moec.compare.run import LongPrompt, compare

__all__ = ["Comparison", "LongPrompt", "OpError", "compare", "report"]
