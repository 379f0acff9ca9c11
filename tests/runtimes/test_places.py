"""Places on disk: names with any characters, temporary folders that cannot be used, disks that nothing may run from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megalodon_export
from megalodon_export.bundles import bundle
from megalodon_export.exporters import scratch
from megalodon_export.exporters.scratch import scratch_folder
from megalodon_export.exporters.workers import CompileError
from megalodon_export.model.conversion import convert_upstream
from support import native
from support.golden_data import write_checkpoint
from support.namespaces import in_mounts
from support.slow import slow_except

NAMES = {
    **{"space": "my model", "apostrophe": "it's", "quote": 'a"b', "dollar": "$HOME", "backslash": "a\\b"},
    **{"unicode": "Übung-漢", "dash": "-rf", "newline": "two\nlines", "star": "*;&|", "percent": "100%s{x}"},
}
ALL = "-all \"of'them$HOME\\漢\nat *once"
named = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())


def copy(source: Path, destination: Path) -> Path:
    """The same bundle elsewhere, without a copy of its bytes."""
    return shutil.copytree(source, destination, copy_function=os.link)


# ---- names -----------------------------------------------------------------------------------------------------------


@named
@pytest.mark.parametrize(
    ("runtime", "fixture"), [("aoti", "tiny_bundle"), ("onnx", "tiny_onnx_bundle"), ("eager", "tiny_bundle")]
)
def test_a_bundle_is_loaded_from_a_folder_with_any_name(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    runtime: str,
    fixture: str,
) -> None:
    made = request.getfixturevalue(fixture)
    copy(made, tmp_path / name / name)
    monkeypatch.chdir(tmp_path / name)
    texts = [megalodon_export.load(folder, runtime, "cpu").generate_ids([1], 4) for folder in (name, made)]
    assert list(texts[0]) == list(texts[1])


@named
def test_the_library_loads_a_bundle_from_a_folder_with_any_name(
    library: native.Library, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    copy(tiny_bundle, tmp_path / name / name)
    monkeypatch.chdir(tmp_path / name)
    texts = [
        native.Session(native.Engine(library, folder)).generate_ids([1], 4) for folder in (Path(name), tiny_bundle)
    ]
    assert texts[0] == texts[1]


@named
def test_a_checkpoint_is_converted_in_a_folder_with_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    convert_upstream(write_checkpoint("model_small_plain", Path(name)), Path(f"{name}.made"))
    assert sorted(path.name for path in Path().iterdir()) == sorted([name, f"{name}.made"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aoti", "onnx"])
def test_an_export_where_all_names_are_odd(
    command: Callable[..., subprocess.Popen[str]], checkpoints: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Slow, because it is an export: the checkpoint, the destination, the current folder and TMPDIR have odd names."""
    folder = tmp_path / ALL
    copy(checkpoints["tiny"], folder / ALL)
    (folder / "tmp").mkdir()
    options = (f"--checkpoint={ALL}", f"--out={ALL}.made", "--max-batch", 2)
    device = ("--device", "cpu") if kind == "aoti" else ()
    environment = {"TMPDIR": str(folder / "tmp")}
    with command(kind, *options, *device, cwd=folder, env=environment) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert bundle.read(folder / f"{ALL}.made").programs.by_runtime().keys() == {kind}
    assert sorted(path.name for path in folder.iterdir()) == sorted([ALL, f"{ALL}.made", "tmp"])


# ---- folders for compilers -------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets TMPDIR and TORCHINDUCTOR_CACHE_DIR as they would be when a process begins."""

    def set_to(temporary: Path | None, cache: Path | None = None) -> None:
        monkeypatch.setattr(tempfile, "tempdir", None)
        for name, path in (("TMPDIR", temporary), ("TORCHINDUCTOR_CACHE_DIR", cache)):
            monkeypatch.delenv(name, raising=False)
            if path is not None:
                monkeypatch.setenv(name, str(path))

    return set_to


@pytest.mark.parametrize("name", [name for name in NAMES.values() if name != NAMES["dash"]])  # that one is plain
@pytest.mark.parametrize("odd", ["destination", "TMPDIR", "cache", "all"])
def test_compilers_get_plain_paths(environment: Callable[..., None], tmp_path: Path, name: str, odd: str) -> None:
    folders = {what: tmp_path / what / (name if odd in (what, "all") else "plain") for what in ("TMPDIR", "cache")}
    destination = tmp_path / (name if odd in ("destination", "all") else "plain")
    for folder in (destination, *folders.values()):
        folder.mkdir(parents=True)
    environment(folders["TMPDIR"], folders["cache"])
    with scratch_folder(destination) as made:
        places = [str(made.folder), *made.environment.values()]
        assert all(scratch._PLAIN.fullmatch(place) for place in places)
        assert (destination in made.folder.parents) == (odd not in ("destination", "all"))
        expected = {"destination": set(), "cache": {"TORCHINDUCTOR_CACHE_DIR"}}
        assert made.environment.keys() == expected.get(odd, {"TMPDIR", "TORCHINDUCTOR_CACHE_DIR"})
    assert not made.folder.exists()


def test_a_tmpdir_that_does_not_exist_is_not_needed(environment: Callable[..., None], tmp_path: Path) -> None:
    environment(tmp_path / "missing")
    with scratch_folder(tmp_path) as made:
        assert made.environment == {}  # compilers take /tmp, as Python does


def test_no_temporary_folder_is_refused_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scratch, "flaw_of", lambda folder: "cannot be written")
    with (
        pytest.raises(CompileError, match="no temporary folder for the compilers: set TMPDIR"),
        scratch_folder(tmp_path),
    ):
        pytest.fail("entered")


# ---- disks that nothing may run from, or that cannot be written ------------------------------------------------------

RUN = """
import json, sys
from pathlib import Path
notes, found = [], {}
folder, action = Path(sys.argv[1]), sys.argv[2]
try:
    if action == "load":
        import megalodon_export
        session = megalodon_export.load(folder, "aoti")
        found["text"] = list(session.generate_ids([1], 4))
        lines = Path("/proc/self/maps").read_text().splitlines()
        found["libraries"] = sorted({line.split(maxsplit=5)[5] for line in lines if "decode_one_layer" in line})
    elif action == "verify":
        from megalodon_export.bundles.verify import verify
        found["results"] = len(verify(folder, ["aoti"], notes.append)["results"])
    else:
        from megalodon_export.exporters.scratch import scratch_folder
        with scratch_folder(folder) as made:
            found["environment"] = sorted(made.environment)
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print(json.dumps({**found, "notes": notes}))
"""


def run(folder: Path, action: str, mounts: str, **environment: str) -> dict[str, Any]:
    command = in_mounts(mounts, sys.executable, "-c", RUN, folder, action)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def remounted(folder: Path, options: str) -> str:
    return f"mount --bind '{folder}' '{folder}'; mount -o 'remount,bind,{options}' '{folder}'"


# What the disk of the temporary folder is, as options of mount.
TEMPORARY = {"full": "size=4k", "noexec": "noexec", "read-only": "ro"}


def temporary(folder: Path, kind: str) -> str:
    return f"mkdir '{folder}/tmp'; mount -t tmpfs -o {TEMPORARY[kind]} disk '{folder}/tmp'"


@pytest.mark.parametrize("kind", slow_except(TEMPORARY, "noexec"))
@pytest.mark.parametrize("root", slow_except(("a root that can be written", "a read-only root"), "a read-only root"))
def test_a_bundle_is_loaded_without_copies(tiny_bundle: Path, tmp_path: Path, kind: str, root: str) -> None:
    """Nothing is unpacked. Some temporary folder is there all the same: dill, which torch imports, may ask for it."""
    mounts = temporary(tmp_path, kind)
    if root == "a read-only root":
        mounts += "; mount -o remount,bind,ro /"
        if kind == "read-only":
            mounts += "; mount -t tmpfs -o noexec disk /var/tmp"
    found = run(tiny_bundle, "load", mounts, TMPDIR=str(tmp_path / "tmp"))
    assert len(found["text"]) == 4
    assert found["libraries"] == [str(tiny_bundle / "aoti" / "decode_one_layer.so")]


def test_a_bundle_on_a_disk_that_nothing_may_run_from(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = copy(tiny_bundle, tmp_path / "bundle")
    error = run(folder, "load", remounted(folder, "noexec"))["error"]
    assert error == (
        f"RuntimeUnavailable: {folder}/aoti/prefill_begin.so cannot be loaded: {folder}/aoti is on a file system "
        "mounted noexec; copy the bundle to one that programs may run from"
    )


def test_an_export_to_a_disk_that_nothing_may_run_from(tmp_path: Path) -> None:
    error = run(tmp_path, "scratch", remounted(tmp_path, "noexec"))["error"]
    assert "is on a file system mounted noexec, and the programs could not be run from there; choose another" in error


@pytest.mark.parametrize("kind", ["noexec", "read-only"])
def test_compilers_get_a_temporary_folder_that_can_be_used(tmp_path: Path, kind: str) -> None:
    found = run(tmp_path, "scratch", temporary(tmp_path, kind), TMPDIR=str(tmp_path / "tmp"))
    # Python itself passes over a temporary folder that it cannot write.
    assert found["environment"] == (["TMPDIR", "TORCHINDUCTOR_CACHE_DIR"] if kind == "noexec" else [])


def test_a_read_only_bundle_is_verified(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = copy(tiny_bundle, tmp_path / "bundle")
    found = run(folder, "verify", remounted(folder, "ro"))
    assert found["results"] == 7
    assert found["notes"][-1].startswith(f"{folder}/parity.json cannot be written: Read-only file system")
