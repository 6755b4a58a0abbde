"""Every kernel that is generated for a program, in the interpreter, against the IR's own evaluation in float64.

Operands hold a row of zeros, an outlier and numbers that round to subnormals; rows sorted by expert come spread, with
all tokens at one expert, and with none.
"""

from __future__ import annotations

from typing import Any

import pytest
from generated import bulk_names, generated_names, wide_names
from small_families import FAMILIES

PROGRAMS = [("h800", "deepseek-v3"), ("h800", "bf16"), ("b200", "deepseek-v3"), ("a100", "weight-only")]


def cases() -> list[Any]:
    found = []
    for number, (target, recipe) in enumerate(PROGRAMS):
        for name in generated_names(target, recipe):
            loads = (0, 1, 2) if name.startswith("moe_experts") else (0,)
            sizes = [(1, 0), *((5, load) for load in loads), *((70, 0) for _ in range(number == 0))]
            for tokens, load in sizes:
                slow = [pytest.mark.slow] if tokens > 5 or (number and tokens == 1) else []
                label = f"{target}-{recipe}-{name}-{tokens}-{load}"
                found.append(pytest.param(target, recipe, name, tokens, load, marks=slow, id=label))
    return found


@pytest.mark.parametrize(("target", "recipe", "name", "tokens", "load"), cases())
def test_generated_kernel(interpreter: Any, target: str, recipe: str, name: str, tokens: int, load: int) -> None:
    worst = interpreter("generated_error", target=target, recipe=recipe, name=name, tokens=tokens, load=load)
    assert worst, "nothing was compared"
    assert all(share <= 1.0 for share in worst.values()), worst


@pytest.mark.parametrize("name", bulk_names("h800", "deepseek-v3"))
def test_the_other_form_of_a_product(interpreter: Any, name: str) -> None:
    """Operands by pointers where the cost model takes tensor descriptors, and the other way round."""
    worst = interpreter("generated_error", target="h800", recipe="deepseek-v3", name=name, tokens=5, turned=True)
    assert worst and all(share <= 1.0 for share in worst.values()), worst


def test_float32_weights_beside_bf16_rows(interpreter: Any) -> None:
    """The shared expert's gate of a family in a recipe that keeps it in float32: its rows are widened."""
    call = {"target": "a100", "recipe": "weight-only", "model": "qwen1.5-moe-a2.7b"}
    mixed = [n for n in wide_names(**call) if n.endswith("decode")]
    assert mixed
    for name in mixed:
        worst = interpreter("generated_error", name=name, tokens=5, **call)
        assert worst and all(share <= 1.0 for share in worst.values()), (name, worst)


@pytest.mark.parametrize("load", [0, 1, 2])
@pytest.mark.parametrize(("fp8", "pair", "bulk"), [(True, True, True), (True, False, False), (False, True, False)])
def test_experts_in_the_masked_layout(interpreter: Any, fp8: bool, pair: bool, bulk: bool, load: int) -> None:
    """Ragged shares of one row, none and all that there is room for; one expert alone; no row."""
    worst = interpreter("masked_error", fp8=fp8, pair=pair, load=load, bulk=bulk)
    assert worst and all(share <= 1.0 for share in worst.values()), worst


@pytest.mark.parametrize(("target", "recipe"), [("h800", "deepseek-v3"), ("h800", "bf16"), ("a100", "weight-only")])
def test_products_per_head_from_a_shared_matrix(interpreter: Any, target: str, recipe: str) -> None:
    """Rows 0..128 of each head's 256, transposed, and rows 128..256 as they are; FP8 under 128x128 scales or BF16."""
    names = [n for n in generated_names(target, recipe, shared=True) if n.startswith("linear_heads")]
    assert len(names) == 2
    for name in names:
        worst = interpreter("generated_error", target=target, recipe=recipe, name=name, tokens=5, shared=True)
        assert worst and all(share <= 1.0 for share in worst.values()), (name, worst)


def family_cases() -> list[Any]:
    """Kernels that the families with heads add, in FP8; names of the programs are read when the tests run."""
    return [
        pytest.param(family, tokens, marks=[] if (family, tokens) == ("gpt-oss-20b", 5) else [pytest.mark.slow])
        for family in FAMILIES
        for tokens in (1, 5, 70)
    ]


@pytest.mark.parametrize(("family", "tokens"), family_cases())
def test_generated_kernels_of_a_family(interpreter: Any, family: str, tokens: int) -> None:
    wrong: dict[str, float] = {}
    for name in generated_names("h800", "deepseek-v3", model=family):
        worst = interpreter(
            "generated_error", target="h800", recipe="deepseek-v3", name=name, tokens=tokens, model=family
        )
        assert worst, f"nothing of {name} was compared"
        wrong |= {f"{name}: {argument}": share for argument, share in worst.items() if share > 1.0}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear.decode", "norm_add_rms_quant_cast", "moe_combine_add", "moe_experts.prefill"])
def test_many_tokens(interpreter: Any, name: str) -> None:
    worst = interpreter(
        "generated_error",
        target="h800",
        recipe="deepseek-v3",
        name=name,
        tokens=4097 if "linear" in name else 300,
        load=0,
    )
    assert all(share <= 1.0 for share in worst.values()), worst
