"""Samples of the long runs in tests/soak: both languages refuse what is wrong with a bundle, in the same words."""

from __future__ import annotations

from pathlib import Path

from soak import damage_bundles, mutate_manifest


def test_edited_manifests(tiny_bundle: Path, cpp_build: Path) -> None:
    found = list(mutate_manifest.run(tiny_bundle, cpp_build / "libmegalodon.so", 120))
    assert [one for one in found if one["fault"]] == []
    refused = sum("refused" in one["python"] for one in found)
    assert 60 < refused < len(found) == 120  # edits of the date and of versions change nothing that matters


def test_damaged_bundles(tiny_bundle: Path, cpp_build: Path) -> None:
    found = list(damage_bundles.run(tiny_bundle, cpp_build / "libmegalodon.so", 50))
    assert [one for one in found if one["fault"]] == []
    assert len({one["kind"] for one in found}) > 8
