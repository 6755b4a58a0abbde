"""The page pool: a page has one owner at a time, and none is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.runtime.cache import PagePool, Sequence
from moec.runtime.errors import CacheFull

WHAT = st.sampled_from(["open", "extend", "truncate", "close"])
ACTIONS = st.lists(st.tuples(WHAT, st.integers(0, 9), st.integers(1, 40)))


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_pages_have_one_owner_and_none_is_lost(actions: list[tuple[str, int, int]]) -> None:
    pool = PagePool(pages=12, page_size=8, context=64)
    live: list[Sequence] = []
    for what, which, tokens in actions:
        if what == "open":
            live.append(pool.open())
        elif live and what == "close":
            pool.close(live.pop(which % len(live)))
        elif live and what == "truncate":
            pool.truncate(live[which % len(live)], max(0, live[which % len(live)].length - tokens))
        elif live:
            sequence = live[which % len(live)]
            tokens = min(tokens, 64 - sequence.length)
            try:
                pool.extend(sequence, tokens)
                sequence.length += tokens
            except CacheFull:
                assert -(-(sequence.length + tokens) // 8) - sequence.held > pool.free
        held = [page for s in live for page in s.table[: s.held].tolist()]
        assert len(set(held)) == len(held) == pool.pages - pool.free
        assert all(0 <= page < 12 for page in held)
        assert all(s.held * 8 >= s.length > (s.held - 1) * 8 for s in live)


def test_a_failed_extension_changes_nothing() -> None:
    pool = PagePool(pages=2, page_size=8, context=64)
    sequence = pool.open()
    pool.extend(sequence, 8)
    sequence.length = 8
    with pytest.raises(CacheFull, match="2 pages of 8 tokens"):
        pool.extend(sequence, 9)
    assert (sequence.held, pool.free) == (1, 1)
