"""A DeepSeek-V3 of four layers on a GPU: its program's launches predicted, or measured one by one and as graphs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from gpu_predict import predicted_us

import moec
from moec.codegen.storage import stored_arrays
from moec.codegen.triton.aot import Compiled
from moec.codegen.triton.program import PAGE, Program, compiled_program, lower_module
from moec.codegen.triton.spec import Instance
from moec.ir import Module
from moec.ir.expr import evaluate
from moec.runtime.artifact import Artifact, read_manifest
from moec.runtime.cuda.engine import GpuEngine
from moec.runtime.cuda.executor import Executor
from moec.runtime.cuda.program import parse_gpu_plan, symbols
from moec.targets import Target

LAYERS = {"num_hidden_layers": "4", "first_k_dense_replace": "1"}
BATCHES = (1, 32, 128)
CONTEXT = 4096
REPEATS = 20
SMALL = {**LAYERS, "num_hidden_layers": "2", "hidden_size": "1024", "intermediate_size": "2048", "vocab_size": "4096",
         "moe_intermediate_size": "512", "n_routed_experts": "16", "n_group": "4", "topk_group": "2",
         "num_attention_heads": "16", "num_experts_per_tok": "4"}  # fmt: skip
"""The same geometry of heads and blocks at sizes for which a reference on the host takes seconds."""


@dataclass(frozen=True)
class Launch:
    """A launch of a program: its step, how often it runs, for which layer first, and the fill before it, if any."""

    step: Mapping[str, Any]
    times: int
    layer: int
    fill: Mapping[str, Any] | None


def launches(steps: Sequence[Any], times: int = 1, layer: int = 0) -> Iterator[Launch]:
    """Every launch of a program, in order."""
    fill = None
    for step in steps:
        if "repeat" in step:
            first, last = step["repeat"]
            yield from launches(step["steps"], times * (last - first + 1), first)
        elif "kernel" in step:
            yield Launch(step, times, layer, fill)
        fill = step if "fill" in step else None


def planned(target: Target | str, settings: Mapping[str, str] = LAYERS) -> Any:
    """Both phases at the largest batch and chunk."""
    return moec.trace("deepseek-v3", dict(settings)).optimize(target, batch=BATCHES[-1], context=CONTEXT, chunk=CONTEXT)


def program_for(target: Target, settings: Mapping[str, str] = LAYERS) -> tuple[Module, Program]:
    """The program, with the tiles that the cost model takes."""
    plan = planned(target, settings)
    return plan.ir, lower_module(plan.ir, target, vars(plan.context.limits), tiles={})


def compiled_for(target: Target) -> tuple[Module, Program, list[Compiled]]:
    """The program and its kernels, with the tiles that users get."""
    plan = planned(target)
    return plan.ir, *compiled_program(plan.ir, target, vars(plan.context.limits))


def sized(program: Program, name: str) -> Instance:
    """A kernel at the sizes of its first launch, for its declared cost."""
    for phase, lowered in program.phases.items():
        tokens, sequences = (BATCHES[-1], BATCHES[-1]) if phase == "decode" else (CONTEXT, 1)
        for launch in launches(lowered.steps):
            if launch.step["kernel"] == name:
                return at(program.table.entries[name].instance, launch.step, tokens, sequences)
    # The next token is drawn by the engine, after the program's last launch.
    return program.table.entries[name].instance


def at(instance: Instance, step: Mapping[str, Any], tokens: int, sequences: int) -> Instance:
    """The kernel with the sizes that a launch has for so many tokens of so many sequences, for its declared cost."""
    heads = instance.dims.get("HEADS", 1)
    sizes = {
        "T": tokens, "R": min(tokens, 128), "B": sequences, "S": sequences * CONTEXT, "C": CONTEXT,
        "CONTEXT": CONTEXT, "QUERIES": 1,
        "N": CONTEXT // PAGE,
    }  # fmt: skip
    # One binary serves products of many sizes: they are arguments of the launch.
    sizes |= {n: v for n, v in step["arguments"].items() if n in ("N", "K") and isinstance(v, int)}
    if instance.spec.name == "mla_decode_combine":
        sizes |= {"ROWS": 128, "SPLITS": 2}
    if instance.spec.source:
        kernel = instance.spec.build.keywords["kernel"]  # type: ignore[attr-defined]
        sizes["ROWS"] = evaluate(kernel.rows, sizes)
    return replace(instance, dims={**instance.dims, **sizes, "HEADS": heads})


def predicted_step(target: Target, batch: int) -> tuple[float, int]:
    """Microseconds and launches of a decode step, each at the data sheet's bound plus one launch in a graph."""
    _, program = program_for(target)
    total, count = 0.0, 0
    for launch in launches(program.phases["decode"].steps):
        entry = program.table.entries[launch.step["kernel"]]
        total += launch.times * predicted_us(at(entry.instance, launch.step, batch, batch), target)
        count += launch.times
    return total, count


def device_weights(module: Module) -> tuple[dict[str, int], list[Any]]:
    """Random weights made on the device: addresses by name, and the tensors that must stay alive.

    Packing 38 GB on the host would take longer than everything else. Products keep the scale of their input: elements
    are normal, scales (or the elements themselves, where there are none) 1 / sqrt(K); vectors are ones.
    """
    import torch

    addresses, kept = {}, []
    for weight in module.weights.values():
        inner = int(weight.type.shape[-1])  # type: ignore[union-attr, arg-type]
        for array in stored_arrays(weight):
            tensor = torch.empty(array.nbytes, dtype=torch.uint8, device="cuda")
            kind = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.float8_e4m3fn}[array.safetensors_dtype]
            values = tensor.view(kind)
            if array.name.endswith(".scale"):
                # A byte is the biased exponent of a power of two.
                tensor.fill_(127 - (inner.bit_length() - 1) // 2) if kind.itemsize == 1 else values.fill_(inner**-0.5)
            elif len(weight.type.shape) == 1:  # type: ignore[union-attr]
                values.fill_(1.0)
            else:
                for start in range(0, len(values), 1 << 27):
                    part = values[start : start + (1 << 27)]
                    part.copy_(torch.randn(part.shape, device="cuda") * (1.0 if kind.itemsize == 1 else inner**-0.5))
            addresses[array.name] = tensor.data_ptr()
            kept.append(tensor)
    torch.cuda.synchronize()
    return addresses, kept


def target_here() -> str:
    """The target whose kernels run on the GPU here."""
    import torch

    name = torch.cuda.get_device_name()
    known = [target for target in ("h200", "h20", "h800", "h100", "b200", "a100") if target.upper() in name]
    return known[0] if known else {8: "a100", 9: "h100"}.get(torch.cuda.get_device_capability()[0], "b200")


def engine_for(folder: Path, settings: Mapping[str, str] = LAYERS) -> tuple[Program, GpuEngine, list[Any]]:
    """The artifact of both phases, compiled into `folder`, on the GPU here with random weights."""
    plan = planned(target_here(), settings)
    program, _ = compiled_program(plan.ir, plan.context.target, vars(plan.context.limits))
    path = folder / "m.moec"
    plan.compile(path, no_weights=True)
    manifest = read_manifest(path)
    read = parse_gpu_plan((path / "plan.json").read_bytes(), str(path / "plan.json"), manifest)
    addresses, kept = device_weights(plan.ir)
    return program, GpuEngine(Artifact(path, manifest, read, path, 0), placed=addresses), kept


def event_timer(engine: GpuEngine, run: Callable[[int], None], fills: Sequence[tuple[int, int]]) -> Callable[[], float]:
    """Microseconds of `run(stream)` on the device; `fills`: addresses and bytes that become zero before."""
    driver, stream = engine.driver, engine.driver.stream()
    start, end = driver.event(timing=True), driver.event(timing=True)

    def once() -> float:
        for address, size in fills:
            driver.zero(address, size, stream)
        driver.record(start, stream)
        run(stream)
        driver.record(end, stream)
        driver.wait(stream)
        return driver.elapsed_us(start, end)

    return once


def measured_launches(
    engine: GpuEngine, program: Program, phase: str, tokens: int, flush: tuple[int, int]
) -> Iterator[tuple[str, Instance, int, Callable[[], float]]]:
    """(name, its instance at these sizes, runs a step, a call that gives the microseconds of one) of every launch.

    They work on what a step left. In decode `tokens` sequences have a token each; a prefill has so many tokens of one
    sequence. A kernel that is launched several times has its number behind its name.
    """
    sequences = tokens if phase == "decode" else 1
    sizes = symbols(engine.pool.table_width, tokens, min(tokens, 128), sequences, CONTEXT)
    executor, seen = engine.executor(phase), dict[str, int]()
    for launch in launches(engine.plan.entries[phase].steps):
        name = launch.step["kernel"]
        seen[name] = seen.get(name, 0) + 1
        instance = at(program.table.entries[name].instance, launch.step, tokens, sequences)
        timed = partial(launch_us, engine, executor, launch, sizes, flush)
        yield name if seen[name] == 1 else f"{name} #{seen[name]}", instance, launch.times, timed


def launch_us(
    engine: GpuEngine, executor: Executor, launch: Launch, sizes: Mapping[str, int], flush: tuple[int, int]
) -> float:
    """Median microseconds of one launch."""
    fills = [flush]
    if launch.fill is not None:
        # Counters start at zero in every run.
        size = evaluate(str(launch.fill["bytes"]), sizes)
        fills.append((engine.memory.address(launch.fill["fill"], launch.layer), size))
    once = event_timer(engine, executor.launch(launch.step, sizes, launch.layer), fills)
    once()
    return median(once() for _ in range(REPEATS))


def experts_timer(
    engine: GpuEngine, program: Program, phase: str, tokens: int, flush: tuple[int, int]
) -> Callable[[], float]:
    """Microseconds of one layer's launches from the gate to the sum of its experts, as a graph of their own."""
    sequences = tokens if phase == "decode" else 1
    sizes = symbols(engine.pool.table_width, tokens, min(tokens, 128), sequences, CONTEXT)
    layer = next(s for s in engine.plan.entries[phase].steps if str(s.get("function", "")).startswith("moe_layers"))
    first, steps, kernels = layer["repeat"][0], [], engine.executor(phase).kernels
    for step in layer["steps"]:
        ops = program.table.entries[step["kernel"]].ops if "kernel" in step else set()
        if "fill" in step or any(op.startswith("moe.") for op in ops):
            steps.append({n: v for n, v in step.items() if n != "stream"})
    entry = replace(engine.plan.entries[phase], steps=({"repeat": [first, first], "steps": steps},))
    executor = Executor(engine.driver, kernels, engine.memory, entry)
    executor.replay(sizes, lambda: None, lambda: None)
    driver = engine.driver
    start, end = driver.event(timing=True), driver.event(timing=True)

    def once() -> float:
        driver.zero(*flush, executor.main)
        driver.record(start, executor.main)
        executor.again()
        driver.record(end, executor.main)
        driver.wait(executor.main)
        return driver.elapsed_us(start, end)

    return once


def fill_sequences(engine: GpuEngine, batch: int) -> list[Any]:
    """Sequences as if each had half of the context: what the cache holds does not change the time."""
    sequences = [engine.pool.open() for _ in range(batch)]
    for sequence in sequences:
        engine.pool.extend(sequence, CONTEXT // 2)
        sequence.length = CONTEXT // 2
    return sequences


def run_once(engine: GpuEngine, phase: str, tokens: int) -> None:
    """A step of so many sequences, or a prompt of so many tokens."""
    if phase == "prefill":
        sequence = engine.pool.open()
        engine.prefill(sequence, np.arange(tokens) % engine.manifest.vocab)
        engine.pool.close(sequence)
        return
    sequences = fill_sequences(engine, tokens)
    engine.decode(sequences, np.random.default_rng(tokens).integers(0, engine.manifest.vocab, tokens))
    for sequence in sequences:
        engine.pool.close(sequence)


def measured_step(engine: GpuEngine, batch: int) -> tuple[float, float]:
    """Microseconds of a decode step by the host's clock, and of its graph alone by the device's."""
    sequences = fill_sequences(engine, batch)
    tokens = np.random.default_rng(batch).integers(0, engine.manifest.vocab, batch)
    for _ in range(3):
        engine.decode(sequences, tokens)
    host, device = [], []
    replay = engine.timed_replay("decode")
    for _ in range(REPEATS):
        began = time.perf_counter()
        engine.decode(sequences, tokens)
        host.append(1e6 * (time.perf_counter() - began))
        device.append(replay())
    for sequence in sequences:
        engine.pool.close(sequence)
    return median(host), median(device)


def logits_error(folder: Path) -> float:
    """The worst logit of a small model on the GPU here against the IR's evaluator, in standard deviations.

    Every token goes to every expert, so that the rounding of two computations cannot choose different ones.
    """
    import torch

    from moec.frontend.checkpoint import RandomWeights
    from moec.ir import CacheType
    from moec.ir.evaluate import Evaluator, WeightPrograms
    from moec.runtime.artifact import open_artifact
    from moec.runtime.model import Model

    settings = {**SMALL, "n_group": "1", "topk_group": "1", "num_experts_per_tok": "16"}
    plan = moec.trace("deepseek-v3", settings).optimize(target_here(), batch=2, context=128, chunk=64, recipe="bf16")
    plan.compile(folder / "small.moec", random_weights=0)
    artifact = open_artifact(folder / "small.moec")
    model = Model(artifact, engine=GpuEngine(artifact))
    ids = np.random.default_rng(0).integers(0, model.vocab, (1, 40))
    got = model.logits(ids, chunk=20)[0]
    evaluator = Evaluator(plan.ir, WeightPrograms(plan.ir, RandomWeights(0).load), torch.float32, True)
    function, count = plan.ir.functions["prefill"], ids.shape[1]
    positions = torch.arange(count, dtype=torch.int32)
    given = {
        "ids": torch.tensor(ids[0], dtype=torch.int32), "seq": positions * 0, "pos": positions, "rows": positions,
        "pages": torch.zeros(1, 1, dtype=torch.int32), "starts": torch.tensor([0, count], dtype=torch.int32),
    }  # fmt: skip
    arguments = [
        evaluator.new_cache(a.type, {"P": 1}) if isinstance(a.type, CacheType) else given[a.name] for a in function.args
    ]
    want = evaluator.call(function, arguments)[0].numpy()
    return float(np.abs(got - want).max() / want.std())


def with_folder(work: Callable[[Path], Any]) -> Any:
    """`work` on a temporary folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        return work(Path(folder))
