"""Sessions over both runtimes: what they write, how they go on, go back and fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megalodon_export
from megalodon_export import Session
from megalodon_export.generation.session import SessionError
from support.failing import fail_at

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "In the beginning"
EOS = 256


@pytest.fixture(params=["eager", "aoti", "aoti, running ahead"])
def session(request: pytest.FixtureRequest, loaded: dict[str, Session]) -> Session:
    """A fresh session; the runtime is shared."""
    name, _, ahead = request.param.partition(", ")
    return Session(loaded[name].runtime, loaded[name].tokenizer, lookahead=3 if ahead else 0)


def ids_of(session: Session, text: str) -> list[int]:
    return session.tokenizer.encode(text).ids


def greedy_ids(session: Session, prompt: list[int], count: int, eos: int = EOS) -> list[int]:
    """The greedy continuation by a loop over the runtime's two programs."""
    programs = session.runtime.bind(session.runtime.new_cache(1))
    logits = programs.prefill(torch.tensor([prompt]), torch.tensor([len(prompt)]))
    written: list[int] = []
    while len(written) < count:
        token_id = int(logits.argmax(-1))
        if token_id == eos:
            break
        written.append(token_id)
        logits = programs.decode(torch.tensor([token_id]))
    return written


def write(session: Session, count: int, prompt: str = "", **options: Any) -> list[int]:
    return list(session.generate_ids(ids_of(session, prompt), count, eos_token_id=-1, **options))


# ---- what is written -------------------------------------------------------------------------------------------------


def test_pieces_join_to_the_text_decoded_at_once(session: Session) -> None:
    expected = greedy_ids(session, ids_of(session, PROMPT), 300)
    pieces = list(session.generate(PROMPT, max_new_tokens=300))
    assert "".join(pieces) == session.tokenizer.decode(expected)
    assert all(pieces)
    assert len(pieces) > 20  # streamed, not held until the end


def test_characters_of_many_bytes_are_never_cut(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "é漢字🙂 ok"
    dictated = ids_of(session, text)
    monkeypatch.setattr(session, "generate_ids", lambda *_, **__: iter(dictated))
    assert list(session.generate("x", max_new_tokens=len(dictated))) == list(text)


def test_ids_are_those_of_the_loop(session: Session) -> None:
    assert write(session, 150, PROMPT) == greedy_ids(session, ids_of(session, PROMPT), 150, eos=-1)


def test_both_runtimes_write_the_same(loaded: dict[str, Session]) -> None:
    for options in ({}, {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 7}):
        texts = [write(s.fork(), 100, PROMPT, **options) for s in loaded.values()]
        assert texts[0] == texts[1]


def test_a_prompt_of_many_calls(session: Session) -> None:
    prompt = PROMPT * 20
    assert len(prompt) > 4 * session.runtime.limits.max_length
    assert write(session, 20, prompt) == greedy_ids(session, ids_of(session, prompt), 20, eos=-1)


def test_an_empty_prompt_begins_with_the_bos_token(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write(session, 20) == greedy_ids(session, [256], 20, eos=-1)
    monkeypatch.setattr(session.runtime.config, "bos_token_id", None)
    session.reset()
    with pytest.raises(ValueError, match=r"prompt is empty .* no bos_token_id"):
        next(session.generate())


def test_max_new_tokens(session: Session) -> None:
    assert len(write(session, 1, PROMPT)) == 1
    for count in (0, -3):
        with pytest.raises(ValueError, match=f"max_new_tokens is {count}, expected at least 1"):
            next(session.generate(PROMPT, max_new_tokens=count))


def test_eos_ends_the_text_and_is_not_part_of_it(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    path = greedy_ids(session, ids_of(session, PROMPT), 30, eos=-1)
    eos = next(token_id for i, token_id in enumerate(path) if i > 4 and token_id not in path[:i])
    expected = path[: path.index(eos)]
    assert list(session.generate_ids(ids_of(session, PROMPT), 30, eos_token_id=eos)) == expected
    session.reset()
    monkeypatch.setattr(session.runtime.config, "eos_token_id", eos)
    assert "".join(session.generate(PROMPT, 30)) == session.tokenizer.decode(expected)
    batched = session.generate_batch([PROMPT, "x"], 30)
    assert batched[0] == session.tokenizer.decode(expected)


def test_stop_strings_end_the_text_before_them(session: Session) -> None:
    text = "".join(session.generate(PROMPT, 100))
    stop = text[10:12]
    for stops in ([stop], ["never written", stop]):
        session.reset()
        assert "".join(session.generate(PROMPT, 100, stop=stops)) == text[: text.index(stop)]
    assert session.generate_batch([PROMPT], 100, stop=[stop]) == [text[: text.index(stop)]]


def test_seeds_reproduce(session: Session) -> None:
    texts = []
    for seed in (3, 3, 4):
        session.reset()
        texts.append(write(session, 60, PROMPT, temperature=1.0, seed=seed))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_wrong_sampling_is_refused_before_the_stream_moves(session: Session) -> None:
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            next(session.generate(PROMPT, 5, **options))
    with pytest.raises(TypeError, match="heat"):
        next(session.generate(PROMPT, 5, heat=1.0))
    assert int(session.cache.position[0]) == 0


# ---- going on, going back --------------------------------------------------------------------------------------------


def test_a_stream_goes_on(session: Session) -> None:
    once = write(session, 130, PROMPT)
    session.reset()
    assert write(session, 60, PROMPT) + write(session, 70) == once


def test_earlier_text_is_context(session: Session) -> None:
    first = write(session, 20, PROMPT)
    second = write(session, 20, " and then")
    prompt = [*ids_of(session, PROMPT), *first, *ids_of(session, " and then")]
    assert second == greedy_ids(session, prompt, 20, eos=-1)


def test_prefill_and_decode_by_hand(session: Session) -> None:
    tokens = ids_of(session, PROMPT)
    programs = session.runtime.bind(session.runtime.new_cache(1))
    expected = programs.prefill(torch.tensor([tokens]), torch.tensor([len(tokens)]))[0]
    assert torch.equal(session.prefill(tokens), expected)
    kept = session.decode(65)
    expected = programs.decode(torch.tensor([65]))[0].clone()
    assert torch.equal(kept, expected)
    session.decode(66)
    assert torch.equal(kept, expected)  # not a buffer that the next step overwrites
    written = write(session, 4, "x")
    assert session.decode(67).shape == (257,)  # feeds the token given out last, too
    assert int(session.cache.position[0]) == len(tokens) + 2 + 1 + len(written) + 1


def test_nothing_to_feed(session: Session) -> None:
    with pytest.raises(ValueError, match="at least one"):
        session.prefill([])


# ---- batches ---------------------------------------------------------------------------------------------------------

PROMPTS = [PROMPT, "x", "", "God said, let there be light: and there was light. " * 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_every_prompt_alone(session: Session, temperature: float) -> None:
    write(session, 3, "unrelated")
    before = [t.clone() for t in session.cache.tensors()]
    texts = session.generate_batch(PROMPTS, 70, temperature=temperature, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(session.cache.tensors(), before, strict=True))
    for i, prompt in enumerate(PROMPTS):
        session.reset()
        assert "".join(session.generate(prompt, 70, temperature=temperature, seed=5 + i)) == texts[i], i


def test_batches_that_do_not_fit_are_refused(loaded: dict[str, Session]) -> None:
    with pytest.raises(ValueError, match=r"batch of 9 is outside 1\.\.8.*smaller batches"):
        loaded["aoti"].generate_batch(["x"] * 9, 5)


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failure_half_way_poisons_until_reset(
    session: Session, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    expected = write(session, 10, PROMPT)
    state = session.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(session.programs, "run_prefill", fail_at(2, session.programs.run_prefill, error))
        with pytest.raises(type(error)):
            next(session.generate(PROMPT * 20))
    uses = (lambda: session.prefill([1]), lambda: session.decode(1), lambda: next(session.generate("x")))
    for use in (*uses, session.snapshot, session.fork):
        with pytest.raises(SessionError, match=r"failed half-way.*reset or restore"):
            use()
    session.restore(state)
    session.decode(1)
    session.reset()
    assert write(session, 10, PROMPT) == expected


def test_what_is_refused_poisons_nothing(session: Session) -> None:
    expected = write(session, 40, PROMPT)
    session.reset()
    written = write(session, 20, PROMPT)
    for wrong in ([257], [-1]):
        with pytest.raises(ValueError, match=r"token id .* is outside"):
            session.prefill(wrong)
    with pytest.raises(ValueError, match=r"token id .* is outside"):
        session.decode(300)
    assert written + write(session, 20) == expected


MOVES: dict[str, Callable[[Session], object]] = {
    "reset": lambda session: session.reset(),
    "prefill": lambda session: session.prefill([1]),
    "decode": lambda session: session.decode(1),
    "generate": lambda session: list(session.generate("x", 3)),
    "restore": lambda session: session.restore(session.snapshot()),
}


@pytest.mark.parametrize("move", MOVES)
def test_moving_a_stream_while_it_is_generated(session: Session, move: str) -> None:
    generation = session.generate_ids(ids_of(session, PROMPT), 20, eos_token_id=-1)
    next(generation)
    MOVES[move](session)
    with pytest.raises(SessionError, match="moved while it was being generated; use a fork"):
        next(generation)
    session.decode(1)  # the session itself is sound


def test_looking_at_a_stream_while_it_is_generated(session: Session) -> None:
    expected = write(session.fork(), 20, PROMPT)
    written = []
    for token_id in session.generate_ids(ids_of(session, PROMPT), 20, eos_token_id=-1):
        written.append(token_id)
        write(session.fork(), 2)
        session.snapshot()
        session.generate_batch(["x"], 1)
    assert written == expected


def test_a_generation_abandoned_is_a_stream_to_go_on_with(session: Session) -> None:
    expected = write(session.fork(), 20, PROMPT)
    for index, _ in enumerate(session.generate_ids(ids_of(session, PROMPT), 20, eos_token_id=-1)):
        if index == 9:
            break
    assert write(session, 10) == expected[10:]


def test_a_batch_runs_in_the_next_size_up(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"temperature": 1.0, "seed": 5}
    expected = session.generate_batch(PROMPTS[:3], 30, **options)
    monkeypatch.setattr("megalodon_export.generation.session.padded_batch", lambda runtime, batch: 4)
    for _ in range(2):  # the second time in the cache of the first
        assert session.generate_batch(PROMPTS[:3], 30, **options) == expected
    assert session.generate_batch(PROMPTS, 30, **options)[:3] == expected


def test_a_session_without_a_tokenizer_takes_ids(loaded: dict[str, Session]) -> None:
    session = Session(loaded["eager"].runtime)
    with pytest.raises(ValueError, match=r"no tokenizer\.json; use generate_ids"):
        next(session.generate(PROMPT))
    assert len(list(session.generate_ids([1, 2], 4, eos_token_id=-1))) == 4


def test_unknown_runtimes_are_named(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="no runtime 'jax'; there are eager, aoti"):
        megalodon_export.load(tiny_bundle, runtime="jax")
