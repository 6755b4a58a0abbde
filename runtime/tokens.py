"""Checks of token ids at the door: kernels trust them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moec.runtime.engine import Ids
from moec.runtime.errors import EmptyPrompt, NoRoom, PromptTooLong, TokenOutsideVocabulary, WrongTokens
from moec.runtime.manifest import Manifest


def as_batch(ids: Any, manifest: Manifest) -> Ids:
    """`ids` as int64[B, T], B and T > 0, T within the context; raises WrongTokens, EmptyPrompt, PromptTooLong or
    TokenOutsideVocabulary."""
    array = _integers(ids)
    if array.ndim != 2:
        raise WrongTokens(problem=f"token ids must be [batch, tokens], their shape is {list(array.shape)}")
    if not array.size:
        raise EmptyPrompt(which="")
    _check(array, manifest)
    return array


def as_prompts(ids: Any, manifest: Manifest, new_tokens: int) -> tuple[list[Ids], bool]:
    """Prompts from one list of ids, a list of such lists, or an array [T] or [B, T]; True when it was a single one.

    Raises as `as_batch`, and NoRoom when a prompt and its new tokens exceed the context.
    """
    single = _is_single(ids)
    prompts = [_integers(ids)] if single else [_integers(prompt) for prompt in ids]
    for index, prompt in enumerate(prompts):
        if prompt.ndim != 1:
            raise WrongTokens(problem=f"prompt {index} must be a list of ids, its shape is {list(prompt.shape)}")
        if not prompt.size:
            raise EmptyPrompt(which="" if single else f" {index}")
        _check(prompt, manifest)
        room = manifest.context - len(prompt) + 1  # the last new token is never fed back
        if new_tokens > room:
            needed = len(prompt) + new_tokens - 1
            raise NoRoom(tokens=len(prompt), new=new_tokens, context=manifest.context, room=room, needed=needed)
    return prompts, single


def _is_single(ids: Any) -> bool:
    if hasattr(ids, "ndim") and ids.ndim:
        return int(ids.ndim) == 1
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        raise WrongTokens(problem=f"token ids must be integers in a list or an array, not {type(ids).__name__}")
    return not ids or np.ndim(ids[0]) == 0


def _integers(ids: Any) -> Ids:
    try:
        array = np.asarray(ids)
    except ValueError:
        raise WrongTokens(problem="token ids must be [batch, tokens]; the rows have different lengths") from None
    if array.size and array.dtype.kind not in "iu":
        raise WrongTokens(problem=f"token ids must be integers, not {array.dtype}")
    return array.astype(np.int64, copy=False)


def _check(array: Ids, manifest: Manifest) -> None:
    """The last axis fits the context, and every id is in the vocabulary."""
    if array.shape[-1] > manifest.context:
        raise PromptTooLong(tokens=array.shape[-1], context=manifest.context)
    wrong = np.argwhere((array < 0) | (array >= manifest.vocab))
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        vocab = manifest.vocab
        raise TokenOutsideVocabulary(token=int(array[at]), position=at[-1], vocab=vocab, last=vocab - 1)
