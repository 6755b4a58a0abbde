"""torch.export of a language model, and what raising asks of its graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import Node

from moec.errors import InputError, printable

EXPERTS = (
    "write the experts without a loop over those that were hit: rows = x.repeat_interleave(k, 0), then "
    "torch.bmm(gate_up[ids.flatten()], rows[..., None]), ..., and (y.view(T, k, -1) * weights[..., None]).sum(1); "
    "transformers does so with config._experts_implementation = 'batched_mm'"
)
ROTARY = (
    "take a rotary embedding whose frequencies do not depend on how long the text is "
    "(rope_type default, linear, yarn or llama3)"
)
OTHERWISE = "write it without a branch or a loop on tensor values, or fix the value before tracing"


class DataDependent(InputError):
    """A loop or a branch that depends on the values of tensors."""

    template: ClassVar[str] = "{module} decides by the values of a tensor ({why}), which no graph can hold; {advice}"


class NotExportable(InputError):
    """A module that torch.export refuses."""

    template: ClassVar[str] = "torch.export refuses the module: {why}"


def example_ids() -> torch.Tensor:
    """Token ids i64[1, T] to export with.

    The exporter takes a T that equals a dim of the model for that dim: no dim is likely to be this one.
    """
    return torch.zeros(1, 29, dtype=torch.int64)


class Exported:
    """An exported module: its graph, parameters and buffers by node name."""

    def __init__(self, module: nn.Module, example: Sequence[torch.Tensor]) -> None:
        """Raises DataDependent or NotExportable. `example`: token ids i64[1, T]."""
        self.program = _export(module, example)
        signature = self.program.graph_signature
        self.parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.constants = {**self.program.state_dict, **self.program.constants}
        for node, name in getattr(signature, "inputs_to_lifted_tensor_constants", {}).items():
            self.parameters[node] = name
        self.module = module

    @property
    def nodes(self) -> list[Node]:
        """All nodes in order."""
        return list(self.program.graph.nodes)

    def tensor(self, node: Node) -> torch.Tensor:
        """The value of a parameter or buffer."""
        value = self.constants[self.parameters[node.name]]
        assert isinstance(value, torch.Tensor)
        return value

    def name(self, node: Node) -> str:
        """Its name in the checkpoint."""
        return str(self.parameters[node.name])

    def rename_inside(self, number: int, inside: set[Node]) -> None:
        """Names with the number of their layer for the parameters that only one layer takes, where they have none."""
        count = 0
        for node in self.nodes:
            kept = self.parameters.get(node.name)
            if kept is None or node not in inside or f".{number}." in kept or any(u not in inside for u in node.users):
                continue
            user = (
                str(next(iter(node.users)).target).removeprefix("aten.").partition(".")[0] if node.users else "weight"
            )
            fresh = f"layers.{number}.{user}_{count}"
            count += 1
            self.parameters[node.name] = fresh
            self.constants[fresh] = self.constants[kept]

    def value(self, wanted: Node, length: int) -> torch.Tensor:
        """The value of a node that depends on the number of tokens only, for `length` tokens."""
        graph_module = self.program.graph_module
        env: dict[Node, Any] = {}
        needed = ancestors(wanted)
        for node in self.nodes:
            if node not in needed:
                continue
            if node.op == "placeholder":
                known = node.name in self.parameters
                env[node] = self.tensor(node) if known else torch.zeros(1, length, dtype=torch.int64)
            elif node.op == "get_attr":
                env[node] = getattr(graph_module, str(node.target))
            elif node.op == "call_function":
                args = torch.fx.node.map_arg(node.args, lambda n: env[n])
                kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: env[n])
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            if node is wanted:
                break
        result = env[wanted]
        assert isinstance(result, torch.Tensor)
        return result


def ancestors(node: Node) -> set[Node]:
    """The node and all that it depends on."""
    found, pending = {node}, [node]
    while pending:
        for before in pending.pop().all_input_nodes:
            if before not in found:
                found.add(before)
                pending.append(before)
    return found


def shape(node: Node) -> tuple[Any, ...]:
    """Dims; those that depend on the tokens are torch.SymInt. None of a number."""
    return tuple(getattr(node.meta["val"], "shape", ()))


def layer_of(node: Node) -> int | None:
    """The number in the path of the module that made a node (`model.layers.3.mlp` -> 3); None outside layers."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        match = re.search(r"\.(\d+)(?:\.|$)", str(path))
        if match:
            return int(match.group(1))
    return None


def where(node: Node) -> str:
    """The module that made a node, and the line."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = f"{stack[-1][0]} ({getattr(stack[-1][1], '__name__', stack[-1][1])})" if stack else "the module"
    return str(path)


def _export(module: nn.Module, example: Sequence[torch.Tensor]) -> Any:
    tokens = torch.export.Dim("T", min=2, max=1 << 20)
    fixed = tuple({1: tokens} for _ in example)
    config: Any = getattr(module, "config", None)
    kept = getattr(config, "use_cache", None)
    if kept is not None:
        config.use_cache = False
    try:
        with torch.no_grad():
            try:
                return torch.export.export(module, tuple(example), dynamic_shapes=fixed, strict=False)
            except Exception as error:
                if "satisfy the generated guard" not in str(error):
                    raise
                # A condition on the number of tokens that torch cannot prove, often one that always holds.
                loose = tuple({1: torch.export.Dim.AUTO} for _ in example)
                program = torch.export.export(module, tuple(example), dynamic_shapes=loose, strict=False)
                if all(isinstance(d, int) for n in program.graph.nodes if n.op == "placeholder" for d in shape(n)):
                    raise
                return program
    except InputError:
        raise
    except Exception as error:
        text = str(error).strip()
        if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__:
            why = text.partition("\n")[0]
            culprit = _culprit(error, module)
            experts = re.search(r"experts|moe(block|layer)?\)", culprit, re.IGNORECASE)
            advice = ROTARY if "rotary" in culprit.lower() else EXPERTS if experts else OTHERWISE
            raise DataDependent(module=culprit, why=printable(why), advice=advice) from None
        guard = re.search(r"satisfy the generated guard (.*)", text)
        if guard is not None:
            lengths = guard[1].replace("L['input_ids'].size()[1]", "T").rstrip(".")
            why = (
                f"its graph is for numbers of tokens T with {lengths} only; write it without sizes that depend so on T"
            )
            raise NotExportable(why=printable(why)) from None
        raise NotExportable(why=printable(text.partition("\n")[0])) from None
    finally:
        if kept is not None:
            config.use_cache = kept


def _culprit(error: BaseException, module: nn.Module) -> str:
    """The innermost module whose forward was running."""
    found, names = type(module).__name__, {id(m): n for n, m in module.named_modules()}
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names and type(owner).__module__.partition(".")[0] != "torch":
            found = f"{names[id(owner)] or type(owner).__name__} ({type(owner).__name__})"
        trace = trace.tb_next
    return found
