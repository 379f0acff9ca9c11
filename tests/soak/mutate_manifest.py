"""Edits every place of a bundle's manifest, seals it again, and asks Python and the C++ library what they make of it.

    python tests/soak/mutate_manifest.py BUNDLE build/libmegalodon.so              # all edits, some ten minutes
    python tests/soak/mutate_manifest.py BUNDLE build/libmegalodon.so --count 120  # a sample

An edit deletes a value, gives it another type, a number at the end of a range, another name, or one key more. Both must
accept it and generate the text that the bundle generates without it, or both must refuse it, in the same words where
the words are this package's. Python generates in every runtime of the bundle, one of which must be AOTInductor. Nothing
may crash, hang or raise another exception. The edits run in a process of their own.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder tests, for soak and support

import torch

import megalodon_export
from megalodon_export.bundles import bundle
from megalodon_export.bundles.bundle import BundleError
from megalodon_export.bundles.sealing import sealed_json
from megalodon_export.runtimes import RuntimeUnavailable
from soak.processes import parser, results, work
from support import native

PROMPT, TOKENS = [5, 80, 200, 7], 12
NUMBERS = (0, 1, -1, 2, 31, 33, 10**7, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 0.5, 1e300)
OTHER_TYPES: tuple[Any, ...] = (None, True, 3, 1.5, "x", [], {}, [1], {"a": 1})
DELETED = object()
# Where the words are those of msgspec, of a JSON parser or of safetensors.
OTHERS_WORDS = re.compile(r" - at `\$|something unreadable|is no safetensors file")

Path_ = tuple[str | int, ...]
Edit = tuple[Path_, Any]  # a place and its new value, or DELETED


def edits(manifest: dict[str, Any]) -> list[Edit]:
    """Every edit of every place but the seal, which is made again after each edit, in the order of the file."""
    manifest = {key: value for key, value in manifest.items() if key != "seal"}
    names = sorted({value for _, value in _places(manifest, ()) if isinstance(value, str)})
    return [
        (path, new)
        for path, value in _places(manifest, ())
        for new in _variants(path, value, names)
        if new is DELETED or (json.dumps(new) != json.dumps(value) and not _same_number(new, value))
    ]


def _same_number(one: Any, other: Any) -> bool:
    """Whether both are the same number, as 0 and 0.0 are."""
    return {type(one), type(other)} <= {int, float} and one == other


def _places(value: Any, path: Path_) -> Iterator[tuple[Path_, Any]]:
    if path:
        yield path, value
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _variants(path: Path_, value: Any, names: list[str]) -> Iterator[Any]:
    yield DELETED
    yield from (other for other in OTHER_TYPES if type(other) is not type(value))
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from NUMBERS
        yield from (value + 1, value - 1, value * 2, float(value))
    elif isinstance(value, str):
        other = random.Random(str(path))
        yield from ("", value + "x", value.upper(), "\u202e" + value, "a" * 10**4, "../" + value)
        yield from other.sample(names, 3)
    elif isinstance(value, dict):
        yield {**value, "extra": 1}
        yield dict(list(value.items())[1:])
    elif isinstance(value, list):
        yield [*value, *value[-1:]]
        yield value[:-1]
        yield value[::-1]


def apply(manifest: dict[str, Any], edit: Edit) -> dict[str, Any]:
    """A copy of a manifest with one edit."""
    path, new = edit
    found = copy.deepcopy(manifest)
    place: Any = found
    for key in path[:-1]:
        place = place[key]
    if new is DELETED:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return found


def sample(everything: list[Edit], count: int) -> list[Edit]:
    """`count` of the edits by chance, always the same: from the keys of the first level in turn, while each lasts."""
    chance = random.Random(16)
    chance.shuffle(everything)
    turns: Counter[str | int] = Counter()
    ranked = []
    for edit in everything:
        ranked.append((turns[edit[0][0]], edit))
        turns[edit[0][0]] += 1
    return [edit for _, edit in sorted(ranked, key=lambda one: one[0])[:count]]


# ---- what both make of an edit ---------------------------------------------------------------------------------------


class Judge:
    """Both libraries on a copy of a bundle whose files are links to the bundle's, but for the manifest."""

    def __init__(self, folder: Path, library: native.Library, copied: Path) -> None:
        self.library, self.folder = library, copied
        shutil.copytree(folder, copied, copy_function=os.link)
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.text = self.python()
        assert self.text == self.cpp()
        assert "ids" in self.text

    def __call__(self, edit: Edit) -> dict[str, Any]:
        """What Python and C++ say about an edited manifest, and what is wrong with that."""
        path = self.folder / "manifest.json"
        path.unlink()
        path.write_bytes(sealed_json(apply(self.manifest, edit))[0])
        found = {"place": list(edit[0]), "python": self.python(), "cpp": self.cpp()}
        return {**found, "fault": self._fault(found["python"], found["cpp"])}

    def _fault(self, python: dict[str, Any], cpp: dict[str, Any]) -> str | None:
        if "refused" not in python or "refused" not in cpp:
            return None if python == cpp == self.text else f"Python: {python}, C++: {cpp}"
        if python == cpp or OTHERS_WORDS.search(python["refused"]):
            return None
        return f"Python: {python['refused']}\nC++:    {cpp['refused']}"

    def python(self) -> dict[str, Any]:
        """The ids that Python generates, or its refusal. The ids by runtime, if they are not the same in all."""
        try:
            manifest = bundle.read(self.folder)  # most edits end here
            runtimes = {"aoti", *manifest.programs.by_runtime()}
            sessions = {name: megalodon_export.load(self.folder, name, "cpu", check=False) for name in sorted(runtimes)}
        except (BundleError, RuntimeUnavailable) as error:
            return {"refused": str(error)}
        ids = {name: list(one.generate_ids(PROMPT, TOKENS, eos_token_id=None)) for name, one in sessions.items()}
        return {"ids": ids["aoti"] if all(one == ids["aoti"] for one in ids.values()) else ids}

    def cpp(self) -> dict[str, Any]:
        """The ids that the C++ library generates, or its refusal."""
        try:
            session = native.Session(native.Engine(self.library, self.folder))
        except native.NativeError as error:
            return {"refused": str(error)}
        return {"ids": session.generate_ids(PROMPT, TOKENS, eos=-1)}


def run(folder: Path, library: Path, count: int) -> Iterator[dict[str, Any]]:
    """What becomes of `count` edits, as the items of `Judge`."""
    return results("soak.mutate_manifest", folder, library, count)


def main() -> int:
    """Run, and print what was found; 1 if anything is wrong."""
    args = parser(__doc__, "edits (default: all)", 10**9).parse_args()
    everything = edits(json.loads((args.bundle / "manifest.json").read_text()))
    count = min(args.count, len(everything))
    if args.first is not None:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(dir=args.bundle.parent) as scratch:
            judge = Judge(args.bundle, native.Library(args.library), Path(scratch, "bundle"))
            work(sample(everything, count)[args.first :], judge)
        return 0
    verdicts: Counter[str] = Counter()
    for number, found in enumerate(run(args.bundle, args.library, count)):
        verdicts["fault" if found["fault"] else "refused" if "refused" in found["python"] else "accepted"] += 1
        if found["fault"]:
            print(f"{number} {found.get('place')}: {found['fault']}")
    print(f"{count} edits of {len(everything)}: {dict(verdicts)}")
    return 1 if verdicts["fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
