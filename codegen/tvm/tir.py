"""Small layer over TVM's TIR builder: kernels as private functions with raw pointers, called from one program
function.

A kernel is a private `PrimFunc` of pointers and scalars. The program (one exported function a phase) calls kernels
through their `GlobalVar`, so a whole decode step is one native call. Tested with apache-tvm 0.27.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import pipeline


@dataclass(frozen=True)
class Machine:
    """What a kernel builder needs to know of the CPU, taken from the target description."""

    lanes: int = 8  # 32-bit lanes of a vector register
    registers: int = 16  # vector registers
    cores: int = 2
    l1_bytes: int = 32 << 10
    l2_bytes: int = 512 << 10
    mcpu: str = "x86-64-v3"
    triple: str = ""
    features: tuple[str, ...] = ()
    """LLVM's names of instruction sets beyond those of `mcpu`."""

    @property
    def name(self) -> str:
        """Architecture, vector width and extensions, for people."""
        return " ".join([self.mcpu, f"{32 * self.lanes} bits", *self.features])

    @property
    def tiles(self) -> bool:
        """Whether products can use the matrix tiles of `amx`."""
        return {"amx-tile", "amx-bf16", "avx512fp16"} <= set(self.features)

    def tvm_target(self) -> Any:
        """The TVM target; string targets are refused by TVM 0.27."""
        config: dict[str, Any] = {"kind": "llvm", "mcpu": self.mcpu, "num-cores": self.cores}
        # TVM makes each buffer variable an alias class of its own. Where LLVM inlines one kernel into another, the
        # same memory then has two classes, and stores of the one move past loads of the other: such analysis has to
        # be off.
        config["cl-opt"] = ["-enable-tbaa:bool=0"]
        if self.features:
            config["mattr"] = [f"+{feature}" for feature in self.features]
        if self.triple:
            config["mtriple"] = self.triple
        return tvm.target.Target(config)


@dataclass
class Kernel:
    """A private TIR function and the handle by which the program calls it."""

    name: str
    gvar: Any
    func: Any = None
    helpers: list[Kernel] = field(default_factory=list)  # kernels that this one calls


def const(value: float | int, dtype: str = "int32") -> Any:
    """A TIR constant."""
    return tvm.tirx.const(value, dtype)


def intrinsic(name: str, *args: Any, returns: str = "void") -> Any:
    """A call of an LLVM intrinsic."""
    number = const(tvm.target.codegen.llvm_lookup_intrinsic_id(name), "uint32")
    return T.Call("tirx.call_llvm_intrin", [number, *args], ret_ty=returns)


def splat(value: float | int, lanes: int, dtype: str = "float32") -> Any:
    """A vector of `lanes` equal constants."""
    return T.broadcast(const(value, dtype), lanes)


def variables(count: int, dtype: str) -> list[Any]:
    """`count` mutable variables (one-element buffers), which LLVM keeps in registers where it can.

    TVM puts memory of the scope "global" on the stack as long as one allocation stays below 1 KiB, which 28 sums of
    512 bits together would not; "local" goes to its workspace pool, which private functions cannot reach.
    """
    return [T.alloc_buffer((1,), dtype, scope="global") for _ in range(count)]


def assign(variable: Any, value: Any) -> None:
    """Set one of `variables`."""
    T.buffer_store(variable, value, [0])


def call(kernel: Kernel, *args: Any) -> None:
    """Emit a call of `kernel`: pointers by `T.address_of`, scalars as expressions of the declared type."""
    T.evaluate(T.Call(kernel.gvar, list(args), ret_ty="int32"))


Param = tuple[str, str] | tuple[str, str, Sequence[int]]
"""(name, dtype) is a scalar; (name, dtype, shape) a pointer seen as a buffer of that shape."""


@contextmanager
def kernel_body(kernel: Kernel, params: Sequence[Param]) -> Iterator[list[Any]]:
    """Build `kernel.func`: yields one scalar variable or buffer per parameter, in order."""
    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_name(kernel.name)
        # No "tirx.noalias": kernels may work in place.
        T.func_ret(tvm.ir.PrimType("int32"))
        raw = []
        for p in params:
            raw.append(T.arg(p[0], T.handle(p[1], "global") if len(p) == 3 else getattr(T, p[1])()))
        # Sub-views of a row need not start on a vector boundary: promise element alignment only.
        yield [
            T.decl_buffer(tuple(p[2]), p[1], data=v, align=4) if len(p) == 3 else v
            for p, v in zip(params, raw, strict=True)
        ]
        T.Return(const(0))
    kernel.func = builder.get()


def parallel_kernel(
    name: str, params: Sequence[Param], worker: Kernel, machine: Machine, small: Callable[[list[Any]], Any]
) -> Kernel:
    """A kernel that runs `worker(*params, part, parts)` once per core, or once in all while `small(args)` holds.

    Waking the thread pool costs about 2 us: work below that is done by the caller's thread.
    """
    kernel = Kernel(name, tvm.ir.GlobalVar(name), helpers=[worker])
    with kernel_body(kernel, params) as args:
        values = [T.address_of(a[0]) if len(p) == 3 else a for p, a in zip(params, args, strict=True)]
        with T.If(small(args)):
            with T.Then():
                call(worker, *values, const(0), const(1))
            with T.Else(), T.parallel(0, machine.cores) as part:
                call(worker, *values, part, const(machine.cores))
    return kernel


def build_module(kernels: Sequence[Kernel], programs: dict[str, Any]) -> Any:
    """One IRModule of private kernels, the helpers they call, and exported program functions."""
    functions: dict[Any, Any] = {}
    pending = list(kernels)
    while pending:
        kernel = pending.pop()
        functions[kernel.gvar] = kernel.func
        pending.extend(h for h in kernel.helpers if h.gvar not in functions)
    functions.update({tvm.ir.GlobalVar(name): func for name, func in programs.items()})
    return tvm.IRModule(functions)


def compile_module(module: Any, machine: Machine) -> Any:
    """The compiled library of `build_module`'s result."""
    return tvm.compile(module, target=machine.tvm_target(), tir_pipeline=pipeline.NAME)
