"""The family `limited_deepseek`: DeepSeek-V3 whose dense and shared feed-forwards bound the inputs of SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moec.model_defs import functional as F
from moec.model_defs.deepseek_v3.checkpoint import TENSORS
from moec.model_defs.deepseek_v3.config import Config, from_hf
from moec.model_defs.deepseek_v3.model import Layer, Model, Moe
from moec.model_defs.family import Family
from moec.model_defs.fields import ConfigError
from moec.model_defs.layers import Layers, Mlp


@dataclass(frozen=True)
class LimitedConfig(Config):
    """A DeepSeek-V3 configuration with the bound."""

    swiglu_limit: float = 0.0


def read_config(raw: Mapping[str, Any], name: str) -> LimitedConfig:
    """The configuration of a `config.json`; raises ConfigError."""
    limit = raw.get("swiglu_limit")
    if not isinstance(limit, int | float) or limit <= 0:
        raise ConfigError(model=name, message=f"swiglu_limit must be a positive number, got {limit!r}")
    base = from_hf({k: v for k, v in raw.items() if k != "swiglu_limit"}, name)
    return LimitedConfig(**{f.name: getattr(base, f.name) for f in fields(base)}, swiglu_limit=float(limit))


class LimitedMlp(Mlp):
    """The feed-forward with bounded inputs of its activation."""

    def __init__(self, hidden: int, inter: int, limit: float) -> None:
        super().__init__(hidden, inter)
        self.limit = limit

    def forward(self, x: Any) -> Any:
        both = F.linear(x, self.gate_up)
        return F.linear(F.apply("swiglu.limited", both, limit=self.limit), self.down)


class LimitedModel(Model):
    """The DeepSeek-V3 model with other feed-forwards."""

    def __init__(self, c: LimitedConfig) -> None:
        super().__init__(c)
        dense = min(c.first_k_dense_replace, c.num_hidden_layers)
        last = c.num_hidden_layers - 1
        if dense:
            mlp = LimitedMlp(c.hidden_size, c.intermediate_size, c.swiglu_limit)
            self.dense_layers = Layers(Layer(c, mlp), 0, dense - 1)
        if dense <= last:
            moe = Moe(c)
            if c.n_shared_experts:
                moe.shared = LimitedMlp(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts, c.swiglu_limit)
            self.moe_layers = Layers(Layer(c, moe), dense, last)


FAMILY = Family("limited_deepseek", ("limited_deepseek",), read_config, TENSORS, LimitedModel)
