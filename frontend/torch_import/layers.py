"""Where the layers of an exported graph begin and end."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from moec.frontend.torch_import import patterns as P
from moec.frontend.torch_import.exported import ancestors, shape


@dataclass(frozen=True)
class Span:
    """A layer: its number, the hidden state that goes in, and the one that comes out."""

    number: int
    first: Node
    out: Node


def spans_by_dominance(nodes: list[Node], logits: Node) -> list[Span]:
    """Layers of a graph that does not say which node belongs to which.

    Nodes through which every path from the embedding to the logits leads are those over which no edge reaches. Between
    the attentions of two layers the last sum among them is the hidden state that one hands to the other.
    """
    needed = ancestors(logits)
    after: set[Node] = set()
    line: list[Node] = []
    for node in nodes:
        if node in needed and (P.op(node).startswith("embedding") or any(n in after for n in node.all_input_nodes)):
            after.add(node)
            line.append(node)
    place = {node: i for i, node in enumerate(line)}
    reach, cuts = 0, []
    for i, node in enumerate(line):
        if reach <= i and len(shape(node)) == 3:
            cuts.append(node)
        reach = max([reach, *(place[u] for u in node.users if u in place)])
    attentions = [place[n] for n in line if P.attention(n) is not None]
    spans: list[Span] = []
    for number, at in enumerate(attentions):
        stop = attentions[number + 1] if number + 1 < len(attentions) else len(line)
        sums = [n for n in cuts if at < place[n] < stop and _sum(n, after)]
        before = [n for n in cuts if place[n] < at]
        if not sums or not before:
            return []
        first = spans[-1].out if spans else P.same(before[-1])
        spans.append(Span(number, first, sums[-1]))
    return spans


def _sum(node: Node, after: set[Node]) -> bool:
    return P.op(node).startswith(("add.Tensor", "add_.Tensor")) and all(n in after for n in node.args[:2])


__all__ = ["Span", "spans_by_dominance"]
