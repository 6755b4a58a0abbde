"""moec: a compiler for Mixture-of-Experts language models.

traced = moec.trace("tiny-deepseek-v3")
plan = traced.optimize(target="cpu", batch=1, context=1024)
artifact = plan.compile("tiny.moec")
model = moec.load("tiny.moec")
model.generate(token_ids, max_new_tokens=64)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moec.plan import Artifact, Plan
    from moec.runtime import load
    from moec.stages import Traced, trace

__all__ = ["Artifact", "Plan", "Traced", "__version__", "load", "trace"]


def __getattr__(name: str) -> Any:
    """Import stages and runtime when they are first used: `moec --help` needs neither."""
    if name == "load":
        from moec.runtime import load

        return load
    if name in ("Artifact", "Plan"):
        from moec import plan

        return getattr(plan, name)
    if name in ("Traced", "trace"):
        from moec import stages

        return getattr(stages, name)
    raise AttributeError(f"module 'moec' has no attribute {name!r}")
