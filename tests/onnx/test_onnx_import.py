"""ONNX graphs that moec did not write: torch's exporter and onnxruntime's fused operators, against onnxruntime."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers
import torch
from imported import module_of
from onnx import TensorProto, helper
from runtime_graphs import Sizes, mixture
from test_families import evaluated
from typer.testing import CliRunner

import moec
from moec.cli import make_app
from moec.frontend.onnx_import import moe
from moec.frontend.onnx_import.files import OnnxError
from moec.frontend.onnx_import.values import Call, Step
from moec.frontend.torch_import import TorchSource
from moec.runtime.errors import NoTokenizer

BOUND = 1e-4
LENGTH = 40
SLOW = (
    "qwen3", "mixtral", "mistral", "qwen2", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "dots1", "glm4_moe",
    "hunyuan_v1_moe", "minimax_m2", "gpt_oss", "ernie4_5_moe",
)  # fmt: skip
GRAPHS = [
    ("llama", "sdpa"),
    ("deepseek_v3", "eager"),
    *(pytest.param(f, "eager", marks=pytest.mark.slow) for f in SLOW),
    *(pytest.param(f, "sdpa", marks=pytest.mark.slow) for f in ("qwen3", "qwen3_moe", "mixtral", "deepseek_v3")),
]
MIXTURES = {
    "float": Sizes(),
    "biases, limits": Sizes(bias=True, limit=7.0, normalise=0),
    "window": Sizes(window=8),
    "8 bits": Sizes(bits=8),
    "4 bits in blocks": Sizes(bits=4, block=16),
    "4 bits, zero points of rows": Sizes(bits=4, zeros=True, bias=True),
    "2 bits, zero points of blocks": Sizes(bits=2, block=16, zeros=True),
    "8 bits, zero points of rows": Sizes(bits=8, zeros=True),
    "projections of 4 bits": Sizes(narrow=4, zeros=True),
    "projections of 8 bits": Sizes(narrow=8),
    "projections of 2 bits": Sizes(narrow=2, zeros=True),
}


def exported(family: str, seed: int, path: Path, **settings: Any) -> np.ndarray[Any, Any]:
    """Write the graph of a transformers class, and return some token ids for it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    module = module_of(family, seed)
    module.config.use_cache = False
    for key, value in settings.items():
        setattr(module.config, key, value)
    tokens = torch.export.Dim("tokens", min=2)
    example = (torch.zeros(1, 8, dtype=torch.int64),)
    torch.onnx.export(module, example, str(path), dynamo=True, dynamic_shapes=({1: tokens},), opset_version=20)
    ids: np.ndarray[Any, Any] = np.random.default_rng(seed).integers(0, int(module.config.vocab_size), (1, LENGTH))
    return ids


def oracle(path: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """onnxruntime's logits [T, V], with empty caches."""
    session = onnxruntime.InferenceSession(str(path))
    feed: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feed[value.name] = np.zeros([{"batch": 1, "past": 0}.get(d, d) for d in value.shape], np.float32)
        else:
            feed[value.name] = np.ones_like(ids) if "mask" in value.name else ids
    logits: np.ndarray[Any, Any] = np.asarray(session.run(None, feed)[0])[0]
    return logits


def check(path: Path, ids: np.ndarray[Any, Any]) -> TorchSource:
    """The raised program's logits are onnxruntime's, and all of the graph was raised."""
    traced = moec.trace(str(path))
    source = traced.source
    assert isinstance(source, TorchSource)
    assert source.report.share == 1.0, source.report
    expected = oracle(path, ids)
    got = evaluated(traced.ir, lambda name, shape, dtype: source.tensors[name], torch.tensor(ids[0])).numpy()
    assert np.abs(got - expected).max() / expected.std() < BOUND
    return source


@pytest.mark.parametrize(("family", "attention"), GRAPHS)
def test_graphs_of_the_torch_exporter(family: str, attention: str, seed: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    source = check(path, exported(family, seed, path, _attn_implementation=attention))
    if family != "llama":
        return
    assert "model.layers.0.self_attn.q_proj.weight" in source.tensors


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_operators_and_experts_of_onnxruntime(name: str, seed: int, tmp_path: Path) -> None:
    path, sizes = tmp_path / "model.onnx", MIXTURES[name]
    onnx.save(mixture(sizes, seed), path)
    ids = np.random.default_rng(seed).integers(0, sizes.vocab, (1, LENGTH))
    source = check(path, ids)
    assert source.report.raised["moe.experts"] and source.report.raised["moe.route"]


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_experts_with_fc3(activation: str, seed: int) -> None:
    """onnxruntime has no kernel for fc3 on CPUs: its documented formula in float64 stands in for it."""
    r = np.random.default_rng(seed)
    experts, hidden, inner, tokens, k = 5, 16, 24, 9, 2
    x, router = r.standard_normal((tokens, hidden)), r.standard_normal((tokens, experts))
    w1, w3 = (r.standard_normal((experts, inner, hidden)) for _ in range(2))
    w2, b1, b2, b3 = (
        r.standard_normal((experts, *shape)) for shape in ((hidden, inner), (inner,), (hidden,), (inner,))
    )
    acts: dict[str, Callable[[Any], Any]] = {
        "silu": lambda v: v / (1 + np.exp(-v)),
        "relu": lambda v: np.maximum(v, 0),
        "gelu": lambda v: v * (1 + np.vectorize(math.erf)(v / math.sqrt(2))) / 2,
    }
    act = acts[activation]
    shares = np.exp(router) / np.exp(router).sum(-1, keepdims=True)
    expected = np.zeros_like(x)
    for t in range(tokens):
        for e in np.argsort(-shares[t])[:k]:
            inside = act(w1[e] @ x[t] + b1[e]) * (w3[e] @ x[t] + b3[e])
            expected[t] += shares[t, e] * (w2[e] @ inside + b2[e])
    attrs = {"k": k, "activation_type": activation}
    call = Call(Step("MoE", "com.microsoft", "moe", ["x"], ["y"], attrs, 1), {})
    given = [torch.tensor(a) for a in (w1, b1, w2, b2, w3, b3)]
    got = moe.run(call, torch.tensor(x), torch.tensor(router), *moe.prepare(call, [*given]))
    assert np.abs(got.numpy() - expected).max() < 1e-12 * np.abs(expected).max()


def test_compile_and_run_from_the_command(seed: int, tmp_path: Path) -> None:
    """A folder with weights beside the graph; both phases of the artifact; token ids where there is no tokenizer."""
    path, out = tmp_path / "graph" / "model.onnx", tmp_path / "m.moec"
    path.parent.mkdir()
    onnx.save(mixture(Sizes(), seed), path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    invoke = CliRunner().invoke
    done = invoke(make_app([]), ["compile", str(path), "--recipe", "fp32", "--context", "64", "--out", str(out)])
    assert done.exit_code == 0, done.output
    ids = np.random.default_rng(seed).integers(0, Sizes().vocab, (1, LENGTH))
    expected = oracle(path, ids)
    model = moec.load(out)
    for chunk in (None, 1):
        assert np.abs(model.logits(ids, chunk=chunk)[0] - expected).max() / expected.std() < BOUND
    done = invoke(make_app([]), ["run", str(out), "--prompt-ids", "1,2,3", "--max-new-tokens", "4", "--json"])
    assert done.exit_code == 0, done.output
    for option in ("--prompt", "--chat"):
        done = invoke(make_app([]), ["run", str(out), option, "hello"])
        assert isinstance(done.exception, NoTokenizer)


def test_tokenizer_and_chat_template_beside_the_graph(seed: int, tmp_path: Path) -> None:
    """A made-up tokenizer of 61 tokens and its template, from the folder through the commands."""
    path, out = tmp_path / "graph" / "model.onnx", tmp_path / "m.moec"
    path.parent.mkdir()
    onnx.save(mixture(Sizes(layers=1), seed), path)
    words = {f"w{i}": i for i in range(60)} | {"<unk>": 60}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.save(str(path.parent / "tokenizer.json"))
    template = path.parent / "chat_template.jinja"
    template.write_text("{% for m in messages %}w1 {{ m['content'] }} w2{% endfor %}")
    invoke = CliRunner().invoke
    command = ["compile", str(path), "--recipe", "fp32", "--context", "64", "--out", str(out)]
    assert invoke(make_app([]), command).exit_code == 0
    answers = []
    for given in (["--prompt", "w1 w7 w9 w2"], ["--chat", "w7 w9"], ["--prompt-ids", "1,7,9,2"]):
        done = invoke(make_app([]), ["run", str(out), *given, "--max-new-tokens", "4", "--json"])
        assert done.exit_code == 0, done.output
        answers.append(json.loads(done.stdout))
    assert answers[0]["token_ids"] == answers[1]["token_ids"] == answers[2]["token_ids"]
    assert answers[1]["text"].split() == [f"w{i}" if i < 60 else "<unk>" for i in answers[1]["token_ids"]]
    (out / "tokenizer" / "chat_template.jinja").unlink()
    done = invoke(make_app([]), ["run", str(out), "--chat", "w7"])
    assert "chat_template.jinja is missing" in str(done.exception)


def refused(model: onnx.ModelProto, folder: Path) -> str:
    path = folder / "bad.onnx"
    onnx.save(model, path)
    with pytest.raises(OnnxError) as error:
        moec.trace(str(path))
    text = str(error.value)
    assert "\n" not in text and str(path) in text
    return text


def test_unknown_operator_is_named(tmp_path: Path) -> None:
    model = mixture(Sizes(layers=1), 0)
    next(n for n in model.graph.node if n.op_type == "MoE").op_type = "MoEx"
    text = refused(model, tmp_path)
    assert "node /model/layers.0/moe/MoE: com.microsoft::MoEx of operator set 1" in text and "did you mean" in text


def test_experts_without_gate_are_refused(tmp_path: Path) -> None:
    model = mixture(Sizes(layers=1), 0)
    node = next(n for n in model.graph.node if n.op_type == "MoE")
    next(a for a in node.attribute if a.name == "activation_type").s = b"tanh"
    assert "experts with tanh" in refused(model, tmp_path)


def test_data_outside_of_the_folder_is_not_read(tmp_path: Path) -> None:
    """Neither by `..`, nor by an absolute path, nor by a link."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(1 << 16))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(secret)
    for place in ("../secret.bin", str(secret), "link.bin"):
        model = mixture(Sizes(layers=1), 0)
        weight = next(t for t in model.graph.initializer if t.name == "lm_head.weight")
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        entry = weight.external_data.add()
        entry.key, entry.value = "location", place
        assert "outside of the model's folder" in refused(model, folder)


def test_truncated_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(mixture(Sizes(layers=1), 0), path, save_as_external_data=True, location="w.bin", size_threshold=64)
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:5000])
    with pytest.raises(OnnxError, match=r"ends behind the end of w\.bin"):
        moec.trace(str(path))


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    model = mixture(Sizes(layers=1), 0)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8
    assert "tokens dynamic" in refused(model, tmp_path)
    model = mixture(Sizes(layers=1), 0)
    model.graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3]))
    assert "input pixels" in refused(model, tmp_path)
    with pytest.raises(OnnxError, match="no such file"):
        moec.trace(str(tmp_path / "none.onnx"))
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(OnnxError, match="not an ONNX model"):
        moec.trace(str(tmp_path / "text.onnx"))
