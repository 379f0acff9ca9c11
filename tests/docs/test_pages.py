"""The links, anchors, paths and tests that the pages name exist; the figure reads in both modes; the style holds."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from msgspec.structs import fields

from megalodon_export.bundles.manifest import Manifest
from support.readme import PAGES, README, ROOT, prose

TESTS = ROOT / "tests"
DOCS = sorted((ROOT / "docs").glob("*.md"))
TABLES_OF_TESTS = [ROOT / "docs" / name for name in ("numerics.md", "onnx.md", "training.md", "transformers.md")]
MARKDOWN = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not {"node_modules", ".venv", "build"} & set(path.parts) and "artifacts/default-" not in str(path)
]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("path", TABLES_OF_TESTS, ids=lambda path: path.name)
def test_named_tests_exist(path: Path) -> None:
    """`test_file.py::test_name`, `test_file.py`, or `::test_name` of the file named before it."""
    file, named = "", 0
    for before, name in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", path.read_text(encoding="utf-8")):
        file = before or file
        if file and (before or name):
            (path_of_test,) = TESTS.rglob(file)
            text = path_of_test.read_text(encoding="utf-8")
            assert not name or f"def {name}(" in text, f"{file} has no {name}"
            named += 1
    assert named


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, a heading that is not there"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    """What looks like a path of this repository, between backticks; what exports write is not there."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for path in re.findall(r"`([\w.\-]+/[\w.\-/]*)`", prose(page)):
        if path.split("/")[0] in folders and not path.startswith("artifacts/default-"):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_every_key_of_the_manifest_is_explained() -> None:
    text = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    assert [field.name for field in fields(Manifest) if f"`{field.name}`" not in text] == []


def test_every_page_is_reached_from_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert [page.name for page in DOCS if f"(docs/{page.name})" not in text] == []


def paragraphs(page: Path) -> list[tuple[int, list[str]]]:
    """Line number and lines of every paragraph that is no table, list, heading, quote or code."""
    found: list[tuple[int, list[str]]] = []
    for number, line in enumerate(prose(page).splitlines(), 1):
        plain = line.strip() and not re.match(r"\s*([|#>!-]|\d+\.| {4})", line)
        if plain and found and found[-1][0] + len(found[-1][1]) == number:
            found[-1][1].append(line)
        elif plain:
            found.append((number, [line]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_style(page: Path) -> None:
    """Short lines (tables cannot be wrapped, but the README's fit), short paragraphs, sentences with a subject."""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        table = line.startswith("|") and page != README
        assert len(line) <= 120 or table, f"{page.name}:{number} has {len(line)} columns"
    for number, lines in paragraphs(page):
        assert len(lines) < 5, f"{page.name}:{number} is a paragraph of {len(lines)} lines"
        for sentence in re.split(r"(?<=[.:!?]) ", " ".join(lines)):
            assert not re.match(r"(Of|And|What|As `)\b", sentence), f"{page.name}:{number}: {sentence}"


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("figure", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_figures_read_in_both_modes(figure: Path) -> None:
    root = ElementTree.parse(figure).getroot()
    assert root.tag == f"{SVG}svg"
    for name in ("title", "desc"):
        element = root.find(f"{SVG}{name}")
        assert element is not None
        assert element.text
        assert element.get("id") in root.get("aria-labelledby", "").split()
    text = figure.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text or "currentColor" in text
    assert re.search(rf"\(docs/{figure.name}\)", README.read_text(encoding="utf-8"))
