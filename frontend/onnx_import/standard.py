"""Standard ONNX operators as torch functions, in the forms that modules of torch take when they are exported.

Operators: https://onnx.ai/onnx/operators. What torch writes as one function and ONNX as several nodes (rsqrt, silu,
linear with a bias) becomes the one function again, so that patterns see the same graph from either side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moec.frontend.onnx_import.files import DTYPES
from moec.frontend.onnx_import.pieces import Unsupported
from moec.frontend.onnx_import.values import Call, ints, known, number, operand, tensor

FAR = 1 << 31
Op = Callable[..., Any]


def binary(function: Op) -> Op:
    """A function of two values, the first of them a tensor."""

    def run(c: Call, a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return function(a, operand(b))
        return function(tensor(a), operand(b))

    return run


def unary(function: Op) -> Op:
    """A function of one tensor."""
    return lambda c, x, *rest: function(tensor(x))


def commuting(function: Op) -> Op:
    """A function of two values in any order."""
    return lambda c, a, b: function(a, operand(b)) if isinstance(a, torch.Tensor) else function(tensor(b), operand(a))


def logical(function: Op) -> Op:
    """A function of two masks."""
    return lambda c, a, b: function(tensor(a), tensor(b))


def add(c: Call, a: Any, b: Any) -> Any:
    """A sum; of a product with a parameter and a bias, the linear function of all three."""
    for product, bias, at in ((a, b, 0), (b, a, 1)):
        inputs = c.linear(at)
        vector = c.parameter(1 - at) and bias.ndim == 1
        if inputs is not None and vector and product.shape[-1] == bias.shape[0]:
            return F.linear(inputs[0], inputs[1], bias)
    return commuting(torch.add)(c, a, b)


def mul(c: Call, a: Any, b: Any) -> Any:
    """A product; of x and its sigmoid, silu."""
    for x, at in ((a, 1), (b, 0)):
        inputs = c.origin(at, "Sigmoid")
        if inputs is not None and inputs[0] is x and isinstance(x, torch.Tensor):
            return F.silu(x)
    if a is b and isinstance(a, torch.Tensor):
        return a.pow(2)
    return commuting(torch.mul)(c, a, b)


def div(c: Call, a: Any, b: Any) -> Any:
    """A quotient; by a square root, the product with rsqrt; of whole numbers, towards zero."""
    root = c.origin(1, "Sqrt")
    if root is not None and isinstance(root[0], torch.Tensor):
        inverse = torch.rsqrt(root[0])
        return inverse if number(a) == 1 else operand(a) * inverse
    x = tensor(a)
    return torch.div(x, operand(b), rounding_mode=None if x.is_floating_point() else "trunc")


def reciprocal(c: Call, x: Any) -> Any:
    """1 / x; of a square root, rsqrt."""
    root = c.origin(0, "Sqrt")
    return torch.rsqrt(tensor(root[0])) if root is not None else torch.reciprocal(tensor(x))


def power(c: Call, x: Any, exponent: Any) -> Any:
    """A power."""
    return torch.pow(tensor(x), operand(exponent))


def clip(c: Call, x: Any, low: Any = None, high: Any = None) -> Any:
    """Bounds on both sides, from attributes in old models."""
    low = c.attr("min") if low is None else number(low)
    high = c.attr("max") if high is None else number(high)
    inner = c.origin(0, "Min")
    bound = number(inner[1]) if inner is not None else None
    if high is None and bound is not None and inner is not None:
        return torch.clamp(inner[0], low, bound)
    return torch.clamp(tensor(x), low, high)


def least(c: Call, *values: Any) -> Any:
    """Minimum; with one number, a bound."""
    if len(values) == 2 and number(values[1]) is not None:
        return torch.clamp(tensor(values[0]), None, number(values[1]))
    return _folded(torch.minimum, values)


def greatest(c: Call, *values: Any) -> Any:
    """Maximum; with one number, a bound."""
    if len(values) == 2 and number(values[1]) is not None:
        return clip(c, values[0], values[1])
    return _folded(torch.maximum, values)


def _folded(function: Op, values: tuple[Any, ...]) -> torch.Tensor:
    out = tensor(values[0])
    for value in values[1:]:
        out = function(out, tensor(value))
    return out


def where(c: Call, condition: Any, a: Any, b: Any) -> Any:
    """A choice by element."""
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        return torch.where(tensor(condition), tensor(a), tensor(b))
    broken = c.origin(0, "IsNaN")
    if broken is not None and broken[0] is b and number(a) == 0 and c.origin(2, "Softmax") is not None:
        return b  # rows that see nothing, of which a causal mask has none
    inverse = c.origin(0, "Not")
    if number(a) is not None and _covers(condition, b):
        return b.masked_fill(tensor(condition), number(a))
    if number(b) is not None and inverse is not None and _covers(inverse[0], a):
        return a.masked_fill(tensor(inverse[0]), number(b))
    return torch.where(tensor(condition), operand(a), operand(b))


def _covers(mask: Any, x: Any) -> bool:
    """Whether a mask fits a tensor without widening it."""
    if not isinstance(mask, torch.Tensor) or not isinstance(x, torch.Tensor) or mask.ndim > x.ndim:
        return False
    dims = x.shape[x.ndim - mask.ndim :]
    return all((isinstance(m, int) and m == 1) or m == d for m, d in zip(mask.shape, dims, strict=True))


def cast(c: Call, x: Any, *like: Any) -> Any:
    """Another element type."""
    dtype = like[0].dtype if like else DTYPES.get(c.attr("to"))
    if dtype is None:
        raise Unsupported(f"a cast to type {c.attr('to')}")
    return tensor(x).to(dtype)


def softmax(c: Call, x: Any) -> Any:
    """Softmax over one dim; over all from the axis on before operator set 13."""
    axis = c.attr("axis", -1 if c.step.opset >= 13 else 1)
    if c.step.opset < 13 and axis not in (-1, x.ndim - 1):
        raise Unsupported("a softmax over several dims")
    return torch.softmax(x, axis)


def gelu(c: Call, x: Any) -> Any:
    """GELU, exact or by tanh."""
    return F.gelu(x, approximate=c.attr("approximate", "none"))


def swish(c: Call, x: Any) -> Any:
    """x · sigmoid(alpha · x)."""
    alpha = float(c.attr("alpha", 1.0))
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(x * alpha)


def matmul(c: Call, a: Any, b: Any) -> Any:
    """A product; with a parameter, which the importer keeps as [out, in], a linear function."""
    a, b = tensor(a), tensor(b)
    if c.parameter(1) and b.ndim == 2:
        return F.linear(a, b)
    left, right = (c.origin(i, "Mul") for i in (0, 1))
    factors: list[Any] = [number(m[1]) if m is not None else None for m in (left, right)]
    if left is not None and right is not None and None not in factors:
        # Attention scales queries and keys by the root; torch scales their product.
        return torch.matmul(tensor(left[0]), tensor(right[0])) * (factors[0] * factors[1])
    return torch.bmm(a, b) if a.ndim == b.ndim == 3 else torch.matmul(a, b)


def gemm(c: Call, a: Any, b: Any, bias: Any = None) -> Any:
    """alpha · a · b + beta · bias, with b a parameter that the importer keeps as [out, in]."""
    if c.attr("transA", 0) or c.attr("alpha", 1.0) != 1.0 or (bias is not None and c.attr("beta", 1.0) != 1.0):
        raise Unsupported("a product with factors or a transposed left side")
    if c.parameter(1):
        return F.linear(a, b, None if bias is None else tensor(bias))
    out = torch.matmul(a, b.T if c.attr("transB", 0) else b)
    return out if bias is None else out + tensor(bias)


def reduction(function: Op) -> Op:
    """A sum, mean or maximum over dims: an input from operator set 18 on (13 for sums), an attribute before."""

    def run(c: Call, x: Any, axes: Any = None) -> Any:
        over = c.attr("axes") if axes is None else ints(axes)
        if over is None and c.attr("noop_with_empty_axes", 0):
            return x
        dims = [int(a) for a in over] if over is not None else list(range(x.ndim))
        return function(tensor(x), dims, bool(c.attr("keepdims", 1)))

    return run


def top_k(c: Call, x: Any, k: Any) -> Any:
    """The k greatest or least, and where they are."""
    count = number(k)
    if not isinstance(count, int):
        raise Unsupported("a top-k whose k is not known")
    return tuple(torch.topk(x, count, c.attr("axis", -1), bool(c.attr("largest", 1)), bool(c.attr("sorted", 1))))


def constant_of_shape(c: Call, shape: Any) -> Any:
    """A tensor of one value."""
    value = c.attr("value")
    fill, dtype = (value.reshape(-1)[0].item(), value.dtype) if value is not None else (0.0, torch.float32)
    return torch.full(ints(shape), fill, dtype=dtype)


def arange(c: Call, start: Any, stop: Any, step: Any) -> Any:
    """Numbers in steps."""
    return torch.arange(number(start), number(stop), number(step))


def trilu(c: Call, x: Any, k: Any = None) -> Any:
    """One triangle of a matrix."""
    diagonal = 0 if k is None else number(k)
    return torch.triu(tensor(x), diagonal) if c.attr("upper", 1) else torch.tril(tensor(x), diagonal)


def cumsum(c: Call, x: Any, axis: Any) -> Any:
    """A running sum."""
    if c.attr("exclusive", 0) or c.attr("reverse", 0):
        raise Unsupported("a running sum from behind, or without its own element")
    return torch.cumsum(tensor(x), number(axis))


def layer_norm(c: Call, x: Any, weight: Any, bias: Any = None) -> Any:
    """Layer norm over the last dim."""
    if c.attr("axis", -1) not in (-1, x.ndim - 1):
        raise Unsupported("a norm over several dims")
    return F.layer_norm(x, (int(x.shape[-1]),), tensor(weight), bias, float(c.attr("epsilon", 1e-5)))


def rms_norm(c: Call, x: Any, weight: Any) -> Any:
    """RMS norm over the last dim."""
    if c.attr("axis", -1) not in (-1, x.ndim - 1):
        raise Unsupported("a norm over several dims")
    eps = float(c.attr("epsilon", 1e-5))
    return x * torch.rsqrt(x.pow(2).mean([-1], True) + eps) * tensor(weight)


def einsum(c: Call, *values: Any) -> Any:
    """A sum of products."""
    return torch.einsum(c.attr("equation"), *values)


def dequantise(c: Call, x: Any, scale: Any, zero: Any = None) -> Any:
    """(x - zero) · scale, by tensor, by axis, or by blocks along it."""
    w, s = tensor(x).float(), tensor(scale)
    z = tensor(zero).float() if zero is not None else torch.zeros(())
    axis, block = c.attr("axis", 1), c.attr("block_size", 0)
    if s.ndim == 1 and s.numel() > 1:
        view = [-1 if d == axis % w.ndim else 1 for d in range(w.ndim)]
        s, z = s.view(view), z.view(view) if z.ndim else z
    elif block:
        s = s.repeat_interleave(block, axis)
        z = z.repeat_interleave(block, axis) if z.ndim else z
    return ((w - z) * s).to(tensor(scale).dtype)


def _identity(c: Call, x: Any, *rest: Any) -> Any:
    return known(x) if known(x) is not None else x


STANDARD: dict[str, Op] = {
    "Abs": unary(torch.abs),
    "Add": add,
    "And": logical(torch.logical_and),
    "Cast": cast,
    "CastLike": cast,
    "Clip": clip,
    "ConstantOfShape": constant_of_shape,
    "Cos": unary(torch.cos),
    "CumSum": cumsum,
    "DequantizeLinear": dequantise,
    "Div": div,
    "Dropout": _identity,
    "Einsum": einsum,
    "Equal": commuting(torch.eq),
    "Erf": unary(torch.erf),
    "Exp": unary(torch.exp),
    "Floor": unary(torch.floor),
    "Gelu": gelu,
    "Gemm": gemm,
    "Greater": binary(torch.gt),
    "GreaterOrEqual": binary(torch.ge),
    "Identity": _identity,
    "IsNaN": unary(torch.isnan),
    "LayerNormalization": layer_norm,
    "Less": binary(torch.lt),
    "LessOrEqual": binary(torch.le),
    "Log": unary(torch.log),
    "MatMul": matmul,
    "Max": greatest,
    "Min": least,
    "Mod": binary(torch.remainder),
    "Mul": mul,
    "Neg": unary(torch.neg),
    "Not": unary(torch.logical_not),
    "Or": logical(torch.logical_or),
    "Pow": power,
    "RMSNormalization": rms_norm,
    "Range": arange,
    "Reciprocal": reciprocal,
    "ReduceMax": reduction(torch.amax),
    "ReduceMean": reduction(torch.mean),
    "ReduceMin": reduction(torch.amin),
    "ReduceSum": reduction(torch.sum),
    "Relu": unary(torch.relu),
    "Sigmoid": unary(torch.sigmoid),
    "Sin": unary(torch.sin),
    "Softmax": softmax,
    "Softplus": unary(F.softplus),
    "Sqrt": unary(torch.sqrt),
    "Sub": binary(torch.sub),
    "Swish": swish,
    "Tanh": unary(torch.tanh),
    "TopK": top_k,
    "Trilu": trilu,
    "Where": where,
}
