"""Train `tiny-deepseek-v3`: DeepSeek-V3's architecture with 4.4 million parameters, on Python source text.

The main model is transformers' `DeepseekV3ForCausalLM`, the multi-token-prediction (MTP) module its
`MtpModel`; this script adds the text, the tokenizer, the bias update that balances the experts (DeepSeek-V3
technical report, arXiv 2412.19437, sec. 2.1.2), the loop, and the export under the published tensor names.

    python examples/train_tiny.py --steps 1200 --seed 0 --out tiny-deepseek-v3

Same seed, text and library versions on one thread give the same weights. Progress is kept in
`OUT.checkpoint.safetensors`: `--resume` goes on from there, `--minutes M` stops after M minutes and exports
what there is (`--resume --minutes 0` exports a checkpoint without training).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sysconfig
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from export_tiny import Origin, Scores, both_logits, with_start, write_card, write_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

END = "<|end_of_text|>"
VOCABULARY = 768
STDLIB = Path(sysconfig.get_path("stdlib"))
# Tests, vendored copies, generated tables and files that carry build paths are no text worth learning.
SKIPPED = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "encodings", "pydoc_data"}
SKIPPED |= {"site-packages", "dist-packages", "__pycache__"}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
HELDOUT_SHARE = 50  # one file in this many
HELDOUT_BYTES = 28_000  # largest size of the excerpt stored beside the weights


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights apart from the text. Lengths and sizes in tokens."""

    steps: int
    seed: int
    warmup: int = 100
    decay_share: float = 0.2  # the last part of the steps: falling rate, fixed gate bias, longer sequences
    tokens_per_step: int = 2048
    length: int = 256
    decay_length: int = 512
    peak_rate: float = 2e-3
    weight_decay: float = 0.1
    bias_speed: float = 0.005
    mtp_weight: float = 0.3
    mtp_weight_decay_phase: float = 0.1

    @property
    def decay_start(self) -> int:
        return self.steps - int(self.steps * self.decay_share)

    def decaying(self, step: int) -> bool:
        return step >= self.decay_start

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, linear decay to zero (warmup-stable-decay)."""
        if self.decaying(step):
            return self.peak_rate * (self.steps - step) / (self.steps - self.decay_start)
        return self.peak_rate * min(1.0, (step + 1) / self.warmup)

    def describe(self) -> str:
        return (
            f"AdamW (0.9, 0.95), weight decay {self.weight_decay} on matrices, gradient norm at most 1; rate "
            f"{self.peak_rate} after\n  {self.warmup} warm-up steps, falling to zero over the last "
            f"{self.decay_share:.0%} of the steps; {self.tokens_per_step} tokens a step in sequences of\n"
            f"  {self.length} ({self.decay_length} during the decay). Gate bias moved by {self.bias_speed} a step "
            f"against the sign of the load error (fixed\n  during the decay), no auxiliary balance loss; MTP "
            f"loss weighted {self.mtp_weight} ({self.mtp_weight_decay_phase} during the decay)."
        )


# ---------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Corpus:
    """Files as (relative path, bytes): those to train on, and those held out by the hash of their path."""

    train: list[tuple[str, bytes]]
    heldout: list[tuple[str, bytes]]
    source: str  # whose text it is, for the card
    licence: bytes  # empty when the folder has none

    @staticmethod
    def read(root: Path) -> Corpus:
        found: list[tuple[str, bytes]] = []
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if any(part in SKIPPED or part.startswith(SKIPPED_PREFIXES) for part in parts):
                continue
            found.append(("/".join(parts), path.read_bytes()))
        heldout = [file for file in found if path_hash(file[0]) % HELDOUT_SHARE == 0]
        train = [file for file in found if path_hash(file[0]) % HELDOUT_SHARE != 0]
        if not heldout or not train:
            raise SystemExit(f"{root}: {len(found)} Python files are too few to hold one in {HELDOUT_SHARE} out")
        licence = root / "LICENSE.txt"
        name = f"the Python {platform.python_version()} standard library" if root == STDLIB else root.name
        return Corpus(train, heldout, name, licence.read_bytes() if licence.exists() else b"")

    def excerpt(self) -> bytes:
        """Whole held-out files in the order of their hash, as many as fit into HELDOUT_BYTES; UTF-8."""
        chosen: list[bytes] = []
        for _, text in sorted(self.heldout, key=lambda file: path_hash(file[0])):
            if sum(map(len, chosen)) + len(text) <= HELDOUT_BYTES:
                chosen.append(text)
        return b"".join(chosen).decode("utf-8", errors="replace").encode()


def path_hash(path: str) -> int:
    return int(hashlib.sha256(path.encode()).hexdigest(), 16)


def digest(files: list[tuple[str, bytes]]) -> str:
    return hashlib.sha256(b"".join(text for _, text in files)).hexdigest()


def texts(files: list[tuple[str, bytes]]) -> list[str]:
    return [data.decode("utf-8", errors="replace") for _, data in files]


def train_tokenizer(files: list[tuple[str, bytes]]) -> tokenizers.Tokenizer:
    """Byte-level BPE: the 256 bytes are in the vocabulary, so every text encodes and decodes to itself."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(files), trainer)
    return tokenizer


def batch(tokens: Tensor, recipe: Recipe, step: int) -> Tensor:
    """int64[B, L+2]: windows at random places that depend on the seed and the step alone."""
    length = recipe.decay_length if recipe.decaying(step) else recipe.length
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    last = len(tokens) - length - 2
    starts = torch.randint(0, last + 1, (recipe.tokens_per_step // length, 1), generator=generator)
    return tokens[starts + torch.arange(length + 2)]


# --------------------------------------------------------------------------------------------- model


def tiny_config() -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        num_nextn_predict_layers=1,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


class Network:
    """The main model, its MTP module (embedding and head are the main model's), and the gates of both."""

    def __init__(self, config: DeepseekV3Config, seed: int) -> None:
        torch.manual_seed(seed)
        config._experts_implementation = "eager"
        self.main = DeepseekV3ForCausalLM(config)
        self.mtp = MtpModel(self.main, num_mtp_layers=1)
        # MtpModel knows no DeepSeek-V3 initialisation: its gate would stay zero and its experts unset memory.
        for parameter in self.mtp.layers.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=config.initializer_range)
        self.modules = nn.ModuleDict({"main": self.main, "mtp": self.mtp.layers})
        self.gates: list[nn.Module] = [m.get_submodule("gate") for m in self.modules.modules() if hasattr(m, "gate")]
        self.loads: dict[nn.Module, Tensor] = {}
        for gate in self.gates:
            gate.register_forward_hook(self._count)

    def _count(self, gate: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        bias = gate.get_buffer("e_score_correction_bias")
        self.loads[gate] = torch.bincount(outputs[2].flatten(), minlength=len(bias)).float()

    def update_bias(self, speed: float) -> float:
        """Raise the bias of experts below the mean load and lower it above; largest load / mean load - 1."""
        for gate, load in self.loads.items():
            gate.get_buffer("e_score_correction_bias").add_(speed * torch.sign(load.mean() - load))
        return max(float(load.max() / load.mean()) for load in self.loads.values()) - 1

    def losses(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64[B, L+2] -> mean cross-entropy in nats of the main model and of the MTP module."""
        main, ahead = both_logits(self.main, self.mtp, ids[:, :-1])
        return (
            F.cross_entropy(main.flatten(0, 1), ids[:, 1:-1].flatten()),
            F.cross_entropy(ahead.flatten(0, 1), ids[:, 2:].flatten()),
        )

    def optimizer(self, recipe: Recipe) -> torch.optim.AdamW:
        parameters = list(self.modules.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), fused=True)


# ------------------------------------------------------------------------------------------ training


class Trainer:
    """Holds what a checkpoint holds: weights, optimizer state, the step, and the latest losses."""

    def __init__(self, network: Network, tokens: Tensor, recipe: Recipe, text: str) -> None:
        self.network, self.tokens, self.recipe, self.text = network, tokens, recipe, text
        self.optimizer = network.optimizer(recipe)
        self.step = 0
        self.recent: deque[float] = deque(maxlen=100)

    def advance(self) -> dict[str, float]:
        """One optimizer step; returns what a log line shows."""
        recipe, late = self.recipe, self.recipe.decaying(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.step)
        main, ahead = self.network.losses(batch(self.tokens, recipe, self.step))
        loss = main + (recipe.mtp_weight_decay_phase if late else recipe.mtp_weight) * ahead
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.modules.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        violation = self.network.update_bias(0.0 if late else recipe.bias_speed)
        self.step += 1
        self.recent.append(main.item())
        return {"loss": main.item(), "mtp_loss": ahead.item(), "overload": violation}

    def save(self, path: Path) -> None:
        tensors = {f"net.{k}": v for k, v in self.network.modules.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"opt.{index}.{k}": v for k, v in state.items()}
        tensors["recent"] = torch.tensor(list(self.recent), dtype=torch.float64)
        metadata = {"step": str(self.step), "recipe": json.dumps(asdict(self.recipe)), "text": self.text}
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; another `steps` will do before both decays begin, where the paths part."""
        if not path.exists():
            raise SystemExit(f"{path}: no checkpoint to go on from; start without --resume")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step, old = int(metadata["step"]), Recipe(**json.loads(metadata["recipe"]))
        same = Recipe(**{**asdict(old), "steps": self.recipe.steps}) == self.recipe
        shared = self.recipe.steps == old.steps or step <= min(old.decay_start, self.recipe.decay_start)
        if metadata["text"] != self.text or not same or not shared:
            raise SystemExit(f"{path}: made from another text, recipe or decay at step {step}; start without --resume")
        self.network.modules.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        states: dict[int, dict[str, Tensor]] = {}
        for name in tensors:
            if name.startswith("opt."):
                _, index, key = name.split(".")
                states.setdefault(int(index), {})[key] = tensors[name]
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})
        self.step = step
        self.recent.extend(tensors["recent"].tolist())


def train(trainer: Trainer, checkpoint: Path, minutes: float, every: int) -> None:
    """Run to the recipe's last step or until the minutes are over; keep a checkpoint every so many steps."""
    begun, first = time.monotonic(), trainer.step
    while trainer.step < trainer.recipe.steps and time.monotonic() - begun < minutes * 60:
        shown = trainer.advance()
        if trainer.step % 20 == 0:
            rate = (trainer.step - first) * trainer.recipe.tokens_per_step / (time.monotonic() - begun)
            values = " ".join(f"{k} {v:.4f}" for k, v in shown.items())
            print(f"step {trainer.step}/{trainer.recipe.steps} {values} tokens/s {rate:.0f}", flush=True)
        if trainer.step % every == 0:
            trainer.save(checkpoint)
    if trainer.step > first:
        trainer.save(checkpoint)


def prepare(recipe: Recipe, corpus: Corpus) -> tuple[Trainer, tokenizers.Tokenizer]:
    """A trainer at step 0, and the tokenizer of its text."""
    tokenizer = train_tokenizer(corpus.train)
    tokens = with_start(tokenizer, texts(corpus.train), END)
    return Trainer(Network(tiny_config(), recipe.seed), tokens, recipe, digest(corpus.train)), tokenizer


def export(folder: Path, trainer: Trainer, tokenizer: tokenizers.Tokenizer, corpus: Corpus) -> Scores:
    """Write the whole folder: model, tokenizer, held-out excerpt with its licence, card; its scores."""
    recipe = trainer.recipe
    write_model(folder, trainer.network.main, trainer.network.mtp, tokenizer, END)
    (folder / "heldout.txt").write_bytes(corpus.excerpt())
    if corpus.licence:
        (folder / "heldout.LICENSE.txt").write_bytes(corpus.licence)
    origin = Origin(
        source=corpus.source,
        train_files=len(corpus.train),
        train_bytes=sum(len(text) for _, text in corpus.train),
        train_digest=digest(corpus.train),
        heldout_files=len(corpus.heldout),
        heldout_bytes=sum(len(text) for _, text in corpus.heldout),
        heldout_digest=digest(corpus.heldout),
        recipe=recipe.describe(),
        seed=recipe.seed,
        planned_steps=recipe.steps,
        steps=trainer.step,
        tokens_seen=trainer.step * recipe.tokens_per_step,
        train_loss=sum(trainer.recent) / max(1, len(trainer.recent)),
    )
    return write_card(folder, origin, texts(corpus.heldout), END)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tiny-deepseek-v3 and write it as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and export after this time")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from OUT.checkpoint.safetensors")
    parser.add_argument("--text", type=Path, default=STDLIB, help="folder of .py files (default: standard library)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus = Corpus.read(options.text)
    print(f"{len(corpus.train)} files to train on, {len(corpus.heldout)} held out", flush=True)
    trainer, tokenizer = prepare(Recipe(steps=options.steps, seed=options.seed), corpus)
    checkpoint = options.out.with_name(options.out.name + ".checkpoint.safetensors")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if options.resume:
        trainer.load(checkpoint)
    train(trainer, checkpoint, options.minutes, options.checkpoint_every)
    scores = export(options.out, trainer, tokenizer, corpus)
    print(f"step {trainer.step}: held-out loss {scores.loss:.4f}, {scores.bits_per_byte:.4f} bits per byte")


if __name__ == "__main__":
    main()
