"""The toy model and its artifact.

Per token, the cache gets `embed[id] * (1 + pos / 10)`; the logits after it are `head` times the mean of the cached rows
up to its position, each weighted by one over its distance plus one. So every logit depends on every earlier token, on
the order of tokens, and on the page that each one lies in.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Machine, build_module
from moec.runtime.machine import architecture
from moec.runtime.manifest import checksum

VOCAB, WIDTH, CONTEXT, BATCH, CHUNK = 300, 8, 200, 3, 48
EOS = 299
PAGES = BATCH * -(-CONTEXT // 64)


def weights() -> dict[str, NDArray[np.float32]]:
    """`embed` and `head`, f32[VOCAB, WIDTH]."""
    rng = np.random.default_rng(7)
    return {name: rng.standard_normal((VOCAB, WIDTH)).astype(np.float32) for name in ("embed", "head")}


def expected_logits(ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits f64[T, VOCAB] of `ids` int64[T], by the definition."""
    w = {name: value.astype(np.float64) for name, value in weights().items()}
    at = np.arange(len(ids))
    rows = w["embed"][ids] * (1 + at[:, None] / 10)
    mix = np.tril(1.0 / (1 + np.abs(at[:, None] - at[None, :]))) / (1 + at[:, None])
    return np.asarray(mix @ rows @ w["head"].T)


def _function(symbol: str) -> Any:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol})
        names = ("ids", "seq", "pos", "pages", "starts", "rows", "cache", "workspace", "logits", "embed", "head")
        arg = {name: T.arg(name, T.handle()) for name in names}
        t, r, b, b1 = T.int32(), T.int32(), T.int32(), T.int32()
        ids, seq, pos = (T.match_buffer(arg[n], (t,), "int32") for n in ("ids", "seq", "pos"))
        pages = T.match_buffer(arg["pages"], (b, -(-CONTEXT // 64)), "int32")
        starts = T.match_buffer(arg["starts"], (b1,), "int32")
        rows = T.match_buffer(arg["rows"], (r,), "int32")
        cache = T.match_buffer(arg["cache"], (1, PAGES, 64, WIDTH), "float32")
        T.match_buffer(arg["workspace"], (16,), "uint8")
        logits = T.match_buffer(arg["logits"], (r, VOCAB), "float32")
        embed, head = (T.match_buffer(arg[n], (VOCAB, WIDTH), "float32", align=4) for n in ("embed", "head"))
        with T.serial(0, t) as i, T.serial(0, WIDTH) as d:
            scale = T.float32(1) + T.Cast("float32", pos[i]) / T.float32(10)
            page = pages[seq[i], pos[i] // 64]
            T.buffer_store(cache, embed[ids[i], d] * scale, [0, page, pos[i] % 64, d])
        with T.parallel(0, r) as row, T.serial(0, VOCAB) as v:
            T.buffer_store(logits, T.float32(0), [row, v])
            at, s = pos[rows[row]], seq[rows[row]]
            with T.serial(0, T.min(at + 1, starts[s + 1] - starts[s])) as j, T.serial(0, WIDTH) as d:
                term = head[v, d] * cache[0, pages[s, j // 64], j % 64, d]
                share = T.Cast("float32", at - j + 1) * T.Cast("float32", at + 1)
                T.buffer_store(logits, logits[row, v] + term / share, [row, v])
    return builder.get()


def _entry(symbol: str, tokens: int, rows: int) -> dict[str, Any]:
    def argument(name: str, kind: str, dtype: str, *shape: int | str) -> dict[str, Any]:
        return {"name": name, "kind": kind, "dtype": dtype, "shape": list(shape)}

    inputs = [("ids", "T"), ("seq", "T"), ("pos", "T"), ("pages", "B", "N"), ("starts", "B+1"), ("rows", "R")]
    args = [argument(name, "input", "int32", *shape) for name, *shape in inputs]
    args.append(argument("cache", "cache", "float32", 1, PAGES, 64, WIDTH))
    args.append(argument("workspace", "workspace", "uint8", 16))
    args.append(argument("logits", "output", "float32", "R", VOCAB))
    args += [argument(name, "weight", "float32", VOCAB, WIDTH) for name in ("embed", "head")]
    return {"symbol": symbol, "max_tokens": tokens, "max_rows": rows, "args": args}


def write(folder: Path) -> None:
    """Write the artifact, its tokenizer included."""
    for name in ("kernels", "weights", "tokenizer"):
        (folder / name).mkdir(parents=True)
    target = tvm.target.Target({"kind": "llvm", "mcpu": Machine().mcpu, "num-cores": 2})
    module = build_module([], {name: _function(name) for name in ("prefill", "decode")})
    tvm.compile(module, target=target).export_library(str(folder / "kernels" / "kernels.so"))
    (folder / "kernels" / "kernels.json").write_text("[]")
    (folder / "program.ir").write_text("module @toy {\n}\n")
    plan = {
        "entries": {"prefill": _entry("prefill", CHUNK, CHUNK), "decode": _entry("decode", BATCH, BATCH)},
        "page_size": 64,
        "cache": {"dtype": "float32", "shape": [1, PAGES, 64, WIDTH]},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    save_file(weights(), folder / "weights" / "rank-00000.safetensors")
    write_tokenizer(folder / "tokenizer")
    seal(folder)


def write_tokenizer(folder: Path) -> None:
    """Bytes as tokens 0 to 255, and `<eos>`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<eos>", special=True)])
    fast.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the files as they are."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {
        "format_version": 1,
        "moec_version": "0.1.0",
        "model": {"name": "toy", "config": {}, "vocab": VOCAB, "eos_token_ids": [EOS]},
        "target": {
            "name": "cpu",
            "triple": f"{architecture(platform.machine())}-unknown-linux-gnu",
            "mcpu": Machine().mcpu,
            "features": [],
            "cores": 2,
        },
        "limits": {"batch": BATCH, "context": CONTEXT, "chunk": CHUNK},
        "recipe": "fp32",
        "files": {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }


def seal(folder: Path, **changes: Any) -> None:
    """Write the manifest, with top-level fields replaced by `changes`, and its checksum."""
    data = manifest(folder) | changes
    data["checksum"] = checksum(data)
    (folder / "manifest.json").write_text(json.dumps(data))
