"""The demo of `make demo`: compile the embedded model for this CPU, look at its IR, generate text.

Usage: python examples/demo.py FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import moec
from moec.runtime import Sampling

PROMPT = "import os\n\nclass "
SEED = 1


def main(folder: Path) -> None:
    """Write the artifact and the dumps below `folder` and print what a reader wants to see first."""
    start = time.perf_counter()
    plan = moec.trace("tiny-deepseek-v3").optimize("cpu", batch=1, context=512, dump=folder / "ir")
    print("passes:")
    for record in plan.records:
        print(f"  {record.name:15} {'; '.join(record.notes)[:110] or 'nothing to do'}")
    before = sorted((folder / "ir").glob("*_bind-limits.ir"))[-1]
    after = sorted((folder / "ir").glob("*_mla-absorb.ir"))[-1]
    for title, file in (("before mla-absorb", before), ("after mla-absorb", after)):
        print(f"\nattention of the decode step {title} ({file}):")
        print("\n".join(attention_lines(file.read_text())))
    artifact = plan.compile(folder / "tiny.moec", note=lambda line: print(f"\n{line}", end=""))
    print(f"\ncompiled {artifact.path} in {time.perf_counter() - start:.1f} s\n")
    model = moec.load(artifact.path)
    tokens = model.tokenizer.encode(PROMPT)
    (new,) = model.complete([tokens], 120, Sampling(temperature=0.6, top_p=0.9, seed=SEED)).tokens
    print(f"generated from {PROMPT!r}:\n{'-' * 72}\n{PROMPT}{model.tokenizer.decode(new)}\n{'-' * 72}")
    print(f"dumps of every pass: {folder / 'ir' / 'index.md'}; try: moec run {artifact.path} --prompt 'import os'")


def attention_lines(text: str) -> list[str]:
    """The ops from the cache write to the output projection in the first decode layer function."""
    body = text[text.index("func @dense_layers.decode") :].splitlines()
    first = next(i for i, line in enumerate(body) if "cache.append" in line)
    last = next(i for i, line in enumerate(body) if "attn.o[" in line)
    return [line.split(" loc(")[0] for line in body[first : last + 1]]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo"))
