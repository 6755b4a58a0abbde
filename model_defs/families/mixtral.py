"""Mixtral (Jiang et al. 2024, arXiv 2401.04088)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moec.model_defs.families.common import decoder, grouped, layer_count, windows
from moec.model_defs.family import Family
from moec.model_defs.fields import Fields
from moec.model_defs.names import MIXTRAL_EXPERTS
from moec.model_defs.spec import Decoder, Experts, Gate, Layer


def read(raw: Mapping[str, Any], name: str) -> Decoder:
    """Mixtral: the chosen experts' softmax, experts in every layer."""
    f = Fields(raw, name)
    attention = grouped(f, "linear", "dynamic", "yarn", "llama3", theta=1e6)
    gate = Gate(f.size("num_experts_per_tok"), "softmax", normalise=True)
    experts = Experts(f.size("num_local_experts"), f.size("intermediate_size"), gate)
    layers = [Layer(replace(attention, window=w), experts) for w in windows(f, layer_count(f), always=True)]
    return decoder(f, layers)


FAMILIES = [Family("mixtral", ("mixtral",), read, MIXTRAL_EXPERTS)]
