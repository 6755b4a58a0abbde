"""Write a trained tiny DeepSeek-V3 as a Hugging Face folder, measure what was written, describe it in a card.

Tensors carry the names of the published DeepSeek-V3 checkpoint: one matrix per expert, and the MTP module as
the layer after the last (`model.layers.N.*`). Everything is measured on the folder read back, not on the
weights in memory, so the card's numbers are those of the BF16 weights that are shipped.
"""

from __future__ import annotations

import copy
import math
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.modeling_layers import MtpModel

WINDOW = 512  # tokens a window of the evaluation predicts
CARD = Path(__file__).with_name("tiny_card.md")
PROMPT = "class Queue:\n    def __init__(self"


def published(main: DeepseekV3ForCausalLM, mtp: MtpModel) -> dict[str, Tensor]:
    """The tensors of both under the published names: BF16, the gate's correction bias float32 as there."""
    extra = f"model.layers.{main.config.num_hidden_layers}."
    named = dict(main.state_dict())
    for name, tensor in mtp.layers[0].state_dict().items():
        named[extra + name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")] = tensor
    named[extra + "embed_tokens.weight"] = named["model.embed_tokens.weight"]
    named[extra + "shared_head.head.weight"] = named["lm_head.weight"]
    result = {}
    for name, tensor in named.items():
        for part, value in one_matrix_per_expert(name, tensor):
            exact = part.endswith("e_score_correction_bias")
            result[part] = value.to(torch.float32 if exact else torch.bfloat16).clone().contiguous()
    return result


def one_matrix_per_expert(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Split stacked experts ([E, 2I, H] gate over up, [E, H, I] down) into the published matrices."""
    if name.endswith("experts.gate_up_proj"):
        for expert, both in enumerate(tensor):
            gate, up = both.chunk(2)
            yield name.replace("gate_up_proj", f"{expert}.gate_proj.weight"), gate
            yield name.replace("gate_up_proj", f"{expert}.up_proj.weight"), up
    elif name.endswith("experts.down_proj"):
        for expert, down in enumerate(tensor):
            yield name.replace("down_proj", f"{expert}.down_proj.weight"), down
    else:
        yield name, tensor


def write_model(
    folder: Path, main: DeepseekV3ForCausalLM, mtp: MtpModel, tokenizer: tokenizers.Tokenizer, end: str
) -> None:
    """Weights, configuration and tokenizer; each file is replaced whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(published(main, mtp), partial / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(main.config)
    config.architectures, config.dtype, config.use_cache = [type(main).__name__], torch.bfloat16, True
    config.save_pretrained(partial)
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    GenerationConfig(**ends).save_pretrained(partial)
    specials = {"bos_token": end, "eos_token": end, "pad_token": end}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=config.max_position_embeddings, **specials
    ).save_pretrained(partial)
    folder.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        os.replace(file, folder / file.name)
    partial.rmdir()


def read_model(folder: Path) -> tuple[DeepseekV3ForCausalLM, MtpModel]:
    """Both modules of an exported folder, in float32, by transformers' own loaders."""
    main = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # transformers finds MTP tensors by this list, which knows the 61 layers of the published model only.
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{main.config.num_hidden_layers}\..*"]
    return main.eval(), MtpModel.from_pretrained(main).eval()


def both_logits(main: DeepseekV3ForCausalLM, mtp: MtpModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """int64[B, L+1] -> float32[B, L, V] twice: the next token after each of the first L positions, and by
    MTP the one after that, from the normed hidden state at t and the embedding of token t+1."""
    hidden = main.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    positions = torch.arange(1, ids.shape[1])[None]
    ahead = mtp.forward_layer(0, hidden, positions, None, input_ids=ids[:, 1:])
    return main.lm_head(hidden), main.lm_head(ahead)


@dataclass(frozen=True)
class Scores:
    """Loss in nats per token; `mtp_agreement` is the share of positions where MTP's first choice for the
    token after next is the main model's one step later, `mtp_accuracy` where it is the token of the text."""

    tokens: int
    bytes: int
    loss: float
    mtp_agreement: float
    mtp_accuracy: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.bytes


@torch.no_grad()
def score(main: DeepseekV3ForCausalLM, mtp: MtpModel, ids: Tensor, size: int) -> Scores:
    """Score int64[N] tokens that stand for `size` bytes, the first being the end-of-text token.

    Windows of WINDOW predictions follow each other and share one token, so every token but the first is
    predicted exactly once, from at most WINDOW tokens before it.
    """
    nats, agree, right, ahead_count = 0.0, 0, 0, 0
    for start in range(0, len(ids) - 1, WINDOW):
        window = ids[None, start : start + WINDOW + 1]
        logits, ahead = both_logits(main, mtp, window)
        nats += F.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
        guess = ahead[0, :-1].argmax(-1)
        agree += int((guess == logits[0, 1:].argmax(-1)).sum())
        right += int((guess == window[0, 2:]).sum())
        ahead_count += len(guess)
    count = len(ids) - 1
    return Scores(count, size, nats / count, agree / ahead_count, right / ahead_count)


@torch.no_grad()
def sample(main: DeepseekV3ForCausalLM, tokenizer: tokenizers.Tokenizer, **options: Any) -> str:
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    torch.manual_seed(0)
    mask = torch.ones_like(ids)
    made = main.generate(ids, attention_mask=mask, pad_token_id=0, max_new_tokens=160, **options)
    return str(tokenizer.decode(made[0].tolist()))


@dataclass(frozen=True)
class Origin:
    """What the weights were made from. `source`: whose text it is; digests: SHA-256 of the joined files."""

    source: str
    train_files: int
    train_bytes: int
    train_digest: str
    heldout_files: int
    heldout_bytes: int
    heldout_digest: str
    recipe: str
    seed: int
    planned_steps: int
    steps: int
    tokens_seen: int
    train_loss: float


def row(name: str, scores: Scores) -> str:
    return (
        f"| {name} | {scores.tokens:,} | {scores.bytes:,} | {scores.loss:.4f} | {scores.perplexity:.3f} "
        f"| {scores.bits_per_byte:.4f} | {scores.mtp_agreement:.1%} | {scores.mtp_accuracy:.1%} |"
    )


def with_start(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], end: str) -> Tensor:
    """int64[N]: the tokens of each text after an end-of-text token."""
    start = tokenizer.token_to_id(end)
    encodings = tokenizer.encode_batch(list(texts))
    return torch.tensor([token for encoding in encodings for token in (start, *encoding.ids)])


def write_card(folder: Path, origin: Origin, heldout: Sequence[str], end: str) -> Scores:
    """Score the folder on its `heldout.txt` and all held-out files, write README.md; the excerpt's scores."""
    main, mtp = read_model(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = (folder / "heldout.txt").read_bytes().decode()
    excerpt = score(main, mtp, with_start(tokenizer, [text], end), len(text.encode()))
    size = sum(len(part.encode()) for part in heldout)
    whole = score(main, mtp, with_start(tokenizer, heldout, end), size)
    config = main.config
    card = CARD.read_text(encoding="utf-8").format(
        origin=origin,
        config=config,
        excerpt=excerpt,
        main_parameters=sum(p.numel() for p in main.parameters()),
        mtp_parameters=sum(p.numel() for p in mtp.layers.parameters()),
        rows=row("`heldout.txt`", excerpt) + "\n" + row("all held-out files", whole),
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        window=WINDOW,
        end=end,
        prompt=PROMPT,
        greedy=sample(main, tokenizer, do_sample=False),
        sampled=sample(main, tokenizer, do_sample=True, temperature=0.8, top_p=0.95, top_k=0),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return excerpt
