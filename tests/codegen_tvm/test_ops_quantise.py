"""Rounding of activations against torch's own E4M3 cast, bit by bit."""

from __future__ import annotations

import pytest
import torch
from ops_runner import MACHINE, SERIAL, normal, run

from moec.codegen.tvm.quantise import QuantiseSpec, build_quantise_rows
from moec.ir.numeric import quantise


@pytest.mark.parametrize(
    "width,block,whole", [(256, 128, False), (300, 128, False), (40, 128, False), (96, 0, False), (96, 0, True)]
)
@pytest.mark.parametrize("pow2", [False, True])
def test_equals_quantising_and_dequantising_in_torch(width: int, block: int, whole: bool, pow2: bool) -> None:
    x = normal(40, width + 5) * torch.logspace(-30, 4, 40)[:, None]
    x[3] = 0
    x[4, :width] = torch.linspace(-1, 1, width) * 2.0**-140  # subnormal throughout
    x[5, 7] = 3e38
    y = torch.full((40, width + 2), torch.nan)
    spec = QuantiseSpec(width, block, whole, pow2, 40, width + 5, width + 2)
    run(build_quantise_rows, spec, x, y, 40, machine=MACHINE if pow2 else SERIAL)
    size = (0, 0) if whole else (1, block)
    expected = quantise(x[:, :width], "fp8_e4m3", size, "ue8m0" if pow2 else "f32").dequantise()
    assert torch.equal(y[:, :width], expected)


def test_every_tie_and_subnormal_rounds_as_torch_casts() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].sort().values
    middle = (values[1:] + values[:-1]) / 2
    x = torch.cat((values, middle, middle * (1 + 2**-20), middle * (1 - 2**-20)))
    x = torch.nn.functional.pad(x, (0, -len(x) % 128))
    x[128 - 1 :: 128] = 448.0  # every block keeps scale 1
    y = torch.empty_like(x)
    spec = QuantiseSpec(len(x), 128, False, False, 1, len(x), len(x))
    run(build_quantise_rows, spec, x, y, 1)
    assert torch.equal(y, x.to(torch.float8_e4m3fn).float())
