"""The C++ library refuses what the Python package refuses, in the same words, before native code is loaded."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest
import torch

import megalodon_export
from megalodon_export.bundles import bundle
from megalodon_export.bundles.bundle import BundleError
from megalodon_export.bundles.writing import staged
from megalodon_export.runtimes import RuntimeUnavailable
from support import native
from support.damaged_bundles import (
    EXPORT_DAMAGE,
    OTHER_MACHINES,
    SMALL_DAMAGE,
    edit,
    edit_config,
    flip,
    relabel,
    relabel_graphs,
    truncate,
    write,
)
from support.manifest_lies import CONFIG_LIES, GRAPH_LIES, LABEL_LIES, LIES, ONNX_LIES

BAD_BUNDLE, UNAVAILABLE = 2, 3
PROMPT = list(b"In the beginning")


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def refusal(library: native.Library, folder: Path) -> native.NativeError:
    """What the library says about a bundle; that it loaded none of its native code."""
    with pytest.raises(native.NativeError) as caught:
        native.Engine(library, folder)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    return caught.value


# What a JSON parser says about a text that is none is its own.
UNREADABLE = r"(?s)(found something unreadable) \(.*\)(?=\. Copy)"


def assert_same_refusal(library: native.Library, folder: Path) -> None:
    with pytest.raises(BundleError) as expected:
        bundle.read(folder)
    error = refusal(library, folder)
    assert error.status == BAD_BUNDLE
    assert re.sub(UNREADABLE, r"\1", str(error)) == re.sub(UNREADABLE, r"\1", str(expected.value))


@pytest.mark.parametrize("name", SMALL_DAMAGE)
def test_damage_is_refused_in_the_same_words(library: native.Library, tmp_path: Path, name: str) -> None:
    write(tmp_path / "sound")
    SMALL_DAMAGE[name][0](tmp_path / "sound")
    assert_same_refusal(library, tmp_path / "sound")


@pytest.mark.parametrize("name", EXPORT_DAMAGE)
def test_damaged_programs_are_never_loaded(library: native.Library, copy: Path, name: str) -> None:
    EXPORT_DAMAGE[name][0](copy)
    assert_same_refusal(library, copy)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a\\b", "./a", "a//b", "", ".", "a/"])
def test_paths_that_leave_the_bundle_are_refused(library: native.Library, tmp_path: Path, path: str) -> None:
    write(tmp_path / "sound")
    listed = {path: {"size": 0, "sha256": "0" * 64}}
    edit(tmp_path / "sound", lambda manifest: manifest["files"].update(listed))
    with pytest.raises(BundleError):
        bundle.read(tmp_path / "sound")
    assert "not a plain path inside the bundle" in str(refusal(library, tmp_path / "sound"))


def test_many_problems_and_no_folder(library: native.Library, tmp_path: Path) -> None:
    write(tmp_path / "sound")
    for i in range(13):
        (tmp_path / "sound" / f"z{i:02}").write_bytes(b"")
    for folder in (tmp_path / "sound", tmp_path / "absent", tmp_path / "sound" / "z00"):
        assert_same_refusal(library, folder)


@pytest.mark.parametrize("name", OTHER_MACHINES)
def test_other_machines_programs_are_refused(
    library: native.Library, copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    relabel(copy, OTHER_MACHINES[name][0])
    with pytest.raises(RuntimeUnavailable) as expected:
        megalodon_export.load(copy)
    error = refusal(library, copy)
    assert error.status == UNAVAILABLE
    if name == "device":  # another sentence in a library that was built without CUDA
        assert re.search(
            "are for CUDA, and this library was built without it|are for cuda, not|for x86_64, this GPU", str(error)
        )
    else:
        assert str(error) == str(expected.value)


@pytest.mark.parametrize("name", LIES)
def test_manifests_that_make_no_sense_are_refused(library: native.Library, copy: Path, name: str) -> None:
    edit(copy, LIES[name][0])
    assert_same_refusal(library, copy)


@pytest.mark.parametrize("name", LABEL_LIES)
def test_libraries_that_say_the_same_nonsense_are_refused(library: native.Library, copy: Path, name: str) -> None:
    relabel(copy, LABEL_LIES[name][0])
    assert_same_refusal(library, copy)


@pytest.mark.parametrize("name", [*ONNX_LIES, *GRAPH_LIES])
def test_onnx_programs_are_judged_alike(library: native.Library, both_bundle: Path, tmp_path: Path, name: str) -> None:
    """The library does not run them, but must not open what Python refuses."""
    native.Engine(library, both_bundle)
    copy = Path(shutil.copytree(both_bundle, tmp_path / "copy"))
    if name in ONNX_LIES:
        edit(copy, ONNX_LIES[name][0])
        assert_same_refusal(library, copy)
    if name in GRAPH_LIES:
        copy = Path(shutil.copytree(both_bundle, tmp_path / "other"))
        relabel_graphs(copy, GRAPH_LIES[name][0])
        assert re.search(GRAPH_LIES[name][1], str(refusal(library, copy)))


@pytest.mark.parametrize("name", CONFIG_LIES)
def test_configs_that_make_no_sense_are_refused(library: native.Library, copy: Path, name: str) -> None:
    values, message = CONFIG_LIES[name]
    edit_config(copy, values)
    error = refusal(library, copy)
    assert error.status == BAD_BUNDLE
    assert re.search(message, str(error))


def test_a_replaced_bundle_is_opened_anew(
    library: native.Library, tiny_bundle: Path, int8_bundle: Path, tmp_path: Path
) -> None:
    """New programs run on new weights at the old path, and what was opened before goes on as it was."""
    folder = tmp_path / "bundle"

    def put(source: Path) -> native.Session:
        with staged(folder) as staging:
            shutil.copytree(source, staging, dirs_exist_ok=True)
        return native.Session(native.Engine(library, folder))

    expected = [
        native.Session(native.Engine(library, one)).prefill(PROMPT, 257).tobytes() for one in (tiny_bundle, int8_bundle)
    ]
    assert expected[0] != expected[1]
    first = put(tiny_bundle)
    second = put(int8_bundle)
    assert [first.prefill(PROMPT, 257).tobytes(), second.prefill(PROMPT, 257).tobytes()] == expected
    del second
    assert put(tiny_bundle).prefill(PROMPT, 257).tobytes() == expected[0]
    assert put(int8_bundle).prefill(PROMPT, 257).tobytes() == expected[1]


def test_hashes_may_be_trusted_but_not_sizes(library: native.Library, copy: Path) -> None:
    flip(copy / "README.md")
    assert "README.md: sha256" in str(refusal(library, copy))
    native.Engine(library, copy, check_hashes=False)
    truncate(copy / "README.md")
    with pytest.raises(native.NativeError, match="bytes expected"):
        native.Engine(library, copy, check_hashes=False)


def test_programs_that_call_operators_by_name_are_for_python(library: native.Library, copy: Path) -> None:
    """Prefill in the form "fft" calls torch's FFT, which its library finds through Python."""
    operators = b"{}"
    (copy / "aoti" / "prefill_layer.json").write_bytes(operators)
    listed = {"size": len(operators), "sha256": hashlib.sha256(operators).hexdigest()}
    edit(copy, lambda manifest: manifest["files"].update({"aoti/prefill_layer.json": listed}))
    error = refusal(library, copy)
    assert error.status == UNAVAILABLE
    assert "aoti/prefill_layer calls operators of torch by name" in str(error)
    assert "--ema-prefill blocked" in str(error)
    assert megalodon_export.load(copy).runtime.limits.max_batch == 8
