"""The tests of the installed transformers, from its source distribution or from a checkout, as a package to import.

MEGALODON_TRANSFORMERS_SOURCE names a checkout of the installed version. Without it, pip downloads the source
distribution, which has the files of `tests/` but none of its folders: a mixin from a folder is an empty class then.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

SOURCE = "MEGALODON_TRANSFORMERS_SOURCE"
CLONE = (
    f"git clone --depth 1 --branch v{transformers.__version__} https://github.com/huggingface/transformers, and "
    f"{SOURCE}=transformers"
)
# Mixins that need a folder of `tests/`: the file that they need, the file that is replaced without it,
# and the empty classes that replace it.
MIXINS = {
    "generation": ("generation/test_utils.py", "generation/test_utils.py", ("GenerationTesterMixin",)),
    "exports": (
        *("exporters/test_export.py", "exporters/test_export.py"),
        ("ExportTesterMixin", "ExportGenerateTesterMixin"),
    ),
    "pipelines": ("pipelines/test_pipelines_text_generation.py", "test_pipeline_mixin.py", ("PipelineTesterMixin",)),
}
CONFIG = "utils/test_configuration_utils.py"  # likewise, for its one table
IGNORED = shutil.ignore_patterns("fixtures", "models", "__pycache__")


class NotToBeHad(Exception):
    """The tests cannot be had here; says why, and how they could be."""


def make_package(folder: Path) -> str:
    """Lay a folder, which is to be on sys.path, out like a checkout of transformers.

    A sentence about the mixins that could not be had; empty if all of them could.
    """
    source = os.environ.get(SOURCE)
    tests = Path(source) / "tests" if source else _download(folder / "download")
    if not (tests / "test_modeling_common.py").is_file():
        raise NotToBeHad(f"{tests} has no test_modeling_common.py; {SOURCE} names a checkout of transformers: {CLONE}")
    _check_version(tests.parent)
    package = folder / "tests"  # its files import each other by this name too
    shutil.copytree(tests, package, ignore=IGNORED, symlinks=True)
    missing = [name for name, (needed, *_) in MIXINS.items() if not (package / needed).is_file()]
    for _, replaced, classes in (MIXINS[name] for name in missing):
        _write(package / replaced, "".join(f"class {name}:\n    pass\n" for name in classes))
    if not (package / CONFIG).is_file():
        _write(package / CONFIG, "config_common_kwargs = {}\n")
    for path in (package, *(p for p in package.iterdir() if p.is_dir())):
        (path / "__init__.py").touch()
    if (tests.parent / "utils").is_dir():  # some tests import from it
        shutil.copytree(tests.parent / "utils", folder / "utils", ignore=IGNORED, symlinks=True)
    (folder / "src").mkdir()  # where the mixin for pipelines looks for the package
    (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    return _sentence(tests, missing)


def _sentence(tests: Path, missing: list[str]) -> str:
    if not missing:
        return ""
    names = ", ".join(missing)
    return f"transformers' mixins for {names} did not run, {tests} has none; with a checkout they do: {CLONE}"


def _check_version(root: Path) -> None:
    """The tests of one version do not run with another, which their many failures would not say."""
    init = root / "src" / "transformers" / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"', init.read_text(), re.MULTILINE) if init.is_file() else None
    if found and found[1] != transformers.__version__:
        raise NotToBeHad(f"{root} is transformers {found[1]}, and {transformers.__version__} is installed: {CLONE}")


def write_summary(folder: Path, classes: dict[str, str]) -> None:
    """The table in which the mixin for pipelines looks up the tokenizer class of each model class."""
    table = {name: {"tokenizer_classes": [tokenizer], "processor_classes": []} for name, tokenizer in classes.items()}
    _write(folder / "reports" / "tiny_model_summary.json", json.dumps(table))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)


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
            f"{SOURCE} may name a checkout: {CLONE}"
        ) from None
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as file:
        members = [m for m in file.getmembers() if m.name.split("/")[1:2] == ["tests"]]
        file.extractall(folder, members, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "tests"
