"""Text that ends before a stop text, however its tokens are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moec.runtime.stop_text import Continuation


class Pieces:
    """A stand-in for the stream of a tokenizer: token i is the i-th piece."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def push(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return self.pieces[-1]


@given(st.lists(st.text("abc", max_size=4), min_size=1, max_size=8), st.lists(st.text("abc", max_size=4), max_size=3))
def test_the_text_ends_at_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    whole, given_out = "".join(pieces), ""
    text = Continuation(Pieces(pieces), stops)  # type: ignore[arg-type]
    for token in range(len(pieces) - 1):
        given_out += text.push(token)
        assert text.ended or all(stop not in "".join(pieces[: token + 1]) for stop in stops if stop)
    given_out += text.finish()
    ends = [whole.find(stop) for stop in stops if stop and stop in whole]
    first = [n for n in range(len(whole) + 1) if any(stop and whole[:n].endswith(stop) for stop in stops)]
    # The stop text that is complete first counts; of several that end together the one that begins first.
    if not first:
        assert given_out == whole and not text.ended
    else:
        seen = next(n for n in _lengths(pieces) if n >= first[0])
        begins = [whole[:seen].find(stop) for stop in stops if stop and stop in whole[:seen]]
        assert text.ended and given_out == whole[: min(begins)]
        assert min(ends) <= min(begins)


def _lengths(pieces: list[str]) -> list[int]:
    return [len("".join(pieces[: n + 1])) for n in range(len(pieces))]


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=3))
def test_nothing_is_held_back_that_cannot_be_a_stop(text: str, stop: str) -> None:
    """Letter by letter, what is held back is a beginning of the stop text, and the longest one."""
    out = Continuation(Pieces([*text, ""]), [stop])  # type: ignore[arg-type]
    said = ""
    for token in range(len(text)):
        said += out.push(token)
        if out.ended:
            assert text[: token + 1] == said + stop
            return
        held = text[len(said) : token + 1]
        assert stop.startswith(held) and len(held) < len(stop)
