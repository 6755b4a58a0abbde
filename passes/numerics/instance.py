"""The small instance that a module is evaluated on: random weights by name, and batches that fill a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from moec.ir import CacheType, Function, IndexType, TensorType
from moec.ir.numeric import TORCH

PAGE = 4
"""Tokens of a cache page."""
CHUNKS = ((3, 1, 2, 2), (1, 3, 1, 2), (1, 1, 1, 1), (2, 1, 2, 1))
"""Tokens of each of four sequences in each call: a prompt, a further chunk, one token each, several tokens each.

Two replicas with two micro-batches each have a sequence for every part; pages are crossed by all.
"""


def chunks(context: int) -> Iterator[tuple[int, ...]]:
    """Those of `CHUNKS` that fit into `context` tokens."""
    used = [0] * len(CHUNKS[0])
    for tokens in CHUNKS:
        used = [u + t for u, t in zip(used, tokens, strict=True)]
        if max(used) > context:
            return
        yield tokens


class Loader:
    """Random tensors by name: norms near 1, matrices of unit output variance, biases that change what is chosen."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        if (name, shape) not in self._made:
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            x = torch.randn(shape, generator=generator)
            if name.endswith(("_scale_inv", "_scale")):
                x = torch.exp2(torch.floor(x) - 6)
            elif len(shape) == 1:
                x = 1 + 0.3 * x if "norm" in name else 0.3 * x
            elif "embed" not in name:
                x *= shape[-1] ** -0.5
            self._made[name, shape] = x.to(TORCH[dtype])
        return self._made[name, shape]


class Inputs:
    """Arguments of an entry function, call by call; caches stay and fill."""

    def __init__(self, function: Function, share: tuple[int, int] = (0, 1)) -> None:
        """`share` is (replica, replicas): sequence b belongs to replica b mod replicas."""
        self.function = function
        self.share = share
        self.taken: list[int] = []
        """Tokens of the whole chunk that the last one of this replica holds."""
        self.parts = int(str(function.attrs.get("micro_batches", 1)))
        self._prompts = "prompt_parts" in function.attrs
        self._places: list[int] = []
        """Of every row of the parts in turn, its place in the whole chunk."""
        self.caches: dict[str, torch.Tensor] = {}
        self.used: tuple[int, ...] = (0,) * len(CHUNKS[0])
        self._random = torch.Generator().manual_seed(0)
        self._vocabulary = min(
            (int(str(op.operands[1].type.shape[0])) for op in function.ops if op.name == "embed"
             and isinstance(op.operands[1].type, TensorType)), default=2,
        )  # fmt: skip
        total = max(map(sum, zip(*CHUNKS, strict=True)))
        self._pages = -(-total // PAGE)
        for arg in function.args:
            if isinstance(arg.type, CacheType):
                symbols = {s: len(self.used) * self._pages for s in arg.type.symbols()}
                layers, pages, _, *width = TensorType(arg.type.dtype, arg.type.shape).bound(symbols)
                self.caches[arg.name] = torch.zeros(layers, pages, PAGE, *width, dtype=torch.float64)

    def joined(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The results of all micro-batches in the order in which the whole batch has them."""
        parts = self.parts
        if parts == 1:
            return outputs
        order = sorted(range(len(self._places)), key=self._places.__getitem__)
        return [torch.cat(outputs[i : i + parts])[order] for i in range(0, len(outputs), parts)]

    def chunk(self, tokens: tuple[int, ...]) -> list[Any]:
        """Arguments for the next `tokens` of each sequence, of which this replica gets its own."""
        ids = torch.randint(0, self._vocabulary, (sum(tokens),), generator=self._random)
        owner = [b for b, t in enumerate(tokens) for _ in range(t)]
        replica, replicas = self.share
        mine = [b for b in range(len(tokens)) if b % replicas == replica]
        self.taken = [t for t, b in enumerate(owner) if b in mine]
        known: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}
        self._places = []
        firsts = [sum(tokens[:b]) for b in range(len(tokens))]
        for k in range(self.parts):
            few, cut = mine, [(t * k // self.parts, t * (k + 1) // self.parts) for t in tokens]
            if not self._prompts:
                # Part k of a split batch has the sequences from k / parts of them on; it may have none.
                few, cut = (
                    mine[len(mine) * k // self.parts : len(mine) * (k + 1) // self.parts],
                    [(0, t) for t in tokens],
                )
            at = [firsts[b] + t for b in few for t in range(*cut[b])]
            described = self._describe(few, cut)
            described["ids"] = ids[at]
            self._places += at
            suffix = f"_{k}" if self.parts > 1 else ""
            known |= {name + suffix: value for name, value in described.items()}
            counts |= {f"{symbol}{k}": len(described["ids"]) for symbol in "TRSB"}
        self.used = tuple(u + t for u, t in zip(self.used, tokens, strict=True))
        return [self._argument(arg.name, arg.type, known, len(self.taken), counts) for arg in self.function.args]

    def _describe(self, few: list[int], cut: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Where the new tokens `cut[b]` of some of the sequences stand."""
        sequences = len(cut)
        seq = [i for i, b in enumerate(few) for _ in range(*cut[b])]
        pos = [self.used[b] + t for b in few for t in range(*cut[b])]
        ends = [self.used[b] + cut[b][1] for b in range(sequences)]
        # Pages of the sequences lie interleaved and backwards, so that a wrong page shows.
        pages = [[self._pages * sequences - 1 - sequences * n - b for n in range(self._pages)] for b in few]
        return {
            "seq": torch.tensor(seq, dtype=torch.int64),
            "pos": torch.tensor(pos, dtype=torch.int64),
            "pages": torch.tensor(pages, dtype=torch.int64).reshape(len(few), self._pages),
            "starts": torch.tensor([sum(ends[b] for b in few[:i]) for i in range(len(few) + 1)]),
            "rows": torch.arange(len(seq)),
        }

    def _argument(
        self, name: str, type: Any, known: dict[str, torch.Tensor], count: int, counts: dict[str, int]
    ) -> Any:
        if isinstance(type, IndexType):
            return 0
        if isinstance(type, CacheType):
            return self.caches[name]
        shape = type.bound(dict.fromkeys(type.symbols(), count) | counts)
        if type.dtype.startswith(("i", "u", "b")) and not type.dtype.startswith("bf"):
            return known[name].int() if name in known else torch.zeros(shape, dtype=TORCH[type.dtype])
        return torch.randn(shape, generator=self._random, dtype=torch.float64)
