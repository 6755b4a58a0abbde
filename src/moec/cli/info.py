"""`moec info`: what an artifact is, how large, and whether it runs here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moec.runtime.manifest import Manifest

_EXAMPLES = """\
moec info tiny.moec
"""
_PARTS = ("weights", "kernels", "tokenizer")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("info", epilog=_EXAMPLES)(info)


def info(
    artifact: Annotated[str, typer.Argument(help="Folder that `moec compile` wrote, a plan only included.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what an artifact is: model, formats, limits, sizes, and whether it runs here.

    Nothing is loaded; the hashes of all files but the weights are compared, of these the header is read.
    """
    from moec.runtime.artifact import read_manifest

    manifest = read_manifest(artifact)
    fields = _fields(artifact, manifest, _refusal(artifact, manifest.kind))
    print(json.dumps(fields) if as_json else "\n".join(f"{name:13} {text}" for name, text in _rows(fields)))


def _refusal(artifact: str, kind: str) -> str | None:
    """Why the artifact does not run here; None where it does."""
    from moec.errors import MoecError
    from moec.runtime.artifact import open_artifact
    from moec.runtime.weights import Weights

    try:
        opened = open_artifact(artifact)
        Weights(opened.weights)
        if kind == "cuda":
            from moec.runtime.cuda.driver import Driver
            from moec.runtime.cuda.kernel import load_kernels

            load_kernels(opened.path / "kernels", Driver())
    except MoecError as error:
        return str(error)
    return None


def _fields(artifact: str, manifest: Manifest, refusal: str | None) -> dict[str, Any]:
    from pathlib import Path

    sizes = dict.fromkeys((*_PARTS, "other"), 0)
    for name in manifest.files:
        file = Path(artifact) / name
        part = name.partition("/")[0]
        sizes[part if part in _PARTS else "other"] += file.stat().st_size if file.is_file() else 0
    ranks = sum(name.startswith("weights/") and name.endswith(".safetensors") for name in manifest.files)
    return {
        "artifact": artifact,
        "model": manifest.model,
        "model_type": manifest.config.get("model_type"),
        "recipe": manifest.recipe,
        "target": manifest.target,
        "kind": manifest.kind,
        "arch": manifest.arch or manifest.mcpu,
        "features": list(manifest.features),
        "vocab": manifest.vocab,
        **manifest.limits,
        "ranks": ranks,
        "tokenizer": "tokenizer/tokenizer.json" in manifest.files,
        "chat_template": _has_template(artifact, manifest),
        "bytes": sizes,
        "moec_version": manifest.moec_version,
        "runs_here": refusal is None,
        "why_not": refusal,
    }


def _has_template(artifact: str, manifest: Manifest) -> bool:
    from pathlib import Path

    if "tokenizer/chat_template.jinja" in manifest.files:
        return True
    try:
        config = json.loads((Path(artifact) / "tokenizer/tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _rows(f: dict[str, Any]) -> list[tuple[str, str]]:
    limits = f"batch {f['batch']}, context {f['context']} tokens, prefill chunks of {f['chunk']}"
    if "drafts" in f:
        limits += f", up to {f['drafts']} drafted tokens a step"
    ranks = "no weights" if not f["ranks"] else f"{f['ranks']} rank{'s' if f['ranks'] > 1 else ''}"
    text = "a tokenizer" if f["tokenizer"] else "no tokenizer: token ids only"
    if f["tokenizer"]:
        text += ", a chat template" if f["chat_template"] else ", no chat template"
    sizes = ", ".join(f"{part} {size / 1e6:,.1f} MB" for part, size in f["bytes"].items() if size)
    return [
        ("model", f"{f['model']} ({f['model_type'] or 'declared'}), vocabulary {f['vocab']:,}"),
        ("formats", f"recipe {f['recipe']}"),
        ("target", f"{f['target']} ({f['kind']}, {f['arch']}), {ranks}"),
        ("limits", limits),
        ("text", text),
        ("size", sizes),
        ("made by", f"moec {f['moec_version']}"),
        ("runs here", "yes" if f["runs_here"] else f"no: {f['why_not']}"),
    ]
