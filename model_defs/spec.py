"""What a decoder is, as data: families with keys and values per head differ in these fields and in nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moec.model_defs.rope import Rope

Glu = tuple[tuple[str, float | str], ...]
"""Attributes of a gated activation."""


@dataclass(frozen=True)
class Temperature:
    """Factor on the query that grows with its position: see `weight.temperature_table`."""

    floor: float
    scale: float


@dataclass(frozen=True)
class Attention:
    """Grouped heads of width `dim` (queries and keys) and `dim` (values).

    `norm`: of query and key, of each head or of all heads together (`wide`); `plain` is of each head without a weight.
    """

    heads: int
    kv_heads: int
    dim: int
    scale: float
    rope: Rope | None = None
    bias: bool = False
    out_bias: bool = False
    norm: Literal["", "head", "wide", "plain"] = ""
    norm_after_rope: bool = False
    window: int = 0
    chunk: int = 0
    sinks: bool = False
    clip: float = 0.0
    temperature: Temperature | None = None


@dataclass(frozen=True)
class Dense:
    """A gated feed-forward of width `inter`; `glu`: attributes of `swiglu`."""

    inter: int
    bias: bool = False
    glu: Glu = ()


@dataclass(frozen=True)
class Gate:
    """How a token's experts are chosen and weighed; see `moe.route`. `bias`: of the choice, of the logits, or none."""

    top_k: int
    score: Literal["softmax", "sigmoid", "sparsemixer"]
    normalise: bool
    scale: float = 1.0
    bias: Literal["", "choice", "logits"] = ""
    groups: int = 1
    top_groups: int = 1
    jitter: float = 0.0


@dataclass(frozen=True)
class Experts:
    """Routed experts of width `inter`, beside shared ones of width `shared` in all (0: none).

    `shared_gate`: the shared output is multiplied by a sigmoid of its own; `weigh_input`: the gate's weights go
    into the experts and not onto their output; `glu`: attributes of `swiglu`.
    """

    count: int
    inter: int
    gate: Gate
    shared: int = 0
    shared_bias: bool = False
    shared_gate: bool = False
    bias: bool = False
    weigh_input: bool = False
    glu: Glu = ()


@dataclass(frozen=True)
class Layer:
    """Attention and feed-forward, each behind a norm and beside a residual."""

    attention: Attention
    feed: Dense | Experts


@dataclass(frozen=True)
class Decoder:
    """A decoder: embedding, layers, norm, head. `*_scale`: constants on embedding, residual branches and logits."""

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[Layer, ...]
    eps: float
    norm: Literal["rms", "layer"] = "rms"
    tie_word_embeddings: bool = False
    head_bias: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """Fields of the configuration that do not change the mathematics of inference."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers in all."""
        return len(self.layers)

    @property
    def cache(self) -> tuple[str, int]:
        """Kind and width of the cache."""
        a = self.layers[0].attention
        return "kv.heads", a.kv_heads * 2 * a.dim


def stacks(layers: tuple[Layer, ...], most: int = 8) -> list[tuple[int, int, int]]:
    """(first layer, layers a turn, turns) that cover all layers: at each place what covers most, short turns first."""
    out, at = [], 0
    while at < len(layers):
        best = (0, 0)
        for period in range(1, most + 1):
            turns = 1
            while layers[at + turns * period : at + (turns + 1) * period] == layers[at : at + period]:
                turns += 1
            if (period == 1 or turns > 1) and period * turns > best[0] * best[1]:
                best = (period, turns)
        out.append((at, *best))
        at += best[0] * best[1]
    return out
