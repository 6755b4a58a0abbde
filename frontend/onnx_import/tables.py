"""Frequencies of a rotary embedding, read back from its tables of cosines and sines."""

from __future__ import annotations

import math

import torch

from moec.frontend.onnx_import.pieces import Unsupported


def frequencies_of(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Angles of one position f32[r/2], and the factor on the tables [positions, r/2]. Raises Unsupported.

    The angle of position 1 is known to a rounding of the table; that of each later power of two narrows it.
    """
    c, s = cos.double(), sin.double()
    if c.ndim != 2 or c.shape != s.shape or len(c) < 2:
        raise Unsupported(f"tables of angles of dims {list(cos.shape)}")
    scale = float(torch.hypot(c[0], s[0]).max())
    frequencies, position = torch.atan2(s[1], c[1]) % (2 * math.pi), 2
    while position < len(c):
        angle = torch.atan2(s[position], c[position])
        turns = torch.round((position * frequencies - angle) / (2 * math.pi))
        frequencies = (angle + 2 * math.pi * turns) / position
        position *= 2
    rows = torch.arange(len(c)).double()[:, None] * frequencies
    apart = max(float((rows.cos() * scale - c).abs().max()), float((rows.sin() * scale - s).abs().max()))
    if apart > 2e-3 * max(1.0, scale) * max(1.0, len(c) / 4096):
        raise Unsupported("tables of angles that do not grow by one step a position")
    return frequencies.float(), 1.0 if abs(scale - 1.0) < 1e-6 else scale
