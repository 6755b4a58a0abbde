"""The IR: a small flat SSA form whose types carry symbolic dims, quantisation, layout and sharding.

Public surface: the structures (`Module`, `Function`, `Op`, `Value`, `WeightRef`), types, `Builder`, `parse_module`,
`print_module`, `verify`, `evaluate`, `rewrite` and the op table (`OPS`). No torch is imported at module level.
"""

from moec.ir import ops as _declarations  # noqa: F401  they fill the op table
from moec.ir.builder import Builder
from moec.ir.dims import Dim, dim, parse_dim
from moec.ir.module import ENTRIES, Function, Location, Module, Op, Value, Weight, WeightRef
from moec.ir.optable import OPS, AttributeValue, OpDef, TypeRuleError
from moec.ir.parser import ParseError, parse_module
from moec.ir.printer import print_function, print_module, print_op
from moec.ir.types import CacheType, IndexType, Quant, TensorType, Type
from moec.ir.verify import VerifyError, verify
from moec.plugins import plugins

__all__ = [
    "ENTRIES",
    "OPS",
    "AttributeValue",
    "Builder",
    "CacheType",
    "Dim",
    "Function",
    "IndexType",
    "Location",
    "Module",
    "Op",
    "OpDef",
    "ParseError",
    "Quant",
    "TensorType",
    "Type",
    "TypeRuleError",
    "Value",
    "VerifyError",
    "Weight",
    "WeightRef",
    "dim",
    "parse_dim",
    "parse_module",
    "print_function",
    "print_module",
    "print_op",
    "verify",
]

# A package declares ops by importing `moec.ir.optable` in the module that its entry point names.
for _ in plugins("moec.ops"):
    pass
