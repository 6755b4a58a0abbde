"""Measured speed of an artifact: prefill and decode rates, load time, memory, and the bound set by reading weights."""

from __future__ import annotations

import gc
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Final

import numpy as np

from moec.runtime.engine import Ids
from moec.runtime.errors import PromptTooLong, WrongOption
from moec.runtime.launch import TIMEOUT, loaded
from moec.runtime.model import Model, load
from moec.runtime.scheduler import Rates
from moec.runtime.touched import bytes_read
from moec.targets.read_bandwidth import ReadTest

if TYPE_CHECKING:
    from moec.runtime.distributed.bench import OverlapResult

_PROMPT: Final = 256
_NEW: Final = 64
_READS: Final = 5


@dataclass(frozen=True)
class Result:
    """What was measured. Rates are medians in tokens a second over all sequences; bytes, seconds, bytes a second.

    `read_runs` are the rates at which as many threads read memory, measured after each run, and `read_bandwidth` their
    median. The share of the bound is the median over runs, each with its own rate: on a shared machine both change.

    Of several ranks, load time, memory and bytes are those of the first. `step_weight_bytes` are the bytes of weights
    that one decode step read (None where the system does not tell, and over several ranks), and `decode_bound` is the
    rate at which `read_bandwidth` would deliver them. `overlap` is measured over several ranks; where it is not,
    `no_overlap` says why.
    """

    artifact: str
    model: str
    target: str
    recipe: str
    threads: int
    ranks: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeat: int
    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_runs: list[float]
    decode_runs: list[float]
    peak_memory_bytes: int
    weight_bytes: int
    step_weight_bytes: int | None
    read_bandwidth: float
    read_runs: list[float]
    decode_bound_tokens_per_s: float | None
    share_of_bound: float | None
    overlap: OverlapResult | None = None
    no_overlap: str = "one process"


def bench(
    path: str,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repeat: int = 3,
    batch: int = 1,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda note: None,
    link_gbit: float | None = None,
    micro_batches: int = 1,
) -> Result:
    """Load the artifact and time `repeat` runs, after one that warms up.

    Each run feeds `batch` prompts of `prompt_tokens` random ids (default 256, or half the context) and generates
    `new_tokens` (default 64, or what fits) for each. Raises WrongOption, PromptTooLong or NoRoom for sizes beyond the
    artifact's limits. Under torchrun every rank calls this alike; overlap is then measured too, with an emulated
    network card of `link_gbit` Gbit/s for each rank where one is given; `micro_batches` as of `load_distributed`.
    """
    began = perf_counter()
    with loaded(path, False, threads, TIMEOUT, micro_batches) as model:
        load_s = perf_counter() - began
        prompt = prompt_tokens if prompt_tokens is not None else max(1, min(_PROMPT, model.context // 2))
        new = new_tokens if new_tokens is not None else min(_NEW, model.context - prompt + 1)
        _check(model, prompt, new, repeat, batch)
        model.engine.weights.settle()
        ids = np.random.default_rng(0).integers(0, model.vocab, (batch, prompt))
        progress(f"warm-up: {_shown(model.complete(ids, new, stop=()).rates)}")
        peak = peak_memory()  # before the bandwidth test takes its own buffers
        reading = ReadTest(model.engine.threads)
        runs, read_runs = [], []
        for run in range(repeat):
            rates = model.complete(ids, new, stop=()).rates
            runs.append(rates)
            read_runs.append(reading.best(_READS))
            progress(f"run {run + 1} of {repeat}: {_shown(rates)}, reading {read_runs[-1] / 1e9:.1f} GB/s")
        overlap, no_overlap = _overlap(model, ids, repeat, link_gbit, progress)
        used, weight_bytes, manifest = model.engine.threads, model.engine.weights.nbytes, model.artifact.manifest
        ranks = model.ranks
    prefill = [rates.prefill or 0.0 for rates in runs]
    decode = [rates.decode or 0.0 for rates in runs]
    # Where both do not fit, the system would take back pages of the second model before they are counted.
    del model, reading
    gc.collect()
    touched = _step_bytes(load(path, threads=threads, huge_pages=False), ids) if ranks == 1 else None
    bandwidth = median(read_runs)
    bound = batch * bandwidth / touched if touched else None
    shares = [rate * (touched or 0) / (batch * read) for rate, read in zip(decode, read_runs, strict=True)]
    return Result(
        artifact=path,
        model=manifest.model,
        target=manifest.target,
        recipe=manifest.recipe,
        threads=used,
        ranks=ranks,
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=new,
        repeat=repeat,
        load_s=load_s,
        prefill_tokens_per_s=median(prefill),
        decode_tokens_per_s=median(decode),
        prefill_runs=prefill,
        decode_runs=decode,
        peak_memory_bytes=peak,
        weight_bytes=weight_bytes,
        step_weight_bytes=touched,
        read_bandwidth=bandwidth,
        read_runs=read_runs,
        decode_bound_tokens_per_s=bound,
        share_of_bound=median(shares) if touched else None,
        overlap=overlap,
        no_overlap=no_overlap,
    )


def _overlap(
    model: Model, ids: Ids, repeat: int, link_gbit: float | None, progress: Callable[[str], None]
) -> tuple[OverlapResult | None, str]:
    """What `runtime.distributed.bench` measures of several ranks, or why there is nothing to measure."""
    if model.ranks == 1:
        return None, "one process"
    from moec.runtime.distributed.bench import bench_overlap, unsuited
    from moec.runtime.distributed.model import DistributedModel

    assert isinstance(model, DistributedModel)
    if why := unsuited(model, len(ids)):
        return None, why
    progress("decode steps in micro-batches, with exchanges awaited and hidden")
    return bench_overlap(model, ids, repeat, link_gbit), ""


def peak_memory() -> int:
    """Most bytes of memory that this process ever had resident."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    if found:
        return int(found[1]) << 10
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _check(model: Model, prompt: int, new: int, repeat: int, batch: int) -> None:
    """Bounds that `Model.complete` does not know of: its errors name the other options."""
    if prompt < 1:
        raise WrongOption(option="prompt-tokens", expected="at least 1", value=prompt)
    if prompt > model.context:
        raise PromptTooLong(tokens=prompt, context=model.context)
    if new < 2:
        raise WrongOption(option="new-tokens", expected="at least 2 (the first comes from the prefill)", value=new)
    if repeat < 1:
        raise WrongOption(option="repeat", expected="at least 1", value=repeat)
    room = model.engine.batch * model.replicas
    if not 1 <= batch <= room:
        raise WrongOption(option="batch", expected=f"1 to {room}, as compiled", value=batch)


def _step_bytes(model: Model, ids: Ids) -> int | None:
    """Bytes of weights that the decode step of the prompts' last tokens reads.

    The system tells of pages of a mapped file: the model must be loaded without huge pages.
    """
    engine = model.engine
    engine.use_threads()
    sequences = [engine.pool.open() for _ in ids]
    try:
        for sequence, prompt in zip(sequences, ids, strict=True):
            for start in range(0, len(prompt) - 1, engine.chunk):
                engine.prefill(sequence, prompt[start : min(start + engine.chunk, len(prompt) - 1)])
        # Pages are mapped as they are first read, with their neighbours: once before.
        engine.decode(sequences, ids[:, -1])
        return bytes_read(model.artifact.weights.resolve(), lambda: engine.decode(sequences, ids[:, -1]))
    finally:
        for sequence in sequences:
            engine.pool.close(sequence)


def _shown(rates: Rates) -> str:
    return f"prefill {rates.prefill or 0:,.1f}, decode {rates.decode or 0:,.1f} tokens/s"
