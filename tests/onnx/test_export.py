"""Exported models run in onnxruntime to the artifact's logits, and come back to equal IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from random_configs import save_model
from typer.testing import CliRunner

import moec
from moec.cli import make_app
from moec.frontend.onnx_file import NotExported, read_exported
from moec.ir import parse_module
from moec.ir.diff import diff

SLOW_FAMILIES = ("llama4_text", "phimoe", "granitemoe", "qwen2_moe", "dots1", "deepseek_v32")
SLOW = [pytest.param(f, marks=pytest.mark.slow) for f in SLOW_FAMILIES]
FAMILIES = ["mixtral", "gpt_oss", *SLOW]
PROMPT, LENGTH = 12, 20


def compile_and_export(model: str, folder: Path, recipe: str) -> Any:
    plan = moec.trace(model).optimize("cpu", context=64, chunk=32, recipe=recipe)
    artifact = plan.compile(folder / "m.moec").path
    done = CliRunner().invoke(make_app([]), ["export", str(artifact), "onnx", "--out", str(folder / "onnx")])
    assert done.exit_code == 0, done.output
    return moec.load(artifact)


def run(session: Any, **inputs: Any) -> list[Any]:
    wanted = {i.name for i in session.get_inputs()}
    arrays = {k: np.asarray(v, np.float32 if k == "kv" else np.int32) for k, v in inputs.items() if k in wanted}
    return list(session.run(None, arrays))


def logits(folder: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Prefill of the first tokens, then decode one by one, the cache handed from call to call."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    prefill, decode = (onnxruntime.InferenceSession(str(folder / f"{p}.onnx"), options) for p in ("prefill", "decode"))
    shape = next(i.shape for i in prefill.get_inputs() if i.name == "kv")
    kv = np.zeros([d if isinstance(d, int) else 2 for d in shape])
    tokens = np.arange(PROMPT)
    # The sequence's page is the second: a wrong page would show.
    given: dict[str, Any] = {"pages": [[1]], "seq": 0 * tokens, "pos": tokens, "rows": tokens, "starts": [0, PROMPT]}
    first, kv = run(prefill, ids=ids[:PROMPT], kv=kv, **given)
    rows = [first]
    for t in range(PROMPT, len(ids)):
        more, kv = run(decode, ids=ids[t : t + 1], seq=[0], pos=[t], rows=[0], pages=[[1]], starts=[0, t + 1], kv=kv)
        rows.append(more)
    return np.concatenate(rows)


def check(model: str, folder: Path, recipe: str, bound: float = 1e-4) -> np.ndarray[Any, Any]:
    """Logits and the round trip; returns the differences of the logits over their standard deviation."""
    loaded = compile_and_export(model, folder, recipe)
    ids = np.random.default_rng(5).integers(0, loaded.vocab, LENGTH)
    expected = loaded.logits(ids[None])[0]
    difference: np.ndarray[Any, Any] = np.abs(logits(folder / "onnx", ids) - expected) / expected.std()
    assert difference.max() < bound
    files = [folder / "onnx" / f"{phase}.onnx" for phase in ("prefill", "decode")]
    assert diff(parse_module((folder / "m.moec" / "program.ir").read_text()), read_exported(files)) == []
    return difference


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_onnxruntime(family: str, tmp_path: Path) -> None:
    save_model(family, 7, tmp_path / "hf")
    check(str(tmp_path / "hf"), tmp_path, "fp32")


@pytest.mark.parametrize(
    ("recipe", "bound"),
    [
        ("weight-only", 0.05),
        *(pytest.param(r, 0.2, marks=pytest.mark.slow) for r in ("deepseek-v3", "per-channel", "mxfp4-experts")),
    ],
)
def test_narrow_weights_activations_and_caches(recipe: str, bound: float, tmp_path: Path) -> None:
    """The same weights in both. The last bit of a cached BF16 value or of an FP8 activation may differ: a few tokens
    feel it."""
    difference = check("tiny-deepseek-v3", tmp_path, recipe, bound)
    assert np.median(difference) < 0.01


def test_latent_attention_as_a_reader_sees_it(tmp_path: Path) -> None:
    check("tiny-deepseek-v3", tmp_path, "fp32")
    model = onnx.load_model(str(tmp_path / "onnx" / "prefill.onnx"), load_external_data=False)
    domains = {f.domain for f in model.functions}
    assert domains == {"moec", "moec.layers"}
    # A reader sees embedding, layers, norm and head, and no more.
    assert len(model.graph.node) < 2 * 8 + 8
    assert {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim} >= {"T", "B", "N", "P"}
    assert {o.domain: o.version for o in model.opset_import}[""] == 28


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\xff\xfe nothing")
    with pytest.raises(NotExported, match="is not an ONNX model"):
        read_exported([tmp_path / "a.onnx"])
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save_model(onnx.helper.make_model(graph), tmp_path / "b.onnx")
    with pytest.raises(NotExported, match="was not exported by moec"):
        read_exported([tmp_path / "b.onnx"])
    done = CliRunner().invoke(make_app([]), ["export", "x.moec", "onx", "--out", "o"])
    assert "did you mean onnx" in str(done.exception)
