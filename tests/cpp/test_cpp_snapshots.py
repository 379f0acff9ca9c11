"""Snapshots of the C++ library against Python's: equal bytes, and the same words for what is refused."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import megalodon_export
from megalodon_export import Session, Snapshot
from support import native
from support.snapshot_files import RAW_DAMAGE, SEALED_DAMAGE, damaged, odd_files

pytestmark = pytest.mark.usefixtures("one_thread")

INVALID, IO = 1, 4
PROMPT = list(b"In the beginning")


@pytest.fixture(scope="module")
def python(tiny_bundle: Path) -> Session:
    return megalodon_export.load(tiny_bundle, runtime="aoti")


@pytest.fixture
def session(engine: native.Engine) -> native.Session:
    """A session inside a chunk, at position 70; one token is pending."""
    session = native.Session(engine)
    session.generate_ids(PROMPT, 55, eos=-1)
    return session


def said(call: Callable[[], object]) -> str:
    """What an error says."""
    with pytest.raises((ValueError, OSError, native.NativeError)) as caught:
        call()
    return str(caught.value)


@contextmanager
def unchanged(session: native.Session, folder: Path) -> Iterator[None]:
    """A block in which the stream of a session must not move."""
    session.save(folder / "before")
    yield
    session.save(folder / "after")
    assert (folder / "after").read_bytes() == (folder / "before").read_bytes()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 130])
@pytest.mark.parametrize("pending", [False, True])
def test_both_write_the_same_bytes(
    engine: native.Engine, python: Session, tmp_path: Path, length: int, pending: bool
) -> None:
    python.reset()
    python.prefill((PROMPT * 9)[:length])
    if pending:
        list(python.generate_ids([5], 1, eos_token_id=-1))
    python.snapshot().save(tmp_path / "python")
    session = native.Session(engine)
    session.generate_ids(PROMPT * 6, 3, eos=-1)  # fills slots that restoring has to clear
    session.restore(tmp_path / "python")
    session.save(tmp_path / "native")
    assert (tmp_path / "native").read_bytes() == (tmp_path / "python").read_bytes()

    written = session.generate_ids([7], 70, eos=-1)
    assert list(python.generate_ids([7], 70, eos_token_id=-1)) == written
    session.save(tmp_path / "later")
    python.restore(Snapshot.load(tmp_path / "later"))
    assert list(python.generate_ids([], 70, eos_token_id=-1)) == session.generate_ids([], 70, eos=-1)


@pytest.mark.parametrize("damage", [*SEALED_DAMAGE, *RAW_DAMAGE])
def test_both_refuse_damaged_files_with_the_same_words(
    session: native.Session, python: Session, tmp_path: Path, damage: str
) -> None:
    session.save(tmp_path / "whole")
    changed, words = damaged((tmp_path / "whole").read_bytes(), damage)
    path = tmp_path / "changed"
    path.write_bytes(changed)
    with unchanged(session, tmp_path), pytest.raises(native.NativeError) as caught:
        session.restore(path)
    assert words in str(caught.value)
    assert caught.value.status == INVALID
    assert str(caught.value) == said(lambda: python.restore(Snapshot.load(path)))


def test_a_refused_snapshot_leaves_the_stream_where_it_was(
    session: native.Session, engine: native.Engine, tmp_path: Path
) -> None:
    other = native.Session(engine)
    session.save(tmp_path / "whole")
    other.restore(tmp_path / "whole")
    for number, damage in enumerate(("a negative variance", "a position of other slots", "pending far beyond", "NaN")):
        (tmp_path / "changed").write_bytes(damaged((tmp_path / "whole").read_bytes(), damage)[0])
        assert said(lambda: session.restore(tmp_path / "changed"))
        assert session.generate_ids([], 5, eos=-1) == other.generate_ids([], 5, eos=-1), number


def test_snapshots_of_another_model_are_refused(
    session: native.Session, python: Session, short_chunk_onnx_bundle: Path, tmp_path: Path
) -> None:
    megalodon_export.load(short_chunk_onnx_bundle, runtime="eager").snapshot().save(tmp_path / "other")
    with unchanged(session, tmp_path):
        found = said(lambda: session.restore(tmp_path / "other"))
    assert found == said(lambda: python.restore(Snapshot.load(tmp_path / "other")))
    assert found == "the snapshot is of another model; restore it in a session of the model that it is of"


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device"])
def test_what_is_no_file_is_neither_read_nor_replaced(session: native.Session, tmp_path: Path, kind: str) -> None:
    path = odd_files(tmp_path)[kind]
    state = Snapshot({}, None, "")
    assert said(lambda: session.restore(path)) == said(lambda: Snapshot.load(path))
    assert said(lambda: session.save(path)) == said(lambda: state.save(path))
    assert not path.is_file()


def test_files_that_cannot_be_read_or_written_are_named(session: native.Session, tmp_path: Path) -> None:
    absent, state = tmp_path / "absent" / "state", Snapshot({}, None, "")
    assert said(lambda: session.restore(absent)) == said(lambda: Snapshot.load(absent))
    assert said(lambda: session.save(absent)) == said(lambda: state.save(absent))
    with pytest.raises(native.NativeError, match=f"^{absent} cannot be written: No such file") as caught:
        session.save(absent)
    assert caught.value.status == IO


def test_a_full_disk_leaves_the_old_file(session: native.Session, tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        found = said(lambda: session.save(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found == f"{path} cannot be written: File too large"
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_any_new_file(session: native.Session, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        session.save(tmp_path / "state")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o666 & ~umask
