"""Samples of the long runs in tests/soak: both languages refuse what is wrong with a bundle, in the same words."""

from __future__ import annotations

from pathlib import Path

from soak import damage_bundles, mutate_manifest


def test_edited_manifests(both_bundle: Path, cpp_build: Path) -> None:
    found = list(mutate_manifest.run(both_bundle, cpp_build / "libmegalodon.so", 120))
    assert [one for one in found if one["fault"]] == []
    accepted = {one["place"][0] for one in found if "refused" not in one["python"]}
    assert accepted <= {"created", "versions"}  # they change nothing that matters
    assert accepted
    assert len(found) == 120


def test_damaged_bundles(tiny_bundle: Path, cpp_build: Path) -> None:
    found = list(damage_bundles.run(tiny_bundle, cpp_build / "libmegalodon.so", 50))
    assert [one for one in found if one["fault"]] == []
    assert len({one["kind"] for one in found}) > 8
