"""Folders are written whole or not at all, by one process at a time. tests/soak/ kills exports at random points."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalodon_export.bundles.bundle import BundleError, read
from megalodon_export.bundles.writing import staged
from megalodon_export.model.conversion import staged_folder as staging_module
from megalodon_export.model.conversion.staged_folder import StagingError, staged_folder
from support.damaged_bundles import PROGRAMS, seal_small, write
from support.namespaces import as_process_one, in_mounts
from support.slow import slow_except


def siblings(destination: Path) -> list[str]:
    """The other names in the folder of a destination, without their random parts."""
    names = (path.name for path in destination.parent.iterdir() if path != destination)
    return sorted(re.sub(r"-[0-9a-f]{8}$", "", name) for name in names)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    write(tmp_path / "sound")
    return tmp_path / "sound"


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways in which a new folder takes the place of an old one."""
    if request.param == "two renames":
        monkeypatch.setattr(staging_module, "_exchange", lambda one, other: False)
    return request.param


@pytest.mark.usefixtures("swap")
def test_overwriting_replaces_the_whole_folder(sound: Path) -> None:
    with staged(sound) as staging:
        (staging / "only").write_bytes(b"new")
        seal_small(staging)
        assert read(sound).dtype == "float32"  # the old one stays until the end
    assert {"only", "aoti/programs.pt2"} & read(sound).files.keys() == {"only"}
    assert siblings(sound) == []


def test_parents_are_made_and_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    read(tmp_path / "a" / "b")
    read(tmp_path / "empty")
    assert siblings(tmp_path / "empty") == ["a"]


def test_a_link_to_a_bundle_stays_a_link(sound: Path) -> None:
    link = sound.parent / "current"
    link.symlink_to(sound)
    write(link, b"new")
    assert link.is_symlink()
    assert read(sound).files["aoti/programs.pt2"].size == 3


@pytest.mark.parametrize("place", ["sound", "new/folder"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_everything_as_it_was(sound: Path, place: str, kind: type[BaseException]) -> None:
    def export() -> None:
        with staged(sound.parent / place) as staging:
            (staging / "half").write_bytes(b"half")
            raise kind

    with pytest.raises(kind):
        export()
    assert read(sound).files["aoti/programs.pt2"].size == len(PROGRAMS)
    assert siblings(sound) == []


def test_a_failed_rename_restores_the_old_bundle(sound: Path, swap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".staging-" in self.name:
            raise OSError(errno.EIO, "no")
        return rename(self, target)

    def broken(one: Path, other: Path) -> bool:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(Path, "rename", fail)
    if swap == "exchange":
        monkeypatch.setattr(staging_module, "_exchange", broken)
    with pytest.raises(BundleError, match=r"sound cannot be written: no; choose another place"):
        write(sound, b"new")
    assert read(sound).files["aoti/programs.pt2"].size == len(PROGRAMS)
    assert siblings(sound) == []


# ---- places that are refused -----------------------------------------------------------------------------------------


def test_other_people_s_folders_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"")
    for name in ("photos", "file"):
        with pytest.raises(BundleError, match="left as it is"), staged(tmp_path / name):
            pytest.fail("entered")
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]


def test_overwriting_can_be_forbidden(sound: Path) -> None:
    with pytest.raises(BundleError, match="exists already"), staged(sound, overwrite=False):
        pytest.fail("entered")
    assert siblings(sound) == []


PLACES = {
    "below a file": ("file/bundle", r"bundle cannot be written: File exists \(.*file\); choose another place"),
    "a mount point": ("/", "/ is a mount point and cannot be replaced whole; choose a folder inside it"),
    "not UTF-8": ("\udcff", r"'.udcff' cannot be written: its name is not UTF-8; choose another one"),
    "a NUL": ("a\0b", r"'a.x00b' cannot be written: its name is not UTF-8; choose another one"),
    "nobody's home": ("~nobody-of-this-name/x", r"~nobody.* cannot be written: .*; give the path in full"),
    "too long": ("x" * 256, r"x cannot be written: File name too long \(.*\); choose another place"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    place, message = PLACES[kind]
    with pytest.raises(BundleError, match=message), staged(place):
        pytest.fail("entered")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


FILL = """
import sys
from megalodon_export.model.conversion.staged_folder import StagingError, staged_folder
try:
    with staged_folder(sys.argv[1]) as staging:
        (staging / "large").write_bytes(bytes(2**21))
except StagingError as error:
    print(error)
"""
# What a destination's disk is, by the command that mounts it.
DISKS = {
    "read-only": (
        "mount -t tmpfs -o ro disk {0}",
        r"{0}/new cannot be written: Read-only file system \(.*\); choose another place.",
    ),
    "full": (
        "mount -t tmpfs -o size=1m disk {0}",
        "{0}/new cannot be written: No space left on device; 0.00 GiB are free in {0}, .* Free some, choose another "
        "place, or set TMPDIR",
    ),
}


@pytest.mark.parametrize("kind", slow_except(DISKS, "read-only"))
def test_disks_that_take_no_more(tmp_path: Path, kind: str) -> None:
    mount, message = (text.format(tmp_path) for text in DISKS[kind])
    command = in_mounts(mount, sys.executable, "-c", FILL, tmp_path / "new")
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.match(message, printed), printed


# ---- one writer at a time --------------------------------------------------------------------------------------------

EXPORT = """
import sys, time
from megalodon_export.bundles.writing import staged
with staged(sys.argv[1]) as staging:
    (staging / "half").write_bytes(b"half")
    print("inside", flush=True)
    time.sleep(600)
"""
BUSY = r"sound is being written by another export or conversion \(process {} on .+\). Wait for its end, or choose"


@contextlib.contextmanager
def export_under_way(destination: Path, alone: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun to write a destination, killed in the end. `alone`: in a container, as process 1."""
    command = [sys.executable, "-c", EXPORT, str(destination)]
    command = as_process_one(*command) if alone else command
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "inside\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.stdout is not None
            process.stdout.read()  # until the process in the container has ended, too


def test_two_exports_to_one_place(sound: Path) -> None:
    with staged(sound) as staging:
        with pytest.raises(BundleError, match=BUSY.format(os.getpid())), staged(sound):
            pytest.fail("entered")
        seal_small(staging)
    assert "aoti/programs.pt2" not in read(sound).files


def test_a_conversion_and_an_export_to_one_place(tmp_path: Path) -> None:
    with (
        staged_folder(tmp_path / "sound"),
        pytest.raises(BundleError, match=BUSY.format(os.getpid())),
        staged(tmp_path / "sound"),
    ):
        pytest.fail("entered")


def test_a_killed_export_leaves_the_old_bundle(sound: Path) -> None:
    with export_under_way(sound) as process:
        with pytest.raises(BundleError, match=BUSY.format(process.pid)), staged(sound):
            pytest.fail("entered")
        assert siblings(sound) == [".sound.lock", ".sound.staging"]
    read(sound)
    assert siblings(sound) == [".sound.lock", ".sound.staging"]
    write(sound, b"new")
    assert read(sound).files["aoti/programs.pt2"].size == 3
    assert siblings(sound) == []


@pytest.mark.slow  # real containers; test_two_exports_to_one_place has processes
def test_two_containers_in_which_both_exports_are_process_1(sound: Path) -> None:
    with export_under_way(sound, alone=True):
        other = as_process_one(sys.executable, "-c", EXPORT, sound)
        refused = subprocess.run(other, capture_output=True, text=True, check=False)
        assert re.search(BUSY.format(1), refused.stderr), refused.stderr
        assert siblings(sound) == [".sound.lock", ".sound.staging"]  # the first one's are left alone
    read(sound)
    with staged(sound) as staging:
        assert siblings(sound) == [".sound.lock", ".sound.staging"]  # our own: the killed one's are gone
        seal_small(staging)
    assert siblings(sound) == []


def test_killed_between_the_renames(sound: Path) -> None:
    sound.rename(sound.with_name(".sound.old-0123abcd"))
    with pytest.raises(IsADirectoryError), staged(sound) as staging:
        staging.write_bytes(read(sound).dtype.encode())  # the old bundle is back in its place
    read(sound)
    assert siblings(sound) == []


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks(sound: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Two exports have folders of their own, and neither removes what may be in use."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(staging_module.fcntl, "flock", flock)
    (sound.parent / ".sound.staging-0123abcd").mkdir()
    with staged(sound) as first:
        (first / "file").write_bytes(b"first")
        write(sound, b"new")
        assert read(sound).files["aoti/programs.pt2"].size == 3
        seal_small(first)
    assert {"file", "aoti/programs.pt2"} & read(sound).files.keys() == {"file"}
    assert siblings(sound) == [".sound.staging"]


def test_a_lock_that_its_owner_removes_is_taken_anew(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner may remove the file after we have opened it, and another process make a new one."""
    lock, opened = sound.with_name(".sound.lock"), []
    flock = staging_module.fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        opened.append(descriptor)
        if len(opened) == 1:
            lock.unlink()

    monkeypatch.setattr(staging_module.fcntl, "flock", late)
    with staged_folder(sound):
        assert len(opened) == 2
        with pytest.raises(StagingError, match="being written"), staged_folder(sound):
            pytest.fail("entered")
