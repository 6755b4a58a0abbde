"""A kernel's problem in torch: its arguments, what they must become, the comparison, and the launch.

The same code checks a kernel in Triton's interpreter, on a GPU through the JIT, and on a GPU from a packed binary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moec.codegen.triton.spec import Case, Instance, KernelSpec

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

TORCH_NAMES = {
    "fp64": "float64",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8e4nv": "float8_e4m3fn",
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
}
# Bytes of outputs before a kernel runs: huge or NaN as any float type, negative or unlikely as an integer.
MARK_FLOAT = 0x7F
MARK_INTEGER = 0xF9


def element_type(kind: str) -> torch.dtype:
    """The torch type of the elements behind a Triton argument type."""
    import torch

    name = re.sub(r"^\*|^tensordesc<|\[.*$", "", kind)
    return getattr(torch, TORCH_NAMES[name])  # type: ignore[no-any-return]


@dataclass
class Problem:
    """The sizes of one problem, and the random numbers it is filled with."""

    instance: Instance
    generator: torch.Generator
    device: str

    def __getattr__(self, name: str) -> int:
        """A dim or constant by its name."""
        try:
            return self.instance.values[name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(name) from None

    def dtype(self, argument: str) -> torch.dtype:
        return element_type(self.instance.signature[argument])

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Float32 normal numbers on the CPU: the same for every device."""
        import torch

        return torch.randn(shape, generator=self.generator) * scale

    def uniform(self, *shape: int) -> Tensor:
        import torch

        return torch.rand(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int32 in [low, high)."""
        import torch

        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32)

    def shuffled(self, n: int) -> Tensor:
        import torch

        return torch.randperm(n, generator=self.generator)

    def put(self, argument: str, value: Tensor) -> Tensor:
        """`value` in the argument's element type, contiguous."""
        return value.to(self.dtype(argument)).contiguous()

    def output(self, argument: str, *shape: int) -> Tensor:
        """A tensor to be written, filled with the mark of what is not written."""
        import torch

        return filled(torch.empty(shape, dtype=self.dtype(argument)))


def filled(tensor: Tensor) -> Tensor:
    """`tensor`, every byte marked as not written."""
    import torch

    mark = MARK_FLOAT if tensor.dtype.is_floating_point else MARK_INTEGER
    return tensor.copy_(
        torch.full((*tensor.shape, tensor.element_size()), mark, dtype=torch.uint8).view(tensor.dtype)[..., 0]
    )


@dataclass(frozen=True)
class Expected:
    """What an argument must become: |got - value| <= relative * |value| + absolute * rms(value) + floor.

    `where` marks the elements that the kernel writes; all others must keep their mark. `read` turns the written
    arguments into the tensor to compare (dequantisation). `gpu_absolute` replaces `absolute` on a GPU, whose tensor
    cores add products with fewer bits than float32.
    """

    value: Tensor
    relative: float = 0.0
    absolute: float = 0.0
    gpu_absolute: float = 0.0
    floor: Tensor | float = 0.0
    where: Tensor | None = None
    read: Callable[[dict[str, Any]], Tensor] | None = None


def unwritten(tensor: Tensor, where: Tensor | None) -> bool:
    """Whether every element outside `where` still carries the mark."""
    import torch

    if where is None:
        return True
    rest = tensor[~where.expand(tensor.shape)]
    return bool((rest.view(torch.uint8) == filled(torch.empty_like(rest)).view(torch.uint8)).all())


def worst_error(name: str, expected: Expected, written: dict[str, Any], on_gpu: bool) -> float:
    """The largest error as a share of its bound: at most 1 is right; infinity for NaN or a stray write."""
    import torch

    raw = written[name]
    if not unwritten(raw, expected.where):
        return float("inf")
    got = (expected.read(written) if expected.read else raw).double()
    value = expected.value.double()
    if got.shape != value.shape:
        raise ValueError(f"{name}: shape {tuple(got.shape)}, the reference has {tuple(value.shape)}")
    floor = expected.floor
    if expected.where is not None:
        where = expected.where.expand(value.shape)
        got, value = got[where], value[where]
        floor = floor.expand(where.shape)[where] if isinstance(floor, torch.Tensor) else floor
    if value.numel() == 0:
        return 0.0
    absolute = max(expected.absolute, expected.gpu_absolute) if on_gpu else expected.absolute
    rms = value[value.isfinite()].square().mean().sqrt().nan_to_num()
    bound = expected.relative * value.abs() + absolute * rms + floor
    error = torch.where(got == value, 0.0, (got - value).abs())
    share = torch.where(error == 0, 0.0, error / bound)
    return float(torch.where(share.isnan(), torch.inf, share).max())


def make(spec: KernelSpec, case: Case, arch: str, shape: str = "", seed: int = 0, device: str = "cpu") -> Problem:
    """The problem of `case`, with the tile of `arch` and `shape`."""
    import torch

    instance = replace(spec.instance(arch, shape, **case.dims), types=case.types)
    return Problem(instance, torch.Generator().manual_seed(seed), device)


def move(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """The arguments on `device`; views of one storage (a packed cache) stay views of one storage."""
    import torch

    if device == "cpu":
        return arguments
    storages: dict[int, Any] = {}

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.cuda()
        on_device = torch.empty(0, dtype=value.dtype, device=device)
        home = storages[storage.data_ptr()]
        return on_device.set_(home, value.storage_offset(), value.size(), value.stride())

    return {name: moved(value) for name, value in arguments.items()}


def bind(instance: Instance, arguments: dict[str, Any]) -> dict[str, Any]:
    """The run-time arguments as Triton takes them: descriptors made where the signature asks for one."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    bound = {}
    for name, kind in instance.signature.items():
        value = arguments[name]
        if kind.startswith("tensordesc"):
            block = [int(n) for n in kind[kind.index("[") + 1 : kind.index("]")].split(",")]
            value = TensorDescriptor.from_tensor(value.view(-1, value.shape[-1]), block)
        bound[name] = value
    return bound


def matrices(instance: Instance, arguments: dict[str, Any]) -> dict[str, Any]:
    """The run-time arguments as our own loader takes them."""
    from moec.runtime.cuda.arguments import Matrix

    found = {}
    for name, kind in instance.signature.items():
        value = arguments[name]
        if kind.startswith("tensordesc"):
            value = value.view(-1, value.shape[-1])
            value = Matrix(value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        found[name] = value
    return found


def launch(instance: Instance, arguments: dict[str, Any]) -> None:
    """Runs the kernel through Triton: on a GPU, or in the interpreter when TRITON_INTERPRET=1."""
    options = {"num_warps": instance.tile.num_warps, "num_stages": instance.tile.num_stages}
    instance.spec.jit()[instance.grid()](**bind(instance, arguments), **instance.constants, **options)


def check(problem: Problem, run: Callable[[Instance, dict[str, Any]], None] = launch) -> dict[str, float]:
    """Runs the problem and gives, for every argument that it writes, the worst error as a share of its bound."""
    arguments = problem.instance.spec.build(problem)
    expected = problem.instance.spec.reference(problem, arguments)
    on_device = move(arguments, problem.device)
    run(problem.instance, on_device)
    written = move_back(on_device)
    on_gpu = problem.device != "cpu"
    return {name: worst_error(name, e, written, on_gpu) for name, e in expected.items()}


def move_back(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments on the CPU."""
    import torch

    return {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
