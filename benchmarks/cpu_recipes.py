"""What every precision recipe costs in perplexity and brings in speed, on this CPU, in one table.

Run: python benchmarks/cpu_recipes.py [--recipes fp32,weight-only] [--model bench-4b] [--small] [--json OUT]
     [--layers 3] [--artifact RECIPE=FOLDER] [--work DIR]

Perplexity is that of tiny-deepseek-v3 on its held-out text (windows of 512 tokens, stride 256). Speed is that of
`--model` with random weights at the same recipe. With --json the rows of an earlier run of that file are kept, and the
table shows them too, so that recipes can be measured one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

from peers import geometry, registry

import moec
from moec.errors import InputError, MoecError, near
from moec.passes.recipe import FOLDER as RECIPES

ROOT = Path(__file__).resolve().parents[1]
TINY, WINDOW = "tiny-deepseek-v3", 512
HELD_OUT = ROOT / "model_defs" / "presets_data" / TINY / "heldout.txt"
NAMES = ("fp32", "bf16", "weight-only", "deepseek-v3", "per-tensor", "per-channel", "mxfp4-experts")


class UnknownRecipe(InputError):
    """A name that `--recipes` does not have."""

    template: ClassVar[str] = "no recipe {name!r}{hint}"


class CommandFailed(MoecError):
    """A `moec` command that gave no result."""

    template: ClassVar[str] = "{command}: {why}"


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(NAMES), help="names, with commas between them")
    parser.add_argument("--model", default="bench-4b", help="preset, or folder with a config.json, that is timed")
    parser.add_argument("--small", action="store_true", help="the model's variant with tiny sizes")
    parser.add_argument("--layers", type=int, help="the model with so many layers, where FP32 weights would not fit")
    parser.add_argument("--artifact", action="append", default=[], metavar="RECIPE=FOLDER", help="a compiled artifact")
    parser.add_argument("--work", type=Path, default=Path("out/cpu-recipes"), help="folder for artifacts")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to a file, beside those it has")
    return parser.parse_args()


def command(*arguments: str) -> dict[str, Any]:
    """The JSON object that a `moec` command prints; raises CommandFailed."""
    done = subprocess.run([sys.executable, "-m", "moec", *arguments, "--json"], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CommandFailed(command=f"moec {arguments[0]}", why=why)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def tiny(work: Path, recipe: str) -> Path:
    """The trained model's artifact at a recipe."""
    path = work / f"{TINY}-{recipe}-{registry.sources()}.moec"
    if not path.exists():
        moec.trace(TINY).optimize("cpu", recipe=recipe, context=WINDOW, chunk=WINDOW).compile(path)
    return path


def timed(recipe: str, o: argparse.Namespace) -> Path:
    """An artifact of the timed model with random weights at a recipe."""
    fields = dict(geometry.SMALL) if o.small else {}
    if o.layers is not None:
        fields["num_hidden_layers"] = str(o.layers)
    path = o.work / f"{Path(o.model).name}{'-small' if o.small else ''}-{o.layers}-{recipe}-{registry.sources()}.moec"
    if not path.exists():
        plan = moec.trace(o.model, fields or None).optimize("cpu", recipe=recipe, context=1024, chunk=1024)
        plan.compile(path, random_weights=0)
    return Path(path)


def measure(recipe: str, o: argparse.Namespace, given: dict[str, str]) -> dict[str, Any]:
    """One row."""
    quality = command("eval", str(tiny(o.work, recipe)), "--text", str(HELD_OUT), "--stride", str(WINDOW // 2))
    prompt, new = (16, 8) if o.small else (256, 48)
    artifact = given.get(recipe) or str(timed(recipe, o))
    speed = command("bench", artifact, "--prompt-tokens", str(prompt), "--new-tokens", str(new))
    kept = ("prefill_tokens_per_s", "decode_tokens_per_s", "step_weight_bytes", "weight_bytes", "load_s",
            "peak_memory_bytes", "read_bandwidth", "share_of_bound", "prompt_tokens")  # fmt: skip
    return {"recipe": recipe, "perplexity": quality["perplexity"], **{key: speed[key] for key in kept}}


def table(model: str, rows: list[dict[str, Any]]) -> str:
    """Lines of text, in the order of `NAMES`."""
    rows = sorted(rows, key=lambda row: (*NAMES, row["recipe"]).index(row["recipe"]))
    base = next((row["perplexity"] for row in rows if row["recipe"] == "fp32"), None)
    lines = [
        f"perplexity of {TINY}; speed of {model}",
        f"{'recipe':16} {'perplexity':>10} {'over fp32':>9} {'prefill tok/s':>13} {'decode tok/s':>12} {'of bound':>8} "
        f"{'MB a step':>9} {'weights MiB':>11}",
    ]
    for row in rows:
        over = "" if base is None else f"{row['perplexity'] / base - 1:+.2%}"
        share = "" if row["share_of_bound"] is None else f"{row['share_of_bound']:.0%}"
        step = "" if row["step_weight_bytes"] is None else f"{row['step_weight_bytes'] / 1e6:,.0f}"
        lines.append(
            f"{row['recipe']:16} {row['perplexity']:10.4f} {over:>9} {row['prefill_tokens_per_s']:13.1f} "
            f"{row['decode_tokens_per_s']:12.2f} {share:>8} {step:>9} {row['weight_bytes'] / 2**20:11,.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the recipes and print the table."""
    o = options()
    names = [name.strip() for name in o.recipes.split(",") if name.strip()]
    known = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "checkpoint")
    for name in names:
        if name not in known:
            raise UnknownRecipe(name=name, hint=near(name, known))
    given = registry.artifacts(o.artifact, known)
    o.work.mkdir(parents=True, exist_ok=True)
    model = o.model + (" (small)" if o.small else "") + (f" with {o.layers} layers" if o.layers is not None else "")
    rows = {}
    if o.json and o.json.exists():
        earlier = json.loads(o.json.read_text())
        rows = {row["recipe"]: row for row in earlier["rows"]} if earlier["model"] == model else {}
    for name in names:
        print(f"{name}: compile, evaluate, time", file=sys.stderr, flush=True)
        rows[name] = measure(name, o, given)
        if o.json:
            part = o.json.with_name(o.json.name + ".part")
            part.write_text(json.dumps({"model": model, "rows": list(rows.values())}, indent=1))
            os.replace(part, o.json)
    print(table(model, list(rows.values())))


if __name__ == "__main__":
    try:
        main()
    except MoecError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
