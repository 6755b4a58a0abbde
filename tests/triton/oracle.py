"""Logits by the IR's reference evaluator: what a program must compute, whatever kernels it was cut into."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir import CacheType, Module
from moec.ir.evaluate import Evaluator, Loader, WeightPrograms

PAGE = 64


def reference_logits(module: Module, loader: Loader, ids: Any, phase: str = "prefill", rounding: bool = True) -> Any:
    """Logits f32[T, V] after each of `ids` int[T] of one sequence, whole through a phase's entry function.

    With `rounding` every value is rounded to its stated type, as a kernel that stores it would.
    """
    function = module.functions[phase]
    evaluator = Evaluator(module, WeightPrograms(module, loader), torch.float32, rounding)
    count = len(ids)
    pages = -(-count // PAGE)
    given = {
        "ids": torch.tensor(ids, dtype=torch.int32), "seq": torch.zeros(count, dtype=torch.int32),
        "pos": torch.arange(count, dtype=torch.int32), "pages": torch.arange(pages, dtype=torch.int32)[None],
        "starts": torch.tensor([0, count], dtype=torch.int32), "rows": torch.arange(count, dtype=torch.int32),
    }  # fmt: skip
    arguments = [
        evaluator.new_cache(a.type, {"P": pages}) if isinstance(a.type, CacheType) else given[a.name]
        for a in function.args
    ]
    return evaluator.call(function, arguments)[0]


def draft_reference(module: Module, loader: Loader, ids: Any) -> Any:
    """Logits f32[T - 1, V] of the module that drafts, row t from `ids[: t + 2]`."""
    evaluator = Evaluator(module, WeightPrograms(module, loader), torch.float32, True)
    prefill, draft = module.functions["prefill"], module.functions["draft"]
    cache = evaluator.new_cache(prefill.args[-1].type, {"P": 1})  # type: ignore[arg-type]

    def placed(tokens: Any) -> list[Any]:
        count = len(tokens)
        numbers = [tokens, [0] * count, range(count), [[0]], [0, count], range(count)]
        return [torch.tensor(list(n), dtype=torch.int32) for n in numbers]

    _, hidden = evaluator.call(prefill, [*placed(ids), cache])
    return evaluator.call(draft, [*placed(ids[1:]), hidden[:-1], cache])[0]
