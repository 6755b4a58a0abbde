"""Logits and generation of the toy model against its definition in numpy, and what the API refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_artifact import BATCH, CHUNK, CONTEXT, EOS, PAGES, VOCAB, expected_logits

from moec.errors import InputError
from moec.runtime import Model, load
from moec.runtime import errors as e


@pytest.fixture(scope="module")
def model(toy: Path) -> Model:
    return load(toy, check=True, threads=2)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, EOS, length).tolist()  # type: ignore[no-any-return]


def greedy(ids: list[int], new: int, stop: tuple[int, ...] = (EOS,)) -> list[int]:
    """Greedy continuation by the definition."""
    tokens = list(ids)
    while len(tokens) < len(ids) + new:
        tokens.append(int(expected_logits(np.array(tokens))[-1].argmax()))
        if tokens[-1] in stop:
            break
    return tokens[len(ids) :]


@pytest.mark.parametrize("chunk", [None, 1, 2, 7, 64, CHUNK, CONTEXT])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, CHUNK + 1), (BATCH + 2, 65), (1, CONTEXT)])
def test_logits_are_those_of_the_definition(model: Model, chunk: int | None, batch: int, length: int) -> None:
    ids = np.random.default_rng(length).integers(0, VOCAB, (batch, length))
    expected = np.stack([expected_logits(row) for row in ids])
    found = model.logits(ids, chunk=chunk)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert model.engine.pool.free == PAGES


def test_losses_are_those_of_torch(model: Model) -> None:
    ids = np.array(prompt(130))
    logits = torch.from_numpy(expected_logits(ids))
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:]), reduction="none")
    np.testing.assert_allclose(model.losses(ids), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_greedy_generation(model: Model) -> None:
    assert model.generate(prompt(70), 30) == greedy(prompt(70), 30)


def test_prompts_of_different_lengths_more_than_the_batch(model: Model) -> None:
    prompts = [prompt(length, seed=length) for length in (3, 64, 65, 1, 127, 20, 5)]
    assert model.generate(prompts, 20) == [greedy(ids, 20) for ids in prompts]
    assert model.engine.pool.free == PAGES


def test_arrays_and_tensors_are_prompts_too(model: Model) -> None:
    ids = [prompt(4, 1), prompt(4, 2)]
    expected = [greedy(one, 3) for one in ids]
    for given in (np.array(ids), torch.tensor(ids), [np.array(one) for one in ids], tuple(ids)):
        assert model.generate(given, 3) == expected
    assert model.generate(torch.tensor(ids[0]), 3) == expected[0]
    assert model.generate([np.int64(i) for i in ids[0]], 3) == expected[0]


def test_a_stop_token_ends_one_sequence_and_is_its_last(model: Model) -> None:
    full = greedy(prompt(10), 12, stop=())
    stop = full[4]
    ends = full.index(stop) + 1
    assert model.generate(prompt(10), 12, stop=[stop]) == full[:ends]
    both = model.generate([prompt(10), prompt(11, 5)], 12, stop=[stop])
    assert both == [full[:ends], greedy(prompt(11, 5), 12, stop=(stop,))]
    assert model.generate(prompt(10), 12, stop=()) == full


def test_the_context_can_be_filled_to_its_last_token(model: Model) -> None:
    ids = prompt(CONTEXT - 4)
    assert model.generate(ids, 5, stop=()) == greedy(ids, 5, stop=())


def test_sampled_tokens_do_not_depend_on_the_batch(model: Model) -> None:
    prompts = [prompt(9, 1), prompt(9, 1), prompt(30, 2), prompt(5, 3), prompt(1, 4)]
    together = model.generate(prompts, 15, temperature=1.0, top_p=0.9, seed=5)
    assert together == model.generate(prompts, 15, temperature=1.0, top_p=0.9, seed=5)
    assert together[0] == model.generate(prompts[0], 15, temperature=1.0, top_p=0.9, seed=5)
    assert together[0] != together[1]
    assert together != model.generate(prompts, 15, temperature=1.0, top_p=0.9, seed=6)


def test_streamed_tokens_are_the_result(model: Model) -> None:
    seen: list[list[int]] = [[], []]
    result = model.generate([prompt(3), prompt(8, 1)], 9, stream=lambda index, token: seen[index].append(token))
    assert seen == result


def test_a_failing_callback_loses_no_pages(model: Model) -> None:
    def fail(index: int, token: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.generate([prompt(3), prompt(8)], 9, stream=fail)
    assert model.engine.pool.free == PAGES
    assert model.generate(prompt(3), 4) == greedy(prompt(3), 4)


def test_rates_count_every_token(model: Model) -> None:
    done = model.complete([prompt(50), prompt(7)], 10, stop=())
    assert (done.rates.prompt_tokens, done.rates.decoded_tokens) == (57, 18)
    assert done.rates.prefill is not None and done.rates.decode is not None
    assert model.complete(prompt(5), 1).rates.decode is None


def test_a_torch_module_around_it(model: Model) -> None:
    ids = torch.tensor([prompt(6), prompt(6, 1)])
    module = model.as_module()
    assert isinstance(module, torch.nn.Module)
    torch.testing.assert_close(module(ids), torch.from_numpy(model.logits(ids.numpy())), rtol=0, atol=0)


def test_one_thread_gives_the_same(toy: Path, model: Model) -> None:
    ids = [prompt(100)]
    np.testing.assert_array_equal(load(toy, threads=1).logits(ids), model.logits(ids))


LONG = "201 tokens, the artifact was compiled for 200"


@pytest.mark.parametrize(
    ("ids", "kind", "names"),
    [
        ([[]], e.EmptyPrompt, "empty"),
        ([[0] * (CONTEXT + 1)], e.PromptTooLong, LONG),
        ([[0, 1, VOCAB]], e.TokenOutsideVocabulary, "300 at position 2"),
        ([[0, -1]], e.TokenOutsideVocabulary, "-1 at position 1"),
        ([[0.5]], e.WrongTokens, "integers"),
        ([["a"]], e.WrongTokens, "integers"),
        ([[2**80]], e.WrongTokens, "integers"),
        ([1, 2], e.WrongTokens, "shape"),
        ([[[1]]], e.WrongTokens, "shape"),
        ([[1], [2, 3]], e.WrongTokens, "different lengths"),
    ],
)
def test_logits_refuse(model: Model, ids: Any, kind: type[InputError], names: str) -> None:
    with pytest.raises(kind, match=names):
        model.logits(ids)


@pytest.mark.parametrize(
    ("ids", "new", "kind", "names"),
    [
        ([], 5, e.EmptyPrompt, "the prompt is empty"),
        ([[1], []], 5, e.EmptyPrompt, "prompt 1 is empty"),
        ([0] * (CONTEXT + 1), 1, e.PromptTooLong, LONG),
        ([0] * CONTEXT, 2, e.NoRoom, "at most 1 new"),
        ([1, 2], CONTEXT, e.NoRoom, "--context 201"),
        ([1, VOCAB], 5, e.TokenOutsideVocabulary, "300 at position 1"),
        ([1.5], 5, e.WrongTokens, "integers"),
        ([True, False], 5, e.WrongTokens, "integers"),
        ("text", 5, e.WrongTokens, "not str"),
        (7, 5, e.WrongTokens, "not int"),
        (np.int64(7), 5, e.WrongTokens, "not int64"),
        ([[[1]]], 5, e.WrongTokens, "shape"),
        ([1], 0, e.WrongOption, "max-new-tokens"),
    ],
)
def test_generation_refuses(model: Model, ids: Any, new: int, kind: type[InputError], names: str) -> None:
    with pytest.raises(kind, match=names):
        model.generate(ids, new)


def test_other_options_out_of_range(toy: Path, model: Model) -> None:
    with pytest.raises(e.WrongOption, match="chunk"):
        model.logits([[1]], chunk=0)
    with pytest.raises(e.WrongOption, match="temperature"):
        model.generate([1], 1, temperature=-1)
    with pytest.raises(e.WrongOption, match="threads"):
        load(toy, threads=0)
