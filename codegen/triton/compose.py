"""Kernels in sequence: routed experts, and absorbed attention, as an executor puts them on a stream.

Written against torch tensors so that the sequence itself is tested in the interpreter and timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.codegen.triton.problem import element_type, launch
from moec.codegen.triton.spec import Instance, kernel
from moec.codegen.triton.specs.attention import query_distances

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor


@dataclass(frozen=True)
class Experts:
    """Weights of a layer's router and routed experts; gate and up projection stacked, gate rows first.

    router[E, K] BF16, bias[E]; gate_up[E, 2*I, K] and down[E, K, I] in E4M3 with 128x128 scales.
    """

    router: Tensor
    bias: Tensor
    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor
    groups: int
    top_groups: int
    top_k: int
    route_scale: float


class Chain:
    """Launches kernels by name, in one shape class where a kernel has several, and makes what they write."""

    def __init__(self, arch: str, shape: str, run: Callable[[Instance, dict[str, Any]], None] = launch) -> None:
        self.arch, self.shape, self.run = arch, shape, run

    def __call__(
        self, name: str, dims: Mapping[str, int], arguments: dict[str, Any], **outputs: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """Runs a kernel on `arguments`; `outputs` are shapes of further pointer arguments, returned in order."""
        import torch

        spec = kernel(name)
        shape = self.shape if self.shape in spec.shapes(self.arch) else ""
        instance = spec.instance(self.arch, shape, **dims)
        device = next(v.device for v in arguments.values() if isinstance(v, torch.Tensor))
        made = {
            n: torch.empty(size, dtype=element_type(instance.signature[n]), device=device)
            for n, size in outputs.items()
        }
        self.run(instance, {**arguments, **made})
        return tuple(made.values())

    def block_rows(self, name: str) -> int:
        """BM of a kernel: what a contiguous layout is padded to."""
        spec = kernel(name)
        shape = self.shape if self.shape in spec.shapes(self.arch) else ""
        return int(spec.instance(self.arch, shape).tile.constants["BM"])


def routed_experts(chain: Chain, x: Tensor, experts: Experts, masked: bool) -> Tensor:
    """x[T, K] BF16 -> the weighted sum of the chosen experts, [T, K]: nine kernels, no number read by the host.

    `masked` gives every expert room for all T tokens (decode); otherwise experts follow one another, padded to blocks.
    """
    import torch

    tokens, width = x.shape
    count, inner = experts.down.shape[0], experts.down.shape[2]
    top_k = experts.top_k
    layout = "masked" if masked else "contiguous"
    logits = router_logits(chain, x, experts.router)
    routing = {"T": tokens, "E": count, "NG": experts.groups, "TOP_GROUPS": experts.top_groups, "TOP_K": top_k}
    tally = torch.zeros(count, dtype=torch.int32, device=x.device)
    index, weight = chain(
        "route_sigmoid_bias", routing,
        {"logit_ptr": logits, "bias_ptr": experts.bias, "count_ptr": tally, "T": tokens,
         "route_scale": experts.route_scale},
        index_ptr=(tokens, top_k), weight_ptr=(tokens, top_k),
    )  # fmt: skip
    align = 0 if masked else chain.block_rows("grouped_fp8_gemm_contiguous")
    pairs = tokens * top_k
    rows = count * tokens if masked else -(-(pairs + min(count, pairs) * (align - 1)) // align) * align
    sizes = {"T": tokens, "TOP_K": top_k, "E": count, "R": rows, "CAPACITY": tokens if masked else 0, "ALIGN": align}
    blocks = {} if masked else {"block_expert_ptr": (rows // align,)}
    slot, source, *of_block = chain(
        f"permutation_{layout}", sizes,
        {"index_ptr": index, "count_ptr": tally, "PAIRS": pairs, "ROWS": rows, "capacity": sizes["CAPACITY"]},
        slot_ptr=(pairs,), source_ptr=(rows,), **blocks,
    )  # fmt: skip
    place = {"layout_ptr": tally if masked else of_block[0], "capacity": sizes["CAPACITY"]}
    grouped = {"E": count, "R": rows, "CAPACITY": sizes["CAPACITY"], "ALIGN": align, "INNER": inner}
    quantised, scale = chain(
        "quantise", {"M": tokens, "K": width}, {"x_ptr": x, "K": width},
        q_ptr=(tokens, width), scale_ptr=(tokens, -(-width // 128)),
    )  # fmt: skip
    sent, sent_scale = chain(
        "permute_fp8", {"T": tokens, "R": rows, "D": width},
        {"x_ptr": quantised, "scale_ptr": scale, "source_ptr": source, "D": width},
        y_ptr=(rows, width), y_scale_ptr=(rows, -(-width // 128)),
    )  # fmt: skip
    hidden, hidden_scale = chain(
        f"grouped_fp8_swiglu_{layout}", {**grouped, "K": width},
        {"a_ptr": sent, "a_scale_ptr": sent_scale, "b_ptr": experts.gate_up, "b_scale_ptr": experts.gate_up_scale,
         **place, "INNER": inner, "K": width},
        c_ptr=(rows, inner), c_scale_ptr=(rows, inner // 128),
    )  # fmt: skip
    (out,) = chain(
        f"grouped_fp8_gemm_{layout}", {**grouped, "N": width, "K": inner},
        {"a_ptr": hidden, "a_scale_ptr": hidden_scale, "b_ptr": experts.down, "b_scale_ptr": experts.down_scale,
         **place, "N": width, "K": inner},
        c_ptr=(rows, width),
    )  # fmt: skip
    (y,) = chain(
        "unpermute", {"T": tokens, "R": rows, "D": width, "TOP_K": top_k},
        {"x_ptr": out, "slot_ptr": slot, "weight_ptr": weight, "D": width}, y_ptr=(tokens, width),
    )  # fmt: skip
    return y


def router_logits(chain: Chain, x: Tensor, router: Tensor) -> Tensor:
    """x[T, K], router[E, K] BF16 -> float32 [T, E]."""
    (tokens, width), experts = x.shape, router.shape[0]
    (logits,) = chain(
        "bf16_gemm_f32", {"B": 1, "M": tokens, "N": experts, "K": width},
        {"a_ptr": x, "b_ptr": router, "M": tokens, "N": experts, "K": width, "lda": width, "ldb": width,
         "ldc": experts, "a_batch": 0, "b_batch": 0, "c_batch": 0},
        c_ptr=(tokens, experts),
    )  # fmt: skip
    return logits


def absorbed_attention(
    chain: Chain, q: Tensor, cache: Tensor, pages: Tensor, length: Tensor, scale: float, splits: int
) -> Tensor:
    """q[B, queries, heads, rank+rope], BF16 cache[pages, page, rank+rope], pages[B, n], length[B] -> [..., rank]."""
    batch, queries, heads, width = q.shape
    rank = width - 64
    rows = queries * heads
    sizes = {
        "B": batch,
        "HEADS": heads,
        "QUERIES": queries,
        "DV": rank,
        "DR": 64,
        "PAGE": cache.shape[1],
        "SPLITS": splits,
    }
    flat = cache.view(-1, width)
    partial, lse = chain(
        "mla_decode_split", sizes,
        {"q_ptr": q[..., :rank], "q_rope_ptr": q[..., rank:], "latent_ptr": flat[:, :rank], "rope_ptr": flat[:, rank:],
         "pages_ptr": pages, "length_ptr": length, **query_distances(heads, width), "softmax_scale": scale,
         "max_pages": pages.shape[1], "splits": splits, "QUERIES": queries, "ROWS": rows},
        partial_ptr=(batch, splits, rows, rank), lse_ptr=(batch, splits, rows),
    )  # fmt: skip
    (out,) = chain(
        "mla_decode_combine", {"B": batch, "ROWS": rows, "SPLITS": splits, "DV": rank},
        {"partial_ptr": partial, "lse_ptr": lse, "splits": splits, "ROWS": rows}, out_ptr=(batch, rows, rank),
    )  # fmt: skip
    return out.view(batch, queries, heads, rank)
