"""The 1x128 / 128x128 FP8 recipe in torch, and the bounds that quantised results are held to.

DeepSeek-V3 technical report, arXiv 2412.19437, sec. 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moec.codegen.triton.problem import Expected

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

E4M3_MAX = 448.0
SMALLEST_NORMAL = 2.0**-126
# Half a unit in the last place of BF16 and of E4M3, as a share of the value; half of E4M3's smallest subnormal.
BF16_ROUNDING = 2.0**-8
E4M3_ROUNDING = 2.0**-4
E4M3_HALF_STEP = 2.0**-10
FP8 = ("sm_90a", "sm_100a")
NVIDIA = ("sm_80", "sm_90a", "sm_100a")
EVERYWHERE = (*NVIDIA, "gfx942")


def power_of_two(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def weight_rounding(q: Tensor) -> float:
    """How far softmax weights may be off, relatively: rounded to the type of the keys, or float32 throughout."""
    import torch

    return 5e-6 if q.dtype == torch.float32 else 1.01 * BF16_ROUNDING


def hard_rows(x: Tensor) -> Tensor:
    """x[rows, ...]; of every seven rows one becomes zeros, one numbers that float32 and BF16 hold as subnormals."""
    x[3::7] = 0.0
    x[5::7] *= 1e-39
    return x


def starts(counts: Sequence[int]) -> Tensor:
    """int32: the sum of the counts before each, and of all."""
    import torch

    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def padded(x: Tensor) -> Tensor:
    """x[..., K] with zeros up to a multiple of 128, as [..., K/128, 128]."""
    import torch

    short = -x.shape[-1] % 128
    return torch.nn.functional.pad(x, (0, short)).reshape(*x.shape[:-1], -1, 128)


def scale_of(amax: Tensor) -> Tensor:
    """`amax / 448`; 1 for a group of zeros, never below the smallest normal number."""
    import torch

    return torch.where(amax > 0, (amax / E4M3_MAX).clamp(min=SMALLEST_NORMAL), 1.0)


def scales_1x128(x: Tensor, pow2: bool = False) -> Tensor:
    """Float32 scales [..., ceil(K/128)] of x[..., K]."""
    import torch

    scale = scale_of(padded(x).abs().amax(-1).float())
    return torch.exp2(torch.ceil(torch.log2(scale.double()))).float() if pow2 else scale


def spread(scale: Tensor, columns: int) -> Tensor:
    """Scales [..., G] repeated to [..., columns]."""
    return scale.repeat_interleave(128, -1)[..., :columns]


def quantise_1x128(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """Float32 x -> E4M3 values and float32 scales."""
    import torch

    scale = scales_1x128(x, pow2)
    return (x.float() / spread(scale, x.shape[-1])).to(torch.float8_e4m3fn), scale


def wide(q: Tensor, scale: Tensor) -> Tensor:
    """Float64 values of 1x128-quantised `q`."""
    return q.double() * spread(scale.double(), q.shape[-1])


def exponents(scale: Tensor) -> Tensor:
    """The UE8M0 bytes of power-of-two scales: biased exponents."""
    import torch

    return (torch.log2(scale.double()).round() + 127).to(torch.uint8)


def from_exponents(byte: Tensor) -> Tensor:
    import torch

    return torch.exp2(byte.double() - 127).float()


def rounded_to_fp8(
    value: Tensor, q: str, scale: str, *, pow2: bool = False, slack: float = 1e-5, gpu_slack: float = 1e-4,
    where: Tensor | None = None, as_bytes: bool = False,
) -> dict[str, Expected]:  # fmt: skip
    """What quantising `value[..., K]` (float64) must give: each element within half a step of E4M3 at its scale.

    `slack` is the error that `value` may carry before it is quantised, as a share of its root mean square.
    """
    ideal = scales_1x128(value.float(), pow2)

    def read(written: dict[str, Any]) -> Tensor:
        got = written[scale]
        return wide(written[q], from_exponents(got) if as_bytes else got)

    columns = value.shape[-1]
    fits = None if where is None else where.expand(ideal.shape)
    scale_value = exponents(ideal) if as_bytes else ideal
    return {
        q: Expected(
            value, 1.001 * E4M3_ROUNDING, slack, gpu_slack,
            floor=1.001 * E4M3_HALF_STEP * spread(ideal, columns).double(), where=where, read=read,
        ),
        scale: Expected(scale_value, 0.0 if pow2 else 1e-5, 0.0, gpu_slack, where=fits),
    }  # fmt: skip
