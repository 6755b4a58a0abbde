"""The parser answers any text with a module or a ParseError: no other exception, no hang, no memory blow-up.

MOEC_FUZZ sets the number of inputs.
"""

from __future__ import annotations

import os
import random
import time
import tracemalloc

import pytest
from parser_texts import GOOD

import moec
from moec.ir import ParseError, parse_module, print_module

COUNT = int(os.environ.get("MOEC_FUZZ", "3000"))
TOKENS = [
    "%0", "%x", "@w", "@w[%l]", "{", "}", "[", "]", "(", ")", ",", ":", "=", "->", "..", "-", "*", "//", "loc(a:1)",
    '"', "T*T", "ceildiv(T, 128)", "min(T, 8)", "9" * 40, "0", "-1", "0.0", "1e999", "nan", "inf", "true", "f32[T]",
    "f32[]", "fp8_e4m3[T, 128] scale(f32, 1x128)", "shard(dp, -)", "layout(lane16)", "func", "weight", "return",
    "module", "\x00", "kv.latent[1, P, 64, 576] of(bf16)", "linear", "add", "repeat", "split", "moe.route", "index",
    "\u2028", "é", "\n",
]  # fmt: skip


def random_bytes(rng: random.Random) -> str:
    return rng.randbytes(rng.randrange(200)).decode("latin-1")


def token_soup(rng: random.Random) -> str:
    head = "module @m {version = 1} {\n" if rng.random() < 0.7 else ""
    return head + " ".join(rng.choice(TOKENS) for _ in range(rng.randrange(60)))


def mutated(rng: random.Random, text: str) -> str:
    for _ in range(rng.randrange(1, 4)):
        at, to = rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:at] + rng.choice(TOKENS) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randrange(1, 8) :]
        elif kind == 2:
            text = text[: min(at, to)] + text[max(at, to) :] if abs(at - to) < 200 else text
        elif kind == 3:
            lines = text.split("\n")
            lines.insert(rng.randrange(len(lines)), rng.choice(lines))
            text = "\n".join(lines)
        else:
            words = text.split(" ")
            words[rng.randrange(len(words))] = rng.choice([*TOKENS, rng.choice(words)])
            text = " ".join(words)
    return text


@pytest.fixture(scope="module")
def dump() -> str:
    """One layer function of a real model with its weights."""
    text = print_module(moec.trace("tiny-deepseek-v3").optimize("cpu", context=64, chunk=16).ir)
    end = text.index("  func @moe_layers.prefill")
    return text[:end] + "}\n"


def test_any_text_gives_a_module_or_a_parse_error(dump: str) -> None:
    """Random bytes, random tokens, and mutated modules; what parses prints and parses back."""
    rng = random.Random(int(os.environ.get("MOEC_FUZZ_SEED", "0")))
    parsed = 0
    for i in range(COUNT):
        match rng.randrange(6):
            case 0:
                text = random_bytes(rng)
            case 1:
                text = token_soup(rng)
            case _:
                text = mutated(rng, dump if i % 50 == 0 else GOOD)
        try:
            module = parse_module(text)
        except ParseError:
            continue
        parsed += 1
        printed = print_module(module)
        assert print_module(parse_module(printed)) == printed
    assert parsed > COUNT // 100


def wrap(dims: str = "T", args: str = "", attrs: str = "") -> str:
    return f"module @m {{version = 1{attrs}}} {{\n  func @f(%x: f32[{dims}]{args}) {{\n    return\n  }}\n}}\n"


EXTREME = {
    "deep brackets": wrap(attrs=", a = " + "[" * 100_000),
    "deep parentheses": wrap("(" * 390),
    "deep minus": wrap("-" * 390 + "1"),
    "huge power": wrap("*".join(["T"] * 200)),
    "product of sums": wrap("*".join(["(A+B+C+D+E+F+G)"] * 24)),
    "powers of a sum": wrap("*".join(["(T+S+1)"] * 50)),
    "nested minima": wrap("min(" * 20 + "T" + "".join(f", S{i}*A{i})" for i in range(20))),
    "minima of maxima": wrap("max(" + "+".join(f"min(A{i}, B{i})" for i in range(16)) + ", 1)"),
    "products of minima": wrap("*".join(f"min(A{i}, B{i})" for i in range(16))),
    "nested divisions": wrap("ceildiv(" * 20 + "T" + "".join(f", S{i} + 1)" for i in range(20))),
    "digits": wrap("9" * 100_000),
    "integer attribute": wrap(attrs=", a = " + "9" * 100_000),
    "float attribute": wrap(attrs=", a = " + "9" * 100_000 + ".5e" + "9" * 100_000),
    "long list": wrap(attrs=", a = [" + "1, " * 20_000 + "1]"),
    "many attributes": wrap(attrs="".join(f", a{i} = 1" for i in range(5_000))),
    "many arguments": wrap(args="".join(f", %a{i}: index" for i in range(5_000))),
    "many dims": wrap(", ".join(["T"] * 5_000)),
    "one long string": wrap(attrs=', a = "' + "\\\\" * 100_000 + '"'),
    "one open string": wrap(attrs=', a = "' + "\\\\" * 100_000),
    "spaces": wrap(attrs=" " * 300_000 + "=" + "//" * 100_000),
    "locations": GOOD.replace("loc(model.py:3)", "loc(" + "a:1" * 20_000),
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_texts(name: str) -> None:
    """Each is answered with little memory; time is bounded by the size of the text (the bound is generous)."""
    tracemalloc.start()
    start = time.process_time()
    try:
        parse_module(EXTREME[name])
    except ParseError as error:
        assert len(str(error)) < 2000
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 20, "hangs"
    assert peak < 64 << 20
