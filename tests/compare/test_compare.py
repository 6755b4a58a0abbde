"""`moec run --compare`: agreement on right weights, and the right op named for wrong weights and wrong kernels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import typer
from rotate_parts import RotateParts
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import moec
from moec.cli import run as command
from moec.cli.run import NothingGenerated
from moec.codegen.tvm.emit import EMITTERS, FunctionEmitter
from moec.compare import LongPrompt, compare
from moec.errors import InputError
from moec.frontend.checkpoint import TensorError
from moec.ir import Op, parse_module
from moec.passes import registry
from moec.runtime import Model

CHUNK = 24
IDS = torch.randint(0, 211, (CHUNK - 1,), generator=torch.Generator().manual_seed(0)).tolist()
SIZES: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 72, "intermediate_size": 104, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_shared_experts": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "kv_lora_rank": 24, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model in Hugging Face layout."""
    torch.manual_seed(3)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SIZES)).float()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, p.shape[-1] ** -0.5) if p.ndim > 1 else p.normal_(1, 0.1)
    out = tmp_path_factory.mktemp("hf")
    model.save_pretrained(out)
    return out


def compiled(folder: Path, out: Path, recipe: str, passes: Sequence[str] = ()) -> Model:
    plan = moec.trace(str(folder)).optimize("cpu", context=48, chunk=CHUNK, recipe=recipe, passes=passes)
    return moec.load(plan.compile(out).path)


@pytest.fixture(scope="module")
def fp32(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return compiled(folder, tmp_path_factory.mktemp("fp32") / "m.moec", "fp32")


def test_values_with_several_readers_are_not_changed_in_place(
    fp32: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BUILT_IN", (*registry.BUILT_IN, RotateParts))
    other = compiled(folder, tmp_path / "m.moec", "fp32", ["mla-absorb{fold=never}", "rotate-parts"])
    assert (other.artifact.path / "program.ir").read_text().count("rotate-parts") > 3
    np.testing.assert_allclose(other.logits([IDS], chunk=1), fp32.logits([IDS], chunk=1), rtol=0, atol=1e-5)


def altered(folder: Path, out: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model folder with one tensor changed."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    tensors[tensor] = change(tensors[tensor])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_fp32_agrees_op_by_op_and_with_transformers(fp32: Model, folder: Path) -> None:
    found = compare(fp32, folder, IDS)
    assert found.agrees, found.departures[:1]
    assert found.artifact_error == 0
    assert found.logits_error < 1e-4
    assert found.transformers_error is not None
    assert found.transformers_error < 1e-4


def test_every_computing_op_of_every_layer_is_compared(fp32: Model, folder: Path) -> None:
    """Views show what another op computed; a cache is seen when it is read; a repeat is seen in its layers."""
    module = parse_module((fp32.artifact.path / "program.ir").read_text())
    unseen = {"split", "unflatten", "flatten", "repeat", "cache.append"}

    def seen(name: str) -> int:
        return sum(op.name not in unseen for op in module.functions[name].ops)

    expected: dict[tuple[str, int | None], int] = {("prefill", None): seen("prefill")}
    for op in module.functions["prefill"].ops:
        if op.name == "repeat":
            for layer in range(int(op.attrs["first"]), int(op.attrs["last"]) + 1):  # type: ignore[arg-type]
                expected[str(op.attrs["func"]), layer] = seen(str(op.attrs["func"]))
    found = compare(fp32, folder, IDS[:5])
    assert Counter((op.function, op.layer) for op in found.ops) == expected
    assert {layer for _, layer in expected} == {None, 0, 1, 2}


@pytest.mark.parametrize("recipe", ["weight-only", "mxfp4-experts"])
def test_recipes_agree_with_their_own_rounding(folder: Path, tmp_path: Path, recipe: str) -> None:
    """The reference rounds weights and cache as the artifact does; transformers does not."""
    found = compare(compiled(folder, tmp_path / "m.moec", recipe), folder, IDS)
    assert found.agrees, found.departures[:1]
    assert found.transformers_error is not None
    assert found.transformers_error > 100 * found.bound


@pytest.mark.parametrize(
    ("tensor", "layer", "op", "weight"),
    [
        ("model.layers.1.mlp.experts.3.down_proj.weight", 1, "moe.experts", "@moe_layers.mlp.experts_down[1, 3]"),
        ("model.layers.0.post_attention_layernorm.weight", 0, "norm.add_rms", "@dense_layers.post_norm[0]"),
        ("model.layers.2.mlp.gate.weight", 2, "moe.route", "@moe_layers.mlp.gate[2]"),
        ("model.norm.weight", None, "norm.rms", "@norm"),
    ],
)
def test_altered_weights_are_named(
    fp32: Model, folder: Path, tmp_path: Path, tensor: str, layer: int | None, op: str, weight: str
) -> None:
    """Only the op that uses the altered weight departs: later ones are checked on what it handed to them."""
    found = compare(fp32, altered(folder, tmp_path / "hf", tensor, lambda w: w * 1.02), IDS)
    (departure,) = found.departures
    assert (departure.layer, name(departure.op)) == (layer, op)
    assert departure.weights == (weight,)
    assert not found.agrees


def test_wrong_kernels_are_named(fp32: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emitters that misread an attribute: every use of them departs, nothing else, and no weight is blamed."""
    for op, wrong in (("norm.rms", {"eps": 1e-2}), ("rope", {"interleaved": False})):
        monkeypatch.setitem(EMITTERS, op, misreading(EMITTERS[op], wrong))
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    found = compare(fp32, folder, IDS)
    layer = ["norm.rms", "norm.rms", "rope", "norm.rms", "rope"]
    assert [name(d.op) for d in found.departures] == [*layer, *layer, *layer, "norm.rms"]
    assert all(d.weights == () for d in found.departures)
    assert found.departures[0].location[0].startswith("deepseek_v3/model.py:")
    assert found.artifact_error > found.bound


def misreading(emitter: Callable[[FunctionEmitter, Op], None], wrong: dict[str, Any]) -> Callable[..., None]:
    return lambda e, op: emitter(e, replace(op, attrs={**op.attrs, **wrong}))


def name(text: str) -> str:
    """The op of a line of IR with results."""
    return text.partition(" = ")[2].split()[0]


def invoke(*args: object) -> Result:
    app = typer.Typer()
    command.register(app)
    return CliRunner().invoke(app, [str(a) for a in args])


def test_command_prints_one_object_and_exits_with_1_on_departure(fp32: Model, folder: Path, tmp_path: Path) -> None:
    other = altered(folder, tmp_path / "hf", "lm_head.weight", lambda w: w + 0.01)
    common = (fp32.artifact.path, "--prompt-ids", "1,2,3", "--compare")
    done = invoke(*common, folder, "--json")
    fields = json.loads(done.stdout)
    assert (done.exit_code, fields["agrees"], fields["departures"], fields["tokens"]) == (0, True, [], 3)
    done = invoke(*common, other)
    assert done.exit_code == 1
    assert "departs   @prefill, by " in done.stdout
    assert "from deepseek_v3/model.py:" in done.stdout
    assert "stored otherwise than in the folder: @head" in done.stdout


def test_command_refuses_options_of_generation(fp32: Model, folder: Path) -> None:
    done = invoke(fp32.artifact.path, "--prompt-ids", "1,2", "--compare", folder, "--max-new-tokens", "3")
    assert isinstance(done.exception, NothingGenerated)


def test_runtime_runs_without_the_comparison(fp32: Model) -> None:
    """Generating imports neither the compiler nor torch."""
    script = (
        "import sys; from moec.cli import main; sys.argv = ['moec', 'run', sys.argv[1], '--prompt-ids', '1,2'];\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "print(sorted({m for m in ('torch', 'tvm', 'moec.compare') if m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(fp32.artifact.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_wrong_input_is_one_line(fp32: Model, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LongPrompt, match=f"has {CHUNK + 1} tokens, the artifact takes {CHUNK} in a chunk"):
        compare(fp32, folder, [1] * (CHUNK + 1))
    with pytest.raises(InputError, match="nothing: ") as missing:
        compare(fp32, tmp_path / "nothing", IDS)
    with pytest.raises(TensorError, match=r"model.norm.weight .*\[71\].*\[72\]") as shape:
        compare(fp32, altered(folder, tmp_path / "hf", "model.norm.weight", lambda w: w[1:].clone()), IDS)
    for error in (missing.value, shape.value):
        assert "\n" not in str(error)
        assert error.exit_code == 2
