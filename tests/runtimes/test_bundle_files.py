"""Bundles on disk: refused when anything about them has changed. test_staged_folders.py has how they are written."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from megalodon_export.bundles import bundle
from megalodon_export.bundles.bundle import BundleError, read
from megalodon_export.bundles.parity import read_parity
from megalodon_export.bundles.writing import seal, update_parity
from support.damaged_bundles import PARITY_DAMAGE, PROGRAMS, SMALL_DAMAGE, edit, flip, seal_small, small_manifest, write


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    write(tmp_path / "sound")
    return tmp_path / "sound"


def test_round_trip(sound: Path) -> None:
    manifest = read(sound)
    assert manifest.schema_version == bundle.SCHEMA_VERSION
    assert manifest.dtype == "float32"
    names = ["aoti/programs.pt2", "config.json", "constants.safetensors", "model.safetensors"]
    assert list(manifest.files) == names
    assert manifest.files["aoti/programs.pt2"].size == len(PROGRAMS)
    assert manifest.model_id == hashlib.sha256((sound / "model.safetensors").read_bytes()).hexdigest()


def test_seal_returns_what_it_writes_and_leaves_its_argument(tmp_path: Path) -> None:
    sealed = seal_small(tmp_path)
    assert sealed == read(tmp_path)
    given = small_manifest()
    assert seal(tmp_path, given).files == sealed.files
    assert (given.files, given.model_id) == ({}, "")


PARITY = {
    "measured": "2026-11-27T20:00:00+00:00",
    "dtype": "float32",
    "against": "eager",
    "results": [
        {"runtime": "aoti", "case": "a", "logits": 1e-6, "cache": 0.0, "same_greedy_token": 1.0, "bound": 1e-4}
    ],
}


def test_parity_changes_after_the_export(sound: Path) -> None:
    manifest = read(sound)
    assert read_parity(sound, manifest) is None
    update_parity(sound, manifest, PARITY)
    assert read(sound) == manifest
    written = update_parity(sound, manifest, PARITY | {"against": "another"})
    assert written["manifest"] == manifest.seal
    assert read_parity(sound, manifest) == written == json.loads((sound / "parity.json").read_text())
    (sound / ".parity.json.4711").write_text("{")  # killed inside update_parity
    assert "parity.json" not in read(sound).files


def test_parity_needs_a_bundle_and_json(tmp_path: Path, sound: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(BundleError, match="not a bundle"):
        update_parity(tmp_path / "other", small_manifest(), {})
    with pytest.raises(BundleError, match="finite"):
        update_parity(sound, small_manifest(), {"decode": float("nan")})
    assert not (sound / "parity.json").exists()


@pytest.mark.parametrize("name", PARITY_DAMAGE)
def test_a_damaged_parity_report_is_named(sound: Path, name: str) -> None:
    damage, message = PARITY_DAMAGE[name]
    manifest = read(sound)
    update_parity(sound, manifest, PARITY)
    damage(sound)
    with pytest.raises(BundleError, match=message) as caught:
        read_parity(sound, read(sound))
    assert str(caught.value).startswith(str(sound / "parity.json"))
    assert str(caught.value).endswith("delete the report and run `megalodon-export verify`.")


def test_seal_refuses_links_and_values_that_are_not_json(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="JSON"):
        seal(tmp_path, small_manifest().replace(config={"path": tmp_path}))
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(BundleError, match=r"b: .*symbolic link"):
        seal(tmp_path, small_manifest())
    assert not (tmp_path / "manifest.json").exists()


# ------------------------------------------------------------------------------------------------- damaged bundles


@pytest.mark.parametrize("name", SMALL_DAMAGE)
def test_damage_is_refused(sound: Path, name: str) -> None:
    damage, message = SMALL_DAMAGE[name]
    damage(sound)
    with pytest.raises(BundleError, match=message) as caught:
        read(sound)
    assert str(sound) in str(caught.value)


@pytest.mark.parametrize(
    "path", ["../outside", "aoti/../../outside", "/etc/passwd", "a\\..\\b", "./a", "a//b", "", "."]
)
def test_paths_that_leave_the_bundle_are_refused(sound: Path, path: str) -> None:
    (sound.parent / "outside").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    edit(sound, lambda manifest: manifest["files"].update({path: {"size": 0, "sha256": empty}}))
    with pytest.raises(BundleError, match="not a plain path inside the bundle"):
        read(sound)


def test_sizes_alone_miss_a_flipped_byte_only(sound: Path) -> None:
    flip(sound / "aoti/programs.pt2")
    read(sound, check="sizes")
    os.truncate(sound / "aoti/programs.pt2", 9)
    with pytest.raises(BundleError, match="9 found"):
        read(sound, check="sizes")


def test_all_problems_are_listed_up_to_ten(sound: Path) -> None:
    flip(sound / "model.safetensors")
    (sound / "aoti/programs.pt2").unlink()
    for i in range(12):
        (sound / f"z{i:02}").write_bytes(b"")
    with pytest.raises(BundleError) as caught:
        read(sound)
    text = str(caught.value)
    for part in ("programs.pt2: a file", "safetensors: sha256", "z07", "and 4 more", "export it again"):
        assert part in text
    assert "z08" not in text


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nothing found"):
        read(tmp_path / "absent")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BundleError, match="a file found"):
        read(tmp_path / "file")
    with pytest.raises(ValueError, match="expected"):
        read(tmp_path, check="none")  # type: ignore[arg-type]
