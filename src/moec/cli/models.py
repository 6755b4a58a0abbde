"""`moec models list|show`: presets and what their weights and cache weigh."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

models = typer.Typer(no_args_is_help=True, help="Presets and their sizes.")


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(models, name="models")


@models.command("list")
def list_models(
    sizes: Annotated[
        bool, typer.Option("--sizes", help="Trace each: parameters, active ones, cache of a token.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """List the presets."""
    from moec.model_defs.registry import preset_config, preset_folder, preset_names

    rows: list[dict[str, Any]] = [
        {"name": n, "family": preset_config(n)["model_type"], "weights": preset_folder(n) is not None}
        for n in preset_names()
    ]
    if sizes:
        kept = ("layers", "parameters", "active_parameters", "kv_bytes_per_token")
        for row in rows:
            facts = model_facts(row["name"])
            row.update({key: facts[key] for key in kept})
    if as_json:
        print(json.dumps({"models": rows}))
        return
    if sizes:
        print(f"{'':20} {'':15} {'layers':>6} {'total':>9} {'active':>9} {'KV of a token':>13}")
    for row in rows:
        line = f"{row['name']:20} {row['family']:15}"
        if sizes:
            total, active = (_count(row[key]) for key in ("parameters", "active_parameters"))
            line += f" {row['layers']:6} {total:>9} {active:>9} {row['kv_bytes_per_token'] / 1e3:10.1f} kB"
        print(f"{line} {'weights included' if row['weights'] else ''}".rstrip())


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:,.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:,.2f} M"


@models.command("show")
def show_model(
    model: Annotated[str, typer.Argument(help="Preset or Hugging Face folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show parameters, cache and per-layer shapes of a model."""
    facts = model_facts(model)
    if as_json:
        print(json.dumps(facts))
        return
    print(f"{facts['name']} ({facts['family']})")
    print(f"  parameters        {_count(facts['parameters'])} total, {_count(facts['active_parameters'])} active")
    if stated := facts["published"]:
        total, active = stated.get("beside", (0, 0))
        more = f", {stated['why']} {active or total:+g} B" if "beside" in stated else ""
        print(f"  published         {stated['total']} B total, {stated['active']} B active{more} ({stated['source']})")
    print(f"  KV cache          {facts['kv_bytes_per_token']} bytes a token in BF16")
    print(f"  layers            {facts['layers']}")
    wide = max(map(len, facts["weights"]))
    for name, shape in facts["weights"].items():
        print(f"  {name:{wide}} {shape}")


@models.command("closed-forms")
def closed_forms(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Print what follows from the models alone.

    Sizes, bounds and traffic, beside the numbers that papers print.
    """
    from dataclasses import asdict

    from moec.passes.planning.published import MODELS, rows
    from moec.stages import trace

    found = rows({name: trace(name).ir for name in MODELS})
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in found]}))
        return
    wide = max(len(row.name) for row in found)
    print(f"{'':{wide}} {'here':>12} {'published':>12}")
    for row in found:
        published = "" if row.published is None else f"{row.published:,.6g}"
        note = f"  ({row.note})" if row.note else ""
        print(f"{row.name:{wide}} {row.value:12,.6g} {published:>12} {row.unit:14} {row.source}{note}".rstrip())


def model_facts(model: str) -> dict[str, Any]:
    """Sizes of a model from its traced IR: nothing is loaded."""
    from moec.ir import CacheType, TensorType
    from moec.ir.stats import active_parameters, parameters
    from moec.model_defs.registry import published
    from moec.stages import trace

    traced = trace(model)
    kv = next(a.type for a in traced.ir.functions["decode"].args if isinstance(a.type, CacheType))
    return {
        "name": traced.source.name,
        "family": traced.source.family.name,
        "layers": int(kv.shape[0]),  # type: ignore[arg-type]
        "parameters": parameters(traced.ir),
        "active_parameters": active_parameters(traced.ir),
        "published": published(model),
        "kv_bytes_per_token": int(kv.shape[0]) * int(kv.shape[3]) * 2,  # type: ignore[arg-type]
        "weights": {
            w.name + (f"[{', '.join(f'{n}: {a}..{b}' for n, a, b in w.indices)}]" if w.indices else ""): str(w.type)
            for w in traced.ir.weights.values()
            if isinstance(w.type, TensorType)
        },
    }
