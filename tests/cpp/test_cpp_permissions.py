"""Files and folders of a bundle that may not be read: named, in the same words in Python and in C++."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.readme import ROOT

FILES = (
    *("config.json", "model.safetensors", "constants.safetensors", "tokenizer.json", "README.md"),
    *("aoti/model.pt2", "aoti/decode_layer.so", "prefill.onnx", "onnx_constants.safetensors"),
)
# Each case: the place that is locked, the permissions that it keeps, and the words of the refusal.
_NOT_READ = "{root} cannot be read: Permission denied ({root}{place}). Check its permissions."
PLACES = {
    "manifest": (
        "manifest.json",
        0,
        "{root}/manifest.json: a JSON object expected, found something unreadable (Permission denied). "
        "Copy the bundle again, or export it again.",
    ),
    "folder": (".", 0, _NOT_READ.format(root="{root}", place="/manifest.json")),
    "folder without names": (".", stat.S_IXUSR, _NOT_READ.format(root="{root}", place="")),
    "folder with names alone": (".", stat.S_IRUSR, _NOT_READ.format(root="{root}", place="/manifest.json")),
    "parent": ("..", 0, _NOT_READ.format(root="{root}", place="")),
    "programs": ("aoti", 0, _NOT_READ.format(root="{root}", place="/aoti")),
    "names of programs alone": ("aoti", stat.S_IRUSR, "aoti/decode_begin.so: cannot be read: Permission denied"),
    **{name: (name, 0, f"  {name}: cannot be read: Permission denied") for name in FILES},
}
# The good bundle is opened first, so that all modules and libraries are loaded before the process obeys permissions.
ASK = """
import json, sys
from pathlib import Path
import megalodon_export
from megalodon_export.bundles import bundle
from megalodon_export.bundles.parity import read_parity
from support import native
from support.permissions import obey_permissions

library = native.Library(Path(sys.argv[2]))
RUNTIMES = ("aoti", "eager", "onnx")
for runtime in RUNTIMES:
    list(megalodon_export.load(sys.argv[1], runtime, "cpu").generate_ids([1], 1))
native.Session(native.Engine(library, Path(sys.argv[1])))
obey_permissions()

def said(call):
    try:
        call()
    except (bundle.BundleError, native.NativeError) as error:
        return [type(error).__name__, str(error)]
    except Exception as error:
        return ["bare", repr(error)]
    return ["opened", ""]

for line in sys.stdin:
    folder = Path(line.strip())
    print(json.dumps([
        *(said(lambda: megalodon_export.load(folder, r, "cpu", check=c)) for c in (True, False) for r in RUNTIMES),
        *(said(lambda: native.Engine(library, folder, check_hashes=c)) for c in (True, False)),
        said(lambda: read_parity(folder, bundle.read(folder))),
    ]), flush=True)
"""


@pytest.fixture(scope="module")
def asked(both_bundle: Path, cpp_build: Path) -> Iterator[subprocess.Popen[str]]:
    """A process whose user may not do everything, and which answers what both libraries say about a bundle."""
    command = [sys.executable, "-c", ASK, str(both_bundle), str(cpp_build / "libmegalodon.so")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=ROOT / "tests", **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.stdin.close()


def answers(process: subprocess.Popen[str], folder: Path) -> list[tuple[str, str]]:
    """The answers about a bundle: three runtimes and C++, each with hashes and without, and the parity report."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{folder}\n")
    process.stdin.flush()
    return [tuple(one) for one in json.loads(process.stdout.readline())]


@pytest.fixture
def copy(both_bundle: Path, tmp_path: Path) -> Iterator[Path]:
    """A bundle in a folder of its own, both of which can be removed at the end."""
    folder = tmp_path / "parent" / "bundle"
    shutil.copytree(both_bundle, folder)
    (folder / "parity.json").unlink(missing_ok=True)
    yield folder
    for path in (folder.parent, folder, folder / "aoti"):
        path.chmod(0o700)


@pytest.mark.parametrize("name", PLACES)
def test_what_may_not_be_read_is_named(asked: subprocess.Popen[str], copy: Path, name: str) -> None:
    place, mode, message = PLACES[name]
    assert {kind for kind, _ in answers(asked, copy)} == {"opened"}
    (copy / place).chmod(mode)
    found = answers(asked, copy)
    assert [kind for kind, _ in found] == [*["BundleError"] * 6, *["NativeError"] * 2, "BundleError"]
    texts = {text for _, text in found}
    assert len(texts) == 1, texts  # the same words from all
    assert message.format(root=copy) in texts.pop()


def test_a_report_that_may_not_be_read_is_named(asked: subprocess.Popen[str], copy: Path, tiny_bundle: Path) -> None:
    """Those who do not read it open the bundle."""
    shutil.copy(tiny_bundle / "parity.json", copy)
    (copy / "parity.json").chmod(0)
    *others, (kind, text) = answers(asked, copy)
    assert {kind for kind, _ in others} == {"opened"}
    assert kind == "BundleError"
    assert "parity.json: a JSON object expected, found something unreadable (Permission denied)." in text
