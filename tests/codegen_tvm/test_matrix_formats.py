"""The packed layout and its decoding, against torch's own conversions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ops_runner import normal, run

from moec.codegen.tvm.formats import BF16, F32, FORMATS, FP8_E4M3, Format, pack, packed_shape, scale_shape
from moec.codegen.tvm.linear import LinearSpec, build, scratch_size
from moec.codegen.tvm.tir import Machine


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 128), (33, 130), (100, 77)])
def test_layout_puts_each_element_where_the_docstring_says(fmt: Format, n: int, k: int) -> None:
    high = 255 if fmt.storage == "uint8" else 4000
    weight = np.random.default_rng(0).integers(1, high, (3, n, k)).astype(fmt.storage)
    scales = np.ones((3, -(-n // 128), -(-k // 128)), np.float32) if fmt.scale_block else None
    packed, _ = pack(weight, fmt, scales)
    assert packed.shape == (3, *packed_shape(n, k, fmt))
    q = fmt.per_lane
    elements = packed.view(fmt.storage).reshape(3, packed.shape[1], packed.shape[2], 16, q)
    unpacked = elements.transpose(0, 1, 3, 2, 4).reshape(3, packed.shape[1] * 16, packed.shape[2] * q)
    assert np.array_equal(unpacked[:, :n, :k], weight)
    assert not unpacked[:, n:].any() and not unpacked[:, :, k:].any()


def test_scales_repeat_for_each_tile_of_their_block() -> None:
    n, k = 300, 200
    scales = np.arange(6, dtype=np.float32).reshape(3, 2)
    _, tiles = pack(np.zeros((n, k), np.uint8), FP8_E4M3, scales)
    assert tiles is not None and tiles.shape == scale_shape(n, k, FP8_E4M3)
    assert [float(t) for t in tiles[:, 1]] == [scales[16 * i // 128, 1] for i in range(len(tiles))]


def test_packing_refuses_what_does_not_fit_the_format() -> None:
    with pytest.raises(ValueError, match="bf16 packs uint16 elements, not float32"):
        pack(np.zeros((16, 16), np.float32), BF16)
    with pytest.raises(ValueError, match="fp8_e4m3 needs scales"):
        pack(np.zeros((16, 16), np.uint8), FP8_E4M3)
    with pytest.raises(ValueError, match="f32 takes no scales"):
        pack(np.zeros((16, 16), np.float32), F32, np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match=r"shape \(2, 1\), not \(1, 1\)"):
        pack(np.zeros((130, 16), np.uint8), FP8_E4M3, np.ones((1, 1), np.float32))


@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_every_finite_e4m3_value_is_exact(tokens: int) -> None:
    """A unit vector picks out one column: all finite codes, subnormals and both zeros, in every byte of a lane."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    n, k = 254, 4
    weight = torch.stack([codes.roll(i) for i in range(k)], 1)
    packed, scales = pack(weight.numpy(), FP8_E4M3, np.ones((2, 1), np.float32))
    assert scales is not None
    machine = Machine()
    spec = LinearSpec(n, k, FP8_E4M3, k, n, max_tokens=6)
    scratch = torch.zeros(scratch_size(spec, machine))
    for column in range(k):
        x = torch.zeros(tokens, k)
        x[:, column] = 1
        y = normal(tokens, n)
        run(build, spec, x, torch.from_numpy(packed), torch.from_numpy(scales), y, scratch, tokens)
        exact = weight[:, column].contiguous().view(torch.float8_e4m3fn).float()
        assert torch.equal(y, exact.expand(tokens, n))
