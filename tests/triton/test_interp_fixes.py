"""The repaired interpreter against torch: every cast the kernels use, and the products; and that repair is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def patterns(kind: torch.dtype) -> list[int]:
    """All bit patterns of a one-byte type; a spread of the wider ones with ties, subnormals, carries and overflow."""
    if kind.itemsize == 1:
        return list(range(256))
    generator = torch.Generator().manual_seed(0)
    value = torch.cat([
        torch.randn(1000, generator=generator) * torch.exp2(12 - 32 * torch.rand(1000, generator=generator)),
        torch.tensor([0.0, -0.0, 7.9, 15.9, 448.0, 464.0, 500.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 3 * 2.0**-10]),
        torch.tensor([1e-40, -1e-40, -448.0, -470.0, 2.0**-6, 2.0**-7]),
        torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-4, 1 + 3 * 2.0**-4, 240.0, 3e38, float("inf")]),
    ]).to(kind)  # fmt: skip
    count = 1 << (len(value) - 1).bit_length()
    value = torch.nn.functional.pad(value, (0, count - len(value)))
    return value.view(INTEGER[kind.itemsize]).to(torch.int64).tolist()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("float32", "bfloat16"), ("float32", "float8_e4m3fn"), ("bfloat16", "float32"), ("float8_e4m3fn", "float32"),
        ("float8_e4m3fn", "bfloat16"), ("float32", "float16"),
    ],
)  # fmt: skip
def test_casts_equal_torch(interpreter: Any, source: str, target: str) -> None:
    bits = patterns(getattr(torch, source))
    x = torch.tensor(bits).to(INTEGER[getattr(torch, source).itemsize]).view(getattr(torch, source))
    # torch's own cast to FP8 turns what is too large into NaN; a device saturates (PTX cvt.satfinite).
    wide = x.float().clamp(-448, 448) if target == "float8_e4m3fn" else x.float()
    y = wide.to(getattr(torch, target))
    want = y.view(INTEGER[y.element_size()]).to(torch.int64).tolist()
    want = [-1 if nan else b for b, nan in zip(want, y.float().isnan().tolist(), strict=True)]
    assert interpreter("cast_bits", bits=bits, source=source, target=target) == want


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "float16", "float32"])
def test_products_equal_torch(interpreter: Any, kind: str) -> None:
    assert interpreter("product_error", kind=kind) < 2e-5


def test_repairs_are_needed(interpreter: Any) -> None:
    """Without them 7.9 becomes 4 in FP8 and a BF16 product is far off: when this fails, the repairs can go."""
    bits = torch.tensor([7.9] * 2).view(torch.int32).tolist()
    right = torch.tensor([7.9] * 2).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    interpreter("repairs", on=False)
    try:
        assert interpreter("cast_bits", bits=bits, source="float32", target="float8_e4m3fn") != right
        assert interpreter("product_error", kind="bfloat16") > 1.0
    finally:
        interpreter("repairs", on=True)
    assert interpreter("cast_bits", bits=bits, source="float32", target="float8_e4m3fn") == right
