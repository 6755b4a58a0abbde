"""Nothing that moec reads can run: no pickle is loaded, no text is evaluated."""

from __future__ import annotations

import ast

from imports import ROOT, read_imports, sources

PICKLES = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")


def runs_data(text: str) -> list[int]:
    """Lines of `eval`, `exec`, `compile`, `torch.load`, and of `np.load` that may unpickle."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        safe = any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords)
        if name in ("eval", "exec", "compile", "torch.load") or (name in ("np.load", "numpy.load") and not safe):
            found.append(node.lineno)
    return found


def test_calls_that_run_data_are_found() -> None:
    text = "eval(x)\nmodel.eval()\nnp.load(f)\nnp.load(f, allow_pickle=False)\ntorch.load(f)\nre.compile(p)\nexec(t)"
    assert runs_data(text) == [1, 3, 5, 7]


def test_no_data_is_run() -> None:
    found = {path: runs_data(path.read_text(encoding="utf-8")) for path in sources(ROOT)}
    assert {str(path): lines for path, lines in found.items() if lines} == {}


def test_no_pickles() -> None:
    users = {name for name, found in read_imports().items() if {o.partition(".")[0] for o in found.all} & set(PICKLES)}
    assert not users
