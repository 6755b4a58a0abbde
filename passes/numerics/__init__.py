"""Numbers in the loop: a module is evaluated on small inputs before and after every pass, in float64.

The inputs bind every symbol to a small number: four sequences, fed in chunks over a cache of small pages, so that a
chunk attends over a cached prefix and pages are crossed. Weights are random, a function of the tensor's name, and go
through the weight programs. Rounding to stated element types is left out, so that a pass that only re-orders must agree
to rounding of float64, and one that rounds weights shows that rounding alone.
"""

from moec.passes.numerics.check import Numerics, TooLarge, TooManyRanks
from moec.passes.numerics.compare import Departure

__all__ = ["Departure", "Numerics", "TooLarge", "TooManyRanks"]
