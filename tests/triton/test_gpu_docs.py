"""The kernels' page is what the declarations say, and the declarations hold together."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.codegen.triton.document import document
from moec.codegen.triton.spec import KernelSpec, registry
from moec.ir.expr import BadExpression, evaluate

PAGE = Path(__file__).parents[2] / "docs" / "gpu-kernels.md"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == document(), "run: python -m moec.codegen.triton.document > docs/gpu-kernels.md"


@pytest.mark.parametrize("spec", registry().values(), ids=lambda s: s.name)
def test_declaration_is_whole(spec: KernelSpec) -> None:
    """Arguments and constants are those of the function, in its order; expressions have values."""
    import triton

    names = spec.jit().arg_names if isinstance(spec.jit(), triton.JITFunction) else spec.jit().fn.arg_names
    for arch, shapes in spec.tiles.items():
        for shape in shapes:
            instance = spec.instance(arch, shape)
            assert list(instance.signature) == [n for n in names if n in instance.signature]
            assert set(names) == {*instance.signature, *instance.constants}
            assert instance.flops() >= 0 < instance.bytes()
            assert all(n > 0 for n in instance.grid())
    assert not set(spec.aligned) - set(spec.signature)


@pytest.mark.parametrize(
    ("text", "value"),
    [("ceildiv(M, 128) * 2 + 1", 5), ("M % 16 == 0", 0), ("max(M, 7) // 2 - min(3, N)", 97), ("N <= 4", 1)],
)
def test_expressions(text: str, value: int) -> None:
    assert evaluate(text, {"M": 200, "N": 4}) == value


WRONG = ["M +", "__import__('os')", "M.real", "M ** 2", "X * 2", "M // 0", "[1]", "1.5", "M\0", "min(M)"]
LONG = ["+".join(["M"] * 3000), "(" * 300 + "M" + ")" * 300, "9" * 5000]


@pytest.mark.parametrize("text", [*WRONG, *LONG], ids=lambda text: text[:9])
def test_expressions_that_are_refused(text: str) -> None:
    with pytest.raises(BadExpression):
        evaluate(text, {"M": 200})
