"""`docs/ir-reference.md`, made from the op table: the page cannot differ from what the compiler accepts."""

from __future__ import annotations

from inspect import cleandoc

from moec.ir.optable import OPS, OpDef
from moec.ir.printer import VERSION
from moec.ir.types import BITS, CACHE_KINDS, QUANTISED, SCALE_BITS

INTRO = f"""\
# Reference of the IR

Made by `moec ir reference --write docs/ir-reference.md` from the op table; do not edit it by hand.

## Text form
A module is one text file, version {VERSION}. What is printed parses back to an equal module and prints to the same
bytes.

```
module @name {{version = {VERSION}, key = value}} {{
  weight @gate[l: 0..4, e: 0..16]: bf16[64, 256] {{            one tensor for each layer l and expert e
    %0 = weight.load {{tensor = "layers.{{l}}.experts.{{e}}.gate", shape = [64, 256], dtype = bf16}} : bf16[64, 256]
    return %0
  }}
  func @layer(%l: index, %x: bf16[T, 256]) -> bf16[T, 256] {{phase = decode}} {{
    %0 = linear %x, @proj[%l] : bf16[T, 256] loc(model.py:12, fuse)
    return %0
  }}
}}
```

- One line is one op: results, name, operands, `{{attributes}}`, `:` result types, and where it comes from: the model's
  file and line, then the passes that made it. The types must be those that the op's rule gives.
- `@w[%l]` uses a weight at a layer; index ranges left open become leading dims.
- Values are defined once, before their use. A function calls functions above it only, through `repeat` and `call`.
- Attributes are integers, floats (`0.5`, `1e-06`), `true`, `false`, names, quoted strings, and lists of these. A string
  with anything but letters, digits, `_`, `-` and `.` is quoted.
- `//` begins a comment that ends with the line.

## Types
`dtype[dims]`, then `scale(format, blocks)`, `layout(name)` and `shard(axes)` where they apply. Types that differ in any
of these are different types.

- Dims are integers up to 2^62 or expressions over symbols: `T`, `T*8`, `B + 1`, `ceildiv(S, 128)`, `floordiv`,
  `min`, `max`.
- Element types: {", ".join(f"`{d}`" for d in BITS)}. Scaled ones: {", ".join(f"`{d}`" for d in QUANTISED)}.
- `scale(f32, 1x128)`: one scale per block of the trailing dims, `value = element * scale`; a block of 0 spans its dim.
  Formats: {", ".join(f"`{s}`" for s in SCALE_BITS)}.
- `shard(ep, -)`: the mesh axes that cut each dim, `-` for none.
- Caches: {", ".join(f"`{k}[layers, pages, tokens a page, width] of(dtype)`" for k in CACHE_KINDS)}.
- `index`: the layer of a layer function, an index of a weight program.

## Ops
Operands with `?` may be absent; `*` stands for any number.
"""

TITLES = {False: "### Ops of functions", True: "### Ops of weight programs"}


def reference() -> str:
    """The page as Markdown."""
    parts = [INTRO]
    for in_program, title in TITLES.items():
        parts.append(f"{title}\n")
        parts += [_op(OPS[n]) for n in sorted(OPS) if n.startswith("weight.") == in_program]
    return "\n".join(parts)


def _op(op: OpDef) -> str:
    lines = [f"#### `{op.name}`", "", cleandoc(op.__doc__ or ""), ""]
    lines.append(f"- operands: {_names(op.operands)}")
    lines.append(f"- results: {_names(op.results)}")
    for key, spec in op.attrs.items():
        lines.append(f"- `{key}`: {spec}{', optional' if spec.optional else ''}")
    if op.effect:
        lines.append(f"- {op.effect}s the cache: keeps its place among such ops")
    return "\n".join([*lines, ""])


def _names(text: str) -> str:
    return ", ".join(f"`{n}`" for n in text.split()) or "none"
