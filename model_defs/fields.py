"""Strict reading of a `config.json`: every field is used, known to be harmless, or refused by its name."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from moec.errors import InputError, near
from moec.model_defs.rope import Rope, rope_of

HARMLESS = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward",
        "dtype", "embd_pdrop", "eod_token_id", "expert_dropout", "ffn_dropout", "hidden_dropout", "id2label",
        "im_end_id", "im_newline_id", "im_start_id", "initial_context_length", "initializer_range",
        "input_jitter_noise", "label2id", "max_window_layers", "model_type", "name_or_path",
        "output_attentions", "output_hidden_states", "output_router_logits", "pad_id", "pad_token_id",
        "pretraining_tp",
        "problem_type", "quantization_config", "resid_pdrop", "return_dict", "router_aux_loss_coef",
        "router_jitter_noise", "sep_token_id", "tf_legacy_loss", "torch_dtype", "torchscript", "transformers_version",
        "unsloth_fixed", "use_cache",
    }
)  # fmt: skip
"""Fields that do not change the mathematics of inference: noise, losses and dropout of training, tokens, notes."""
ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rope_type")
LARGEST = 1 << 18
"""Bound of every size, so that products of three stay within 64 bits."""
LONG = 1 << 27
"""Bound of the vocabulary and of positions."""


class ConfigError(InputError):
    """A configuration that the family cannot express."""

    template: ClassVar[str] = "config of {model}: {message}"


class Fields:
    """The fields of one `config.json`; what is asked for counts as read, and `finish` refuses the rest.

    A field with the value null is one that is not there.
    """

    def __init__(self, raw: Mapping[str, Any], name: str) -> None:
        self.raw = raw
        self.name = name
        self._read: set[str] = set(ROPE)

    def fail(self, message: str) -> ConfigError:
        """The error of this configuration."""
        return ConfigError(model=self.name, message=message)

    def get(self, *keys: str) -> Any:
        """The value of a field, under the first of its names that is there; None without."""
        self._read.update(keys)
        return next((self.raw[k] for k in keys if self.raw.get(k) is not None), None)

    def size(self, *keys: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
        """A whole number between `least` and `most`; raises ConfigError when missing, unless there is a default."""
        value = self.get(*keys)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.fail(f"field {keys[0]!r} is missing")
        if not is_integer(value) or value < least:
            sign = "an integer, 0 or more" if least == 0 else "a positive integer"
            raise self.fail(f"{keys[0]} must be {sign}, got {shown(value)}")
        if value > most:
            raise self.fail(f"{keys[0]} must be at most {most}, got {shown(value)}")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(f"{key} must be true or false, got {shown(value)}")
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.get(key)
        if value is not None and not is_positive(value):
            raise self.fail(f"{key} must be a positive number, got {shown(value)}")
        return default if value is None else float(value)

    def sizes(self, key: str, count: int | None = None) -> list[int]:
        """A list of integers, 0 or more; empty when missing. `count`: how many there must be."""
        value = self.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(is_integer(v) and v >= 0 for v in value):
            raise self.fail(f"{key} must be a list of integers, got {shown(value)}")
        if value and count is not None and len(value) != count:
            raise self.fail(f"{key} has {len(value)} entries for {count} layers")
        return value

    def names(self, key: str, count: int, known: Collection[str]) -> list[str]:
        """A list with one of the `known` names for each of `count` layers; empty when missing."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) != count:
            raise self.fail(f"{key} must be a list with an entry for each of {count} layers, got {shown(value)}")
        for name in value:
            if name not in known:
                raise self.fail(f"{key}: {shown(name)} is not supported, only {', '.join(known)}")
        return value

    def only(self, key: str, *values: Any) -> None:
        """A field of which some values are supported, each of which means the same."""
        value = self.get(key)
        if value is not None and not any(value == v and type(value) is type(v) for v in values):
            raise self.fail(f"{key} = {shown(value)} is not supported, only {values[0]!r}")

    def rope(self, positions: int, head_dim: int, *kinds: str, theta: float = 10000.0, **options: Any) -> Rope:
        """The rotary embedding; see `rope_of`."""
        return rope_of(
            self.raw, positions, self.fail, head_dim=head_dim, kinds=("default", *kinds), theta=theta, **options
        )

    def eos(self) -> tuple[int, ...]:
        """End-of-sequence tokens: one id or a list of them."""
        given = self.get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(is_integer(i) and i >= 0 for i in ids):
            raise self.fail(f"eos_token_id must be a token id or a list of them, got {shown(given)}")
        return tuple(ids)

    def finish(self, *more_harmless: str) -> tuple[str, ...]:
        """The harmless fields that are there; raises ConfigError for a field that nothing has read."""
        harmless = HARMLESS | set(more_harmless)
        for key, value in self.raw.items():
            if value is not None and key not in self._read | harmless:
                raise self.fail(f"field {key!r} is not known to this family{near(key, sorted(self._read))}")
        return tuple(sorted(k for k in self.raw if k in harmless and k not in self._read and k != "model_type"))


def is_integer(value: Any) -> bool:
    """An integer of JSON: true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    """A finite number above 0 that a float can hold."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < sys.float_info.max


def shown(value: Any) -> str:
    """A value within an error message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
