"""Numbers in tables: significant digits, no exponents for great ones."""

from __future__ import annotations

import pytest

from moec.figures import figures


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12010.4, "12,010"), (2547.3, "2,547"), (88412, "88,410"), (0.00407612, "0.004076"), (0, "0"), (99996, "100,000"),
     (1.5e9, "1,500,000,000"), (-12345.0, "-12,340"), (float("inf"), "inf")],
)  # fmt: skip
def test_figures(value: float, shown: str) -> None:
    assert figures(value) == shown
