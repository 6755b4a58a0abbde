"""One class an implementation: it loads a model and continues a prompt greedily, calling back at every new token."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from moec.errors import MoecError

Ids = NDArray[np.int64]
Emit = Callable[[], None]
_LOG_ERROR: Final = 4  # enum ggml_log_level
_TILE: Final = (1 << 24) - 3


class Runner(Protocol):
    """A loaded model."""

    def generate(self, ids: Ids, new: int, emit: Emit) -> None:
        """Feed `ids` to an empty cache and draw `new` tokens greedily; `emit` is called when each is known."""

    def generate_all(self, prompts: Ids, new: int, emit: Emit) -> None:
        """The same for all rows of `prompts` together; `emit` is called when each of their steps is done."""

    def settle(self) -> None:
        """Wait for what still goes on in the background after loading."""


@dataclass(frozen=True)
class Settings:
    """What a runner is loaded with; `tokens` is the most that a sequence will have, `prompt` the longest prompt,
    `batch` the most sequences at a time."""

    model: str
    small: bool
    file: str
    threads: int
    tokens: int
    prompt: int
    batch: int = 1


class Failed(MoecError):
    """A peer that does not do what it should."""


class Moec:
    """An artifact of this project."""

    def __init__(self, s: Settings) -> None:
        from moec.runtime import load

        self._model = load(s.file, threads=s.threads)

    def settle(self) -> None:
        self._model.engine.weights.settle()

    def generate(self, ids: Ids, new: int, emit: Emit) -> None:
        self._model.complete(ids, new, stop=(), stream=lambda prompt, token: emit())

    def generate_all(self, prompts: Ids, new: int, emit: Emit) -> None:
        last, drawn = len(prompts) - 1, 0

        def count(prompt: int, token: int) -> None:
            nonlocal drawn
            if prompt == last and drawn < new:
                drawn += 1
                emit()

        # The first ones decode while the last are still being fed: they get as many more tokens, so that all are
        # there in every step of the last.
        self._model.complete(prompts, new + last, stop=(), stream=count)


class Llama:
    """llama.cpp through llama-cpp-python's bindings of its C interface: nothing of Python within a step."""

    def __init__(self, s: Settings) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._log = llama_cpp.llama_log_callback(self._keep)
        self._errors: list[str] = []
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(Path(s.file)).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise Failed(message=f"llama.cpp does not load {s.file}: {self._why()}")
        params = llama_cpp.llama_context_default_params()
        # A sequence has an equal share of the cache.
        params.n_ctx, params.n_seq_max = s.tokens * s.batch, s.batch
        # Larger pieces of a prompt give its experts more rows at a time.
        params.n_batch = params.n_ubatch = max(512, min(s.prompt, 2048))
        params.n_threads = params.n_threads_batch = s.threads
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise Failed(message=f"llama.cpp makes no context of {s.tokens} tokens: {self._why()}")
        self._piece = int(params.n_batch)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab = int(llama_cpp.llama_vocab_n_tokens(vocab))

    def settle(self) -> None:
        pass

    def generate(self, ids: Ids, new: int, emit: Emit) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        for start in range(0, len(ids), self._piece):
            self._feed(ids[start : start + self._piece].astype(np.int32))
        for i in range(new):
            token = np.array([self.logits().argmax()], dtype=np.int32)
            emit()
            if i + 1 < new:
                self._feed(token)

    def generate_all(self, prompts: Ids, new: int, emit: Emit) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        tokens = np.zeros(len(prompts), dtype=np.int64)
        for sequence, ids in enumerate(prompts):
            self._feed_at(ids, np.arange(len(ids)), np.full(len(ids), sequence), np.arange(len(ids)) == len(ids) - 1)
            tokens[sequence] = self.logits().argmax()
        rows = np.arange(len(prompts))
        for i in range(new):
            emit()
            if i + 1 < new:
                self._feed_at(tokens, np.full(len(rows), prompts.shape[1] + i), rows, np.ones(len(rows), dtype=bool))
                tokens = np.array([self.logits(int(row)).argmax() for row in rows])

    def logits(self, row: int = -1) -> NDArray[np.float32]:
        """f32[V] after a token of the last call, the last one by default; a view that the next call overwrites."""
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, row), shape=(self._vocab,))

    def _feed_at(self, ids: Ids, positions: Ids, sequences: Ids, wanted: NDArray[np.bool_]) -> None:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, (token, position, sequence, want) in enumerate(
                zip(ids.tolist(), positions.tolist(), sequences.tolist(), wanted.tolist(), strict=True)
            ):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, want
            if self._lib.llama_decode(self._context, batch):
                raise Failed(message=f"llama_decode failed: {self._why()}")
        finally:
            self._lib.llama_batch_free(batch)

    def _feed(self, ids: NDArray[np.int32]) -> None:
        tokens = (ctypes.c_int32 * len(ids))(*ids.tolist())
        if self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids))):
            raise Failed(message=f"llama_decode failed: {self._why()}")

    def _keep(self, level: int, text: bytes, _: Any) -> None:
        if level == _LOG_ERROR:
            self._errors.append(text.decode(errors="replace").strip())

    def _why(self) -> str:
        return " ".join(self._errors) or "it gives no reason"


class Transformers:
    """transformers' own class of the architecture, eager, random weights."""

    dtype = "float32"

    def __init__(self, s: Settings) -> None:
        import torch
        import transformers

        from peers.geometry import source

        torch.set_num_threads(s.threads)
        transformers.utils.logging.set_verbosity_error()
        raw = dict(source(s.model, s.small).raw)
        kind = "DeepseekV2" if raw["model_type"] == "deepseek_v2" else "DeepseekV3"
        config = getattr(transformers, f"{kind}Config")(**raw)
        with torch.device("meta"):
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
        model = model.to(getattr(torch, self.dtype)).to_empty(device="cpu").eval()
        model.tie_weights()
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        _fill(model)
        self._model, self._torch = model, torch

    def settle(self) -> None:
        pass

    def generate(self, ids: Ids, new: int, emit: Emit) -> None:
        self.generate_all(ids[None], new, emit)

    def generate_all(self, prompts: Ids, new: int, emit: Emit) -> None:
        with self._torch.inference_mode():
            tokens, cache = self._torch.from_numpy(prompts), None
            for _ in range(new):
                out = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                emit()


class TransformersBf16(Transformers):
    """The same in BF16."""

    dtype = "bfloat16"


class TransformersCompiled(Transformers):
    """The same in FP32 through `torch.compile`: one graph for prompts and one for steps, sizes symbolic."""

    def __init__(self, s: Settings) -> None:
        super().__init__(s)
        self._model = self._torch.compile(self._model, dynamic=True)


def _fill(model: Any) -> None:
    """Random weights of unit output variance; large ones repeat one random tile, whose odd length shifts every row."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(_TILE, generator=generator)
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" in name:
            continue
        scale = 1.0 if "norm" in name or "embed" in name else p.shape[-1] ** -0.5
        with torch.no_grad():
            if p.numel() <= 1 << 20:
                p.normal_(1.0 if "norm" in name else 0.0, 0.02 if p.ndim == 1 else scale, generator=generator)
                continue
            scaled = (tile * scale).to(p.dtype)
            for part in p.view(-1).split(_TILE):
                part.copy_(scaled[: len(part)])
