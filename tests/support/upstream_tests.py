"""The tests of the installed transformers, from its source distribution or from a checkout, as a package to import.

MEGALODON_TRANSFORMERS_SOURCE names a checkout of the installed version. Without it, pip downloads the source
distribution, which has the files of `tests/` but none of its folders: a mixin from a folder is an empty class then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

PACKAGE = "transformers_tests"  # not "tests", which could be this project's
SOURCE = "MEGALODON_TRANSFORMERS_SOURCE"
# Folders that the files of `tests/` import from.
EMPTY = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
IGNORED = shutil.ignore_patterns("fixtures", "__pycache__")


class NotToBeHad(Exception):
    """The tests cannot be had here; says why, and how they could be."""


def make_package(folder: Path) -> None:
    """Make PACKAGE in a folder, which is to be on sys.path."""
    source = os.environ.get(SOURCE)
    tests = Path(source) / "tests" if source else _download(folder / "download")
    if not (tests / "test_modeling_common.py").is_file():
        raise NotToBeHad(f"{tests} has no test_modeling_common.py; {SOURCE} names a checkout of transformers")
    shutil.copytree(tests, folder / PACKAGE, ignore=IGNORED, symlinks=True)
    for name, text in EMPTY.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(text)
    for path in (folder / PACKAGE, *(p for p in (folder / PACKAGE).iterdir() if p.is_dir())):
        (path / "__init__.py").touch()


def _download(folder: Path) -> Path:
    """The `tests/` of the source distribution of the installed version."""
    version = transformers.__version__
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "transformers", "--dest", str(folder))
    command = [sys.executable, "-m", "pip", "download", *options, f"transformers=={version}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NotToBeHad(
            f"pip cannot download the source distribution of transformers {version} ({said[-1] if said else error}); "
            f"{SOURCE} may name a checkout"
        ) from None
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as file:
        members = [m for m in file.getmembers() if m.name.split("/")[1:2] == ["tests"]]
        file.extractall(folder, members, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "tests"
