"""The engine: a stream's tokens are those of a session alone, whatever else runs, and nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalodon_export.runtimes import Runtime
from megalodon_export.serving.engine import Engine, Refused
from megalodon_export.serving.streams import LogitRules
from support.failing import fail_at
from support.serving import Reader, answers, ids, request

Make = Callable[..., Engine]
Alone = Callable[..., list[int]]

PROMPTS = [[1], [*b"In the beginning"], [*range(64)], [*range(200)], [7] * 65, [*b"In the end"]]
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 20, "seed": 4},
    {"temperature": 2.0, "top_p": 0.9, "min_p": 0.01, "seed": 2**64 - 1},
]


# Every prompt and every sampler; the other pairs are slow.
PAIRS = [
    pytest.param(prompt, sampling, marks=() if i % len(SAMPLING) == j else pytest.mark.slow)
    for i, prompt in enumerate(PROMPTS)
    for j, sampling in enumerate(SAMPLING)
]


@pytest.mark.parametrize(("prompt", "sampling"), PAIRS)
def test_a_stream_is_a_session(engine: Make, alone: Alone, prompt: list[int], sampling: dict[str, Any]) -> None:
    one = engine()
    expected = alone(prompt, 80, **sampling)
    assert ids(one, prompt, 80, **sampling) == expected
    (again,) = answers(one, prompt, 80, **sampling)
    assert again.ids == expected
    assert again.cached_tokens == len(prompt)


def test_streams_in_company_are_sessions(engine: Make, alone: Alone) -> None:
    """More streams than rows, of all samplers, which end at different steps."""
    one = engine(streams=4)
    cases = [(p, 5 + 9 * i, s) for i, (p, s) in enumerate((p, s) for p in PROMPTS for s in SAMPLING)]
    readers = [Reader(one, request(p, 5 + count % 40, **s)) for p, count, s in cases]
    for reader, (prompt, count, sampling) in zip(readers, cases, strict=True):
        (answer,) = reader.wait()
        assert answer.ids == alone(prompt, 5 + count % 40, **sampling)


@pytest.mark.parametrize("name", ["aoti", "onnx"])
def test_every_runtime_serves(opened: dict[str, Any], engine: Make, name: str) -> None:
    session = opened[name]
    one = engine(session.runtime, streams=3)
    readers = [Reader(one, request(prompt, 20, **s)) for prompt in PROMPTS[:4] for s in SAMPLING[:2]]
    for reader, (prompt, sampling) in zip(readers, [(p, s) for p in PROMPTS[:4] for s in SAMPLING[:2]], strict=True):
        session.reset()
        assert reader.wait()[0].ids == list(session.generate_ids(prompt, 20, -1, **sampling))


PARTS = st.lists(st.sampled_from([[5], [*range(60)], [9] * 64, [1, 2, 3], [*b"abcdefgh"] * 16]), min_size=1, max_size=5)


# The function-scoped fixtures hold no state between examples.
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(PARTS, st.sampled_from(SAMPLING)), min_size=1, max_size=6), st.sampled_from([0, 60_000, 10**8])
)
def test_random_prompts_with_common_beginnings(
    engine: Make, alone: Alone, wanted: list[tuple[list[list[int]], dict[str, Any]]], memory: int
) -> None:
    _check_common_beginnings(engine, alone, wanted, memory)


@pytest.mark.slow  # the same with many more examples
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(PARTS, st.sampled_from(SAMPLING)), min_size=1, max_size=8), st.integers(0, 400_000))
def test_more_random_prompts_with_common_beginnings(
    engine: Make, alone: Alone, wanted: list[tuple[list[list[int]], dict[str, Any]]], memory: int
) -> None:
    _check_common_beginnings(engine, alone, wanted, memory)


def _check_common_beginnings(
    engine: Make, alone: Alone, wanted: list[tuple[list[list[int]], dict[str, Any]]], memory: int
) -> None:
    one = engine(streams=3, device_bytes=memory, host_bytes=0)
    cases = [([*chain(*parts)], sampling) for parts, sampling in wanted]
    for _ in range(2):
        readers = [Reader(one, request(prompt, 6, **sampling)) for prompt, sampling in cases]
        for reader, (prompt, sampling) in zip(readers, cases, strict=True):
            (answer,) = reader.wait()
            assert answer.ids == alone(prompt, 6, **sampling)
            assert 0 <= answer.cached_tokens <= len(prompt)
    assert sum(one.store.used) <= memory
    one.close()


def test_forks_share_one_prefill(engine: Make, alone: Alone) -> None:
    one, prompt = engine(), [*range(150)]
    found = answers(one, prompt, 10, n=5, temperature=1.5, seed=2**64 - 2)
    assert [answer.ids for answer in found] == [
        alone(prompt, 10, temperature=1.5, seed=(2**64 - 2 + i) % 2**64) for i in range(5)
    ]


@pytest.mark.parametrize("keep", [True, False])
def test_cached_tokens_are_those_that_were_not_fed(engine: Make, keep: bool) -> None:
    one = engine(keep=keep)
    fed: list[int] = []
    one._observer.fed = fed.append  # type: ignore[method-assign]
    first = [*range(130)]
    for prompt in (first, first, first[:64], first[:100], [*first, 1, 2, 3], [*first[:70], 9]):
        fed.clear()
        (answer,) = answers(one, prompt, 1)
        assert sum(fed) == len(prompt) - answer.cached_tokens
    expected = 64 if keep else 0
    assert answer.cached_tokens == expected


def test_a_chat_goes_on_from_its_answer(engine: Make, alone: Alone) -> None:
    one, prompt = engine(), [*b"hello, "]
    for turn in range(6):
        (answer,) = answers(one, prompt, 30)
        assert answer.ids == alone(prompt, 30)
        assert turn == 0 or answer.cached_tokens == len(prompt) - 6  # the last token of an answer is not fed
        prompt = [*prompt, *answer.ids, *b" and "]


def test_owners_do_not_share_states(engine: Make) -> None:
    one, prompt = engine(), [*range(100)]
    cached = [answers(one, prompt, 1, owner=owner)[0].cached_tokens for owner in ("a", "b", "a", "b")]
    assert cached == [0, 0, 100, 100]


def test_a_state_goes_on(engine: Make, alone: Alone) -> None:
    one, prompt, more = engine(), [*range(90)], [*b"more"]
    (first,) = answers(one, prompt, 7, keep_state=True)
    assert first.last.state is not None
    (second,) = answers(one, more, 9, state=first.last.state, pending=first.last.pending)
    assert second.ids == alone([*prompt, *first.ids, *more], 9)


def test_a_prompt_alone(engine: Make) -> None:
    (answer,) = answers(engine(), [*range(70)], 0)
    assert (answer.ids, answer.reason) == ([], "length")


def test_an_end_token_and_a_stop_string(engine: Make, alone: Alone) -> None:
    one, prompt = engine(), [*b"In the beginning"]
    expected = alone(prompt, 40, temperature=1.0, seed=1)
    end = expected[10]
    (answer,) = answers(one, prompt, 40, temperature=1.0, seed=1, eos_token_id=end)
    assert (answer.ids, answer.reason) == (expected[: expected.index(end) + 1], "stop")
    (whole,) = answers(one, prompt, 40, temperature=1.0, seed=1)
    stop = whole.text[5:7]
    (answer,) = answers(one, prompt, 40, temperature=1.0, seed=1, stop=(stop,))
    assert (answer.text, answer.reason) == (whole.text[: whole.text.index(stop)], "stop")


def test_penalties_and_bias(engine: Make) -> None:
    one, prompt = engine(), [*b"aaaa"]
    plain = ids(one, prompt, 30)
    only = ids(one, prompt, 30, rules=LogitRules(bias={65: 1000.0}))
    assert only == [65] * 30
    for rules in (
        LogitRules(presence_penalty=1000.0),
        LogitRules(frequency_penalty=1000.0),
        LogitRules(repetition_penalty=1e30),
    ):
        found = ids(one, prompt, 30, rules=rules)
        assert len(set(found)) == 30, "no token comes twice"
        assert len(set(plain)) < 30
    assert 97 not in ids(one, prompt, 30, rules=LogitRules(repetition_penalty=1e30)), "it is in the prompt"


def test_rules_of_one_stream_change_no_other(engine: Make, alone: Alone) -> None:
    one = engine()
    rules = [LogitRules(), LogitRules(bias={65: 1000.0}), LogitRules(presence_penalty=2.0), LogitRules()]
    readers = [Reader(one, request([*b"same"], 30, rules=rule)) for rule in rules]
    first, *_, last = [reader.wait()[0].ids for reader in readers]
    assert first == last == alone([*b"same"], 30)


def test_logprobs_are_the_models(engine: Make, runtime: Runtime) -> None:
    one, prompt = engine(), [*range(100)]
    (answer,) = answers(one, prompt, 6, logprobs=3, prompt_logprobs=2)
    tokens = torch.tensor([[*prompt, *answer.ids]])
    programs = runtime.bind(runtime.new_cache(1))
    expected = programs.score(tokens, torch.tensor([tokens.shape[1]]))[0].log_softmax(-1)
    found = [*answer.prompt, *answer.tokens]
    assert found[0].logprob is None
    for place, token in enumerate(found[1:]):
        assert token.logprob == pytest.approx(expected[place, token.id].item(), abs=1e-4)
        values, best = expected[place].topk(3 if place >= 99 else 2)
        assert [one for one, _ in token.top] == best.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_long_prompt_does_not_stall_others(engine: Make) -> None:
    """While a prompt of 40 pieces is fed, a running stream gets about a token for each."""
    one = engine(piece=64)
    running = Reader(one, request([1], 60))
    running.wait(tokens=1)
    long = Reader(one, request([5] * (64 * 40), 1))
    (answer,) = long.wait()
    assert answer.reason == "length"
    assert len(running.streams[0].generated) >= 30
    running.wait()


def test_cancelled_streams_free_their_rows(engine: Make) -> None:
    one = engine(streams=2)
    endless = [Reader(one, request([i], 10**6)) for i in range(2)]
    for reader in endless:
        reader.wait(tokens=2)
    waiting = Reader(one, request([3], 4))
    queued = Reader(one, request([4], 4))
    queued.streams[0].cancel()
    endless[0].streams[0].cancel()
    assert waiting.wait()[0].reason == "length"
    endless[1].streams[0].cancel()
    one.wake()
    assert one.drain(30)
    assert (one.running, one.waiting) == (0, 0)


def test_the_queue_is_bounded(engine: Make) -> None:
    one = engine(streams=1, queue=2)
    running = Reader(one, request([1], 10**6))
    running.wait(tokens=1)
    waiting = [Reader(one, request([2], 2)) for _ in range(2)]
    with pytest.raises(Refused, match="2 requests wait already") as refused:
        Reader(one, request([2], 2))
    assert refused.value.retry_after == 1
    running.streams[0].cancel()
    for reader in waiting:
        assert reader.wait()[0].reason == "length"


def test_draining_ends_what_runs_and_takes_no_more(engine: Make) -> None:
    one = engine()
    running = Reader(one, request([1], 50))
    drained = threading.Thread(target=one.drain, args=(60,))
    drained.start()
    while not one.is_draining:
        pass
    with pytest.raises(Refused, match="shutting down"):
        Reader(one, request([1], 1))
    drained.join()
    assert running.wait()[0].reason == "length"


def test_closing_fails_what_runs(engine: Make) -> None:
    one = engine()
    running = Reader(one, request([1], 10**6))
    running.wait(tokens=1)
    one.close()
    assert "shutting down" in str(running.wait()[0].error)


@pytest.mark.parametrize(("n", "prompt", "message"), [(9, [1], "n is 9, expected 1..8"), (1, [], "prompt is empty")])
def test_requests_that_can_never_run(engine: Make, n: int, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine().submit(request(prompt, 1, n=n), lambda: None)


def test_a_failed_step_fails_its_streams_alone(engine: Make, alone: Alone) -> None:
    one = engine()
    running = Reader(one, request([1], 10**6))
    running.wait(tokens=1)
    programs = one._rows._bound(1)
    programs.run_decode = fail_at(1, programs.run_decode, RuntimeError("no memory"))  # type: ignore[method-assign]
    assert "no memory" in str(running.wait()[0].error)
    del programs.run_decode
    assert ids(one, [5], 8) == alone([5], 8)


def test_a_failed_prompt_fails_alone(engine: Make, alone: Alone) -> None:
    one = engine()
    programs = one._prefiller._programs
    programs.run_prefill = fail_at(1, programs.run_prefill, RuntimeError("no memory"))  # type: ignore[method-assign]
    assert "no memory" in str(Reader(one, request([1], 4)).wait()[0].error)
    del programs.run_prefill
    assert ids(one, [5], 8) == alone([5], 8)


def test_logits_without_numbers_fail_their_stream_alone(engine: Make, alone: Alone) -> None:
    one = engine()
    running = [Reader(one, request([i], 60)) for i in (1, 2, 3)]
    for reader in running:
        reader.wait(tokens=1)
    step = one._rows.step

    def damaged(tokens: list[int]) -> torch.Tensor:
        del one._rows.step
        logits = step(tokens).clone()
        logits[0] = torch.nan
        return logits

    one._rows.step = damaged  # type: ignore[assignment, method-assign]
    found = [reader.wait()[0] for reader in running]
    assert sum("NaN" in str(answer.error) for answer in found) == 1
    for answer, token in zip(found, (1, 2, 3), strict=True):
        assert answer.error or answer.ids == alone([token], 60)


@pytest.mark.parametrize("place", ["_rows", "_prefiller"])
def test_states_that_cannot_be_kept_cost_hits_alone(engine: Make, alone: Alone, place: str) -> None:
    """Memory for a copy of a state may be missing at any time; the streams go on, and later ones are kept again."""
    one = engine()
    copier = getattr(one, place)._copier
    take, prompt = copier.take, [*range(100)]

    def missing(*arguments: Any) -> None:
        raise RuntimeError("no memory")

    copier.take = missing
    if place == "_rows":
        assert ids(one, prompt, 60) == alone(prompt, 60)
        (answer,) = Reader(one, request(prompt, 5, keep_state=True)).wait()
        assert "no memory" in str(answer.error)
    else:
        (answer,) = Reader(one, request(prompt, 5)).wait()
        assert "no memory" in str(answer.error), "without a copy it cannot join the others"
    copier.take = take
    for _ in range(2):
        (answer,) = answers(one, prompt, 60)
        assert answer.ids == alone(prompt, 60)
    assert answer.cached_tokens == 100


def test_a_row_that_cannot_be_had_fails_its_stream_alone(engine: Make, alone: Alone) -> None:
    one = engine()
    running = Reader(one, request([1], 80))
    running.wait(tokens=1)
    append = one._rows.append

    def missing(*arguments: Any) -> None:
        one._rows.append = append  # type: ignore[method-assign]
        raise RuntimeError("no memory")

    one._rows.append = missing  # type: ignore[assignment, method-assign]
    found = Reader(one, request([2], 9, n=2)).wait()
    assert "no memory" in str(found[0].error)
    assert found[1].ids == alone([2], 9)
    assert running.wait()[0].ids == alone([1], 80)


def test_a_lost_device_ends_the_engine(engine: Make) -> None:
    """Five calls in a row fail: later requests are refused, so that a probe notices."""
    one = engine()

    def lost(*arguments: Any) -> None:
        raise RuntimeError("the device is lost")

    one._prefiller._programs.run_prefill = lost  # type: ignore[assignment, method-assign]
    for _ in range(5):
        assert "the device is lost" in str(Reader(one, request([1], 4)).wait()[0].error)
    with pytest.raises(Refused, match="5 calls in a row have failed") as refused:
        one.submit(request([1], 4), lambda: None)
    assert refused.value.retry_after is None
    assert one.failure
