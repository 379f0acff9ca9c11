"""Snapshots and forks: what they hold, what is refused, and that a refused one changes nothing."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

import megalodon_export
from megalodon_export import Session, Snapshot
from megalodon_export.generation.session import SessionError
from megalodon_export.generation.snapshot import copy_state
from megalodon_export.model import PRESETS, ModelCache, ModelConfig
from support.failing import fail_at
from support.snapshot_files import RAW_DAMAGE, SEALED_DAMAGE, SnapshotFile, damaged, odd_files

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = list(b"In the beginning")
POSITION = 70  # 6 of 64 slots are filled


@pytest.fixture(params=["eager", "aoti", "aoti, running ahead"])
def session(request: pytest.FixtureRequest, loaded: dict[str, Session]) -> Session:
    """A session inside a chunk; one token is pending."""
    name, _, ahead = request.param.partition(", ")
    session = Session(loaded[name].runtime, loaded[name].tokenizer, lookahead=3 if ahead else 0)
    write(session, POSITION - len(PROMPT) + 1, PROMPT)
    assert int(session.cache.position) == POSITION
    return session


@pytest.fixture(scope="module")
def content(loaded: dict[str, Session]) -> bytes:
    """The bytes of a snapshot."""
    session = loaded["eager"].fork()
    write(session, POSITION - len(PROMPT) + 1, PROMPT)
    return session.snapshot().to_bytes()


def write(session: Session, count: int, prompt: list[int] = []) -> list[int]:  # noqa: B006 - not changed
    return list(session.generate_ids(prompt, count, eos_token_id=-1))


# ---- what they hold --------------------------------------------------------------------------------------------------


def test_snapshots_and_forks_go_back(session: Session) -> None:
    state, fork = session.snapshot(), session.fork()
    expected = write(session, 80)
    assert write(fork, 80) == expected
    session.restore(state)
    assert write(session, 80) == expected
    session.reset()
    assert write(session, 80) != expected
    session.restore(state)  # a snapshot is a copy: streams that ran on from it did not move it
    assert write(session, 80) == expected


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 130])
def test_a_stream_goes_on_from_its_filled_slots(loaded: dict[str, Session], length: int) -> None:
    session, other = loaded["eager"].fork(), loaded["eager"].fork()
    session.prefill([*PROMPT * 9][:length])
    state = session.snapshot()
    assert state.tensors["layers.0.key"].shape == (1, 2, length % 64, 8)
    other.prefill(PROMPT * 6)  # fills slots that restoring has to clear
    other.restore(Snapshot.from_bytes(state.to_bytes()))
    assert other.snapshot().to_bytes() == state.to_bytes()
    for ring in other.cache.rings():
        assert ring[:, :, length % 64 :].count_nonzero() == 0
    assert write(other, 70, [7]) == write(session.fork(), 70, [7]) == write(session, 70, [7])


@pytest.mark.parametrize(("source", "target"), [("eager", "aoti"), ("aoti", "eager")])
def test_snapshots_on_disk_serve_both_runtimes(
    loaded: dict[str, Session], tmp_path: Path, source: str, target: str
) -> None:
    writer, reader = loaded[source].fork(), loaded[target].fork()
    write(writer, 75, PROMPT)
    writer.snapshot().save(tmp_path / "state")
    expected = write(writer, 80)
    reader.restore(Snapshot.load(tmp_path / "state"))
    assert write(reader, 80) == expected


def test_a_snapshot_grows_within_a_chunk_alone(loaded: dict[str, Session]) -> None:
    session, sizes = loaded["eager"].fork(), []
    for _ in range(5):
        session.prefill(PROMPT * 2)
        sizes.append(len(session.snapshot().to_bytes()))
    slots = 32 * 2 * 2 * (8 + 12) * 4  # bytes of 32 slots of 2 layers with 2 heads, keys and values, float32
    assert abs(sizes[0] - sizes[1] - slots) < 32
    assert abs(sizes[3] - sizes[1]) < 16
    assert abs(sizes[4] - sizes[0]) < 16


def test_a_snapshot_of_200m_at_the_end_of_a_chunk_is_small() -> None:
    config = ModelConfig(**PRESETS["200M"])
    cache = ModelCache.allocate(config, 1, torch.bfloat16)
    sizes = {}
    for position in (0, 2048, 2049):
        cache.position.fill_(position)
        sizes[position] = len(Snapshot.of(config, cache, None, "0" * 64).to_bytes())
    assert 1.55e6 < sizes[2048] < 1.65e6
    assert abs(sizes[0] - sizes[2048]) < 16
    assert abs(sizes[2049] - sizes[2048] - 12 * (256 + 2048) * 2) < 100


def test_a_file_is_a_safetensors_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(content)
    expected = Snapshot.from_bytes(content)
    with safe_open(tmp_path / "state", framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == expected.tensors.keys()
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in expected.tensors.items())
    assert metadata == SnapshotFile.parse(content).seal().metadata  # which computes the checksum on its own
    again = Snapshot.from_bytes(save(expected.tensors, metadata))  # in another order of the metadata
    assert again.to_bytes() == content


# ---- what is refused -------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(session: Session) -> Iterator[None]:
    """A block in which the stream of a session must not move."""
    before, expected = session.snapshot().to_bytes(), write(session.fork(), 20)
    yield
    assert session.snapshot().to_bytes() == before
    assert write(session.fork(), 20) == expected


@pytest.mark.parametrize("damage", [*SEALED_DAMAGE, *RAW_DAMAGE])
def test_damaged_files_are_refused(loaded: dict[str, Session], content: bytes, tmp_path: Path, damage: str) -> None:
    session = loaded["eager"].fork()
    session.restore(Snapshot.from_bytes(content))
    changed, said = damaged(content, damage)
    (tmp_path / "state").write_bytes(changed)
    with unchanged(session), pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
        session.restore(Snapshot.load(tmp_path / "state"))
    assert said in str(caught.value)
    assert str(caught.value).startswith((f"{tmp_path / 'state'} is ", "the snapshot", "layers.", "final."))


def _swap(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Snapshot], Snapshot]:
    return lambda state: Snapshot({**state.tensors, name: change(state.tensors[name])}, state.pending, state.model)


def _pending(value: Any) -> Callable[[Snapshot], Snapshot]:
    return lambda state: Snapshot(state.tensors, value, state.model)


BY_HAND: dict[str, tuple[Callable[[Snapshot], Snapshot], str]] = {
    "a list": (
        _swap("final.norm_mean", lambda t: t.tolist()),
        "final.norm_mean of the snapshot is no tensor of values",
    ),
    "a tensor without values": (
        _swap("layers.0.key", lambda t: t.to("meta")),
        "layers.0.key of .* no tensor of values",
    ),
    "a sparse tensor": (_swap("layers.0.key", lambda t: t.to_sparse()), "layers.0.key of .* no tensor of values"),
    "complex values": (_swap("final.norm_var", lambda t: t.to(torch.complex64)), "is complex64, expected float32"),
    "another shape": (_swap("final.norm_var", lambda t: t[:, :1]), r"has the shape \[1, 1\], expected \[1, 4\]"),
    "NaN": (_swap("layers.1.value", lambda t: t / 0), "layers.1.value of the snapshot has values that are not finite"),
    "a name that is no text": (lambda s: Snapshot({**s.tensors, 7: 0}, s.pending, s.model), "has a tensor 7"),
    "another model": (lambda s: Snapshot(s.tensors, s.pending, "x"), "is of another model"),
    **{
        f"pending {value!r}": (_pending(value), "pending token is .*, expected none or a token id in 0..256")
        for value in ("abc", "7", 1.5, 2**63, -1, 257, True, np.int64(7), torch.tensor(7))
    },
}


@pytest.mark.parametrize("change", BY_HAND)
def test_snapshots_changed_by_hand_are_refused(session: Session, change: str) -> None:
    edit, said = BY_HAND[change]
    state = edit(session.snapshot())
    with unchanged(session), pytest.raises(ValueError, match=said):
        session.restore(state)


def test_tensors_of_any_strides_are_taken(session: Session) -> None:
    state, expected = session.snapshot(), write(session.fork(), 20)
    strided = {name: t.unsqueeze(-1).repeat_interleave(2, -1)[..., 0] for name, t in state.tensors.items()}
    strided["final.norm_mean"].requires_grad_()
    session.restore(Snapshot(strided, state.pending, state.model))
    assert not any(tensor.requires_grad for tensor in session.cache.tensors())
    assert session.snapshot().to_bytes() == Snapshot(strided, state.pending, state.model).to_bytes() == state.to_bytes()
    assert write(session, 20) == expected


@pytest.mark.parametrize("wrong", [None, "state.safetensors", {}])
def test_what_is_no_snapshot_is_named(session: Session, wrong: Any) -> None:
    with (
        unchanged(session),
        pytest.raises(TypeError, match=r"restore takes a Snapshot, not .*; Snapshot\.load reads one"),
    ):
        session.restore(wrong)


def test_snapshots_of_another_model_are_refused(session: Session, short_chunk_onnx_bundle: Path) -> None:
    other = megalodon_export.load(short_chunk_onnx_bundle, runtime="eager").snapshot()
    with unchanged(session), pytest.raises(ValueError, match="the snapshot is of another model; restore it in"):
        session.restore(other)


def test_a_refused_snapshot_does_not_disturb_a_generation(session: Session, content: bytes) -> None:
    wrong, expected, written = Snapshot.from_bytes(content), write(session.fork(), 20), []
    wrong.tensors["final.norm_var"].neg_()
    for token_id in session.generate_ids([], 20, eos_token_id=-1):
        written.append(token_id)
        with pytest.raises(ValueError, match="negative variance"):
            session.restore(wrong)
    assert written == expected


def test_a_refused_snapshot_leaves_a_broken_session_broken(
    session: Session, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = session.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(session.programs, "run_prefill", fail_at(1, session.programs.run_prefill, RuntimeError("lost")))
        with pytest.raises(RuntimeError):
            session.prefill([1])
    wrong = Snapshot(right.tensors, -1, right.model)
    with pytest.raises(ValueError, match="pending token"):
        session.restore(wrong)
    with pytest.raises(SessionError, match="failed half-way"):
        session.snapshot()
    session.restore(right)
    assert session.snapshot().to_bytes() == right.to_bytes()


def test_a_restore_that_fails_half_way_breaks_the_session(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    state = session.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "copy_to", fail_at(1, Snapshot.copy_to, RuntimeError("lost")))
        with pytest.raises(RuntimeError, match="lost"):
            session.restore(state)
    with pytest.raises(SessionError, match="failed half-way"):
        session.fork()
    session.restore(state)
    assert session.snapshot().to_bytes() == state.to_bytes()


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device"])
def test_what_is_no_file_is_neither_read_nor_replaced(content: bytes, tmp_path: Path, kind: str) -> None:
    path = odd_files(tmp_path)[kind]
    with pytest.raises(ValueError, match=rf"{path} is no snapshot: a regular file expected"):
        Snapshot.load(path)
    with pytest.raises(OSError, match=rf"{path} cannot be written: it is no regular file"):
        Snapshot.from_bytes(content).save(path)
    assert not path.is_file()


def test_files_that_cannot_be_read_or_written_are_named(content: bytes, tmp_path: Path) -> None:
    absent = tmp_path / "absent" / "state"
    with pytest.raises(FileNotFoundError, match=f"^{absent} cannot be opened: No such file"):
        Snapshot.load(absent)
    with pytest.raises(FileNotFoundError, match=f"^{absent} cannot be written: No such file"):
        Snapshot.from_bytes(content).save(absent)
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_leaves_the_old_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=f"^{path} cannot be written: File too large"):
            Snapshot.from_bytes(content).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_any_new_file(content: bytes, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        Snapshot.from_bytes(content).save(tmp_path / "state")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o666 & ~umask


def test_copying_a_state_leaves_slots_that_are_not_filled(loaded: dict[str, Session]) -> None:
    session = loaded["eager"].fork()
    session.prefill(PROMPT)
    copy = session.runtime.new_cache(1)
    copy_state(session.runtime.config, session.cache, copy)
    for ring in copy.rings():
        assert ring[:, :, : len(PROMPT)].count_nonzero() > 0
        assert ring[:, :, len(PROMPT) :].count_nonzero() == 0
