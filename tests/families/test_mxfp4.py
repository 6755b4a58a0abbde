"""gpt-oss checkpoints with experts in MXFP4, unpacked as transformers' integration does."""

from __future__ import annotations

from pathlib import Path

import torch
from random_configs import make_model
from safetensors.torch import save_file
from test_families import evaluated
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

import moec
from moec.frontend.checkpoint import bind, open_checkpoint


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    model = make_model("gpt_oss", 3)
    config = model.config
    config.hidden_size, config.intermediate_size = 64, 32
    model = type(model)(config).eval().float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5))
        tensors = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
        for layer in range(config.num_hidden_layers):
            for part, inner in (("gate_up_proj", config.hidden_size), ("down_proj", config.intermediate_size)):
                name = f"model.layers.{layer}.mlp.experts.{part}"
                experts, _, outer = tensors.pop(name).shape
                shape = (experts, outer, inner // 32)
                blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
                scales = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
                tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                unpacked = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
                model.state_dict()[name].copy_(unpacked)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    traced, checkpoint = moec.trace(str(tmp_path)), open_checkpoint(tmp_path)
    assert bind(traced.ir, checkpoint) == []
    assert any(op.name == "weight.mxfp4" for w in traced.ir.weights.values() for op in w.program.ops)
    ids = torch.arange(30) * 7 % config.vocab_size
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    got = evaluated(traced.ir, checkpoint.load, ids)
    assert (got - expected).abs().max() / expected.std() < 5e-5
