"""The generation loop: running ahead of the reader leaves the stream as stepping one by one does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import megalodon_export
from megalodon_export import Session
from megalodon_export.bundles.verify import visible as visible_cache
from megalodon_export.generation.decode_loop import padded_batch
from megalodon_export.generation.session import SessionError
from support.failing import fail_at

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def short_chunks(short_chunk_onnx_bundle: Path) -> Session:
    """Chunks of 8 tokens."""
    return megalodon_export.load(short_chunk_onnx_bundle, runtime="eager")


def visible(session: Session) -> list[Tensor]:
    """All that the stream's future depends on."""
    return [t.clone() for t in visible_cache(session.cache)]


@pytest.mark.parametrize("lookahead", [1, 3, 9, 20])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 40, "seed": 2}], ids=["greedy", "sampled"])
def test_stopping_anywhere_leaves_the_state_of_stepping(
    short_chunks: Session, lookahead: int, options: dict[str, Any]
) -> None:
    runtime = short_chunks.runtime
    for count in range(1, 20):  # crosses two ends of a chunk
        plain, ahead = Session(runtime, lookahead=0), Session(runtime, lookahead=lookahead)
        expected = list(plain.generate_ids([1, 2, 3], count, eos_token_id=-1, **options))
        generation = ahead.generate_ids([1, 2, 3], 100, eos_token_id=-1, **options)
        assert [next(generation) for _ in range(count)] == expected
        snapshots = [plain.snapshot(), ahead.snapshot()]  # taken half-way
        assert snapshots[0].pending == snapshots[1].pending
        assert all(map(torch.equal, visible(ahead), visible(plain)))
        generation.close()
        continuation = list(plain.generate_ids([], 30, eos_token_id=-1))
        ahead.restore(snapshots[1])
        assert list(ahead.generate_ids([], 30, eos_token_id=-1)) == continuation
        assert all(map(torch.equal, visible(ahead), visible(plain)))


def test_an_end_of_sequence_token_leaves_the_state_of_stepping(short_chunks: Session) -> None:
    runtime = short_chunks.runtime
    path = list(Session(runtime).generate_ids([1, 2, 3], 40, eos_token_id=-1, temperature=1.5, seed=1))
    for eos in dict.fromkeys(path):
        sessions = [Session(runtime, lookahead=ahead) for ahead in (0, 5)]
        texts = [list(s.generate_ids([1, 2, 3], 40, eos, temperature=1.5, seed=1)) for s in sessions]
        assert texts[0] == texts[1] == path[: path.index(eos)]
        assert sessions[0].snapshot().pending == sessions[1].snapshot().pending == eos
        assert all(map(torch.equal, visible(sessions[0]), visible(sessions[1])))


def test_a_failed_step_that_ran_ahead_poisons(short_chunks: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(short_chunks.runtime, lookahead=2)
    programs = session.programs
    monkeypatch.setattr(programs, "run_decode", fail_at(5, programs.run_decode, RuntimeError("lost")))
    generation = session.generate_ids([1], 20, eos_token_id=-1)
    with pytest.raises(RuntimeError, match="lost"):
        list(generation)
    with pytest.raises(SessionError, match="failed half-way"):
        session.snapshot()
    session.reset()
    session.snapshot()


@pytest.mark.parametrize("lookahead", [0, 1, 4])
def test_logits_that_cannot_be_sampled(short_chunks: Session, monkeypatch: pytest.MonkeyPatch, lookahead: int) -> None:
    session, reference = Session(short_chunks.runtime, lookahead=lookahead), Session(short_chunks.runtime, lookahead=0)
    expected = list(reference.generate_ids([1, 2], 8, eos_token_id=-1))[:7]  # the state is before the eighth is fed
    decode = session.programs.run_decode

    def failing(token_ids: Tensor) -> Tensor:
        logits = decode(token_ids)
        if int(session.programs.cache.position[0]) == 2 + 7:
            logits[0, :3] = torch.nan
        return logits

    monkeypatch.setattr(session.programs, "run_decode", failing)
    written: list[int] = []
    with pytest.raises(ValueError, match="row 0 cannot be sampled: NaN in 3 of 257 logits"):
        written.extend(token_id for token_id in session.generate_ids([1, 2], 20, eos_token_id=-1))
    assert written == expected
    assert session.snapshot().pending is None
    assert all(map(torch.equal, visible(session), visible(reference)))


def test_a_token_that_the_model_has_no_row_for(short_chunks: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    for lookahead in (0, 2):
        session = Session(short_chunks.runtime, lookahead=lookahead)
        session.prefill([1, 2])
        with monkeypatch.context() as patch:
            patch.setattr(session.runtime.config, "output_size", 257)  # a head wider than the vocabulary
            patch.setattr(session.runtime.config, "vocab_size", 5)
            generation = session.generate_ids([3], 9, eos_token_id=-1)
            first = next(generation)
            assert first >= 5
            with pytest.raises(ValueError, match=rf"token id {first} is outside 0\.\.4"):
                next(generation)
        assert session.snapshot().pending == first
        assert int(session.cache.position[0]) == 3


def test_sizes_of_captured_batches() -> None:
    def rows(batch: int, device: str, largest: int = 64) -> int:
        runtime = SimpleNamespace(device=torch.device(device), limits=SimpleNamespace(max_batch=largest))
        return padded_batch(runtime, batch)

    assert [rows(n, "cuda") for n in (1, 2, 3, 8, 9, 33, 64)] == [1, 2, 4, 8, 16, 64, 64]
    assert [rows(n, "cuda", 48) for n in (5, 33, 48)] == [8, 48, 48]
    assert [rows(n, "cuda", 8) for n in (0, 9)] == [0, 9]  # for the runtime to refuse
    assert rows(3, "cpu") == 3
