"""Damages copies of a bundle in thousands of ways, and asks Python and the C++ library to open them.

    python tests/soak/damage_bundles.py BUNDLE build/libmegalodon.so --light       # 10,000 copies
    python tests/soak/damage_bundles.py BUNDLE build/libmegalodon.so --count 50    # a sample

Bits are flipped, files are cut off, grow, vanish, change places, appear, become links, pipes or folders, or cannot be
read. Each bundle must be refused by both, in the same words, with the name of the damaged file, and nothing of it may
have been loaded as code. A damaged parity.json must be refused by those who read it. The work is done in a process of
its own. `--light` first cuts the code out of the bundle's libraries, and seals it again: it is read in vain otherwise.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder tests, for soak and support

from megalodon_export.bundles import bundle
from megalodon_export.bundles.bundle import BundleError
from megalodon_export.bundles.parity import read_parity
from megalodon_export.bundles.strict_json import shown
from megalodon_export.bundles.writing import seal, update_parity
from soak.processes import parser, results, work
from support import native
from support.permissions import obey_permissions

BAD_BUNDLE, MANIFEST, COPY = 2, "manifest.json", "damaged"
OTHERS_WORDS = re.compile(r"(found something unreadable) \(.*?\)(?=\. Copy)", re.DOTALL)  # a JSON parser's
Damage = Callable[[Path, random.Random], object]


# ---- damage to one file, given its path ------------------------------------------------------------------------------


def flip(path: Path, chance: random.Random) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    """Bytes at the end are missing."""
    os.truncate(path, chance.choice([0, path.stat().st_size - 1, chance.randrange(path.stat().st_size)]))


def grow(path: Path, chance: random.Random) -> None:
    """Bytes at the end are too many."""
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.choice([1, 7, 4096])))


def erase(path: Path, chance: random.Random) -> None:
    """A block is zero, or another one if it was."""
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data))
    block = data[start : start + 512]
    data[start : start + 512] = bytes(len(block)) if any(block) else b"\1" * len(block)
    path.write_bytes(data)


def insert(path: Path, chance: random.Random) -> None:
    """Bytes are too many somewhere."""
    data, at = path.read_bytes(), chance.randrange(path.stat().st_size)
    path.write_bytes(data[:at] + chance.randbytes(3) + data[at:])


def vanish(path: Path, chance: random.Random) -> None:
    """The file is missing."""
    path.unlink()


def link(path: Path, chance: random.Random) -> None:
    """The file is a symbolic link, to its content elsewhere or to nothing."""
    elsewhere = next(parent for parent in path.parents if parent.name == COPY).with_name("elsewhere")
    if chance.random() < 0.7:
        shutil.copy(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


def replace_by_folder(path: Path, chance: random.Random) -> None:
    """A folder of the file's name."""
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path, chance: random.Random) -> None:
    """A pipe of the file's name."""
    path.unlink()
    os.mkfifo(path)


def lock(path: Path, chance: random.Random) -> None:
    """A file that nobody may read."""
    path.chmod(0)


IN_PLACE: tuple[Damage, ...] = (flip, flip, flip, cut, grow, erase, insert)
OTHERS: tuple[Damage, ...] = (vanish, link, replace_by_folder, replace_by_pipe, lock)


class Damager:
    """Makes damaged copies of a bundle, and asks both libraries about them."""

    def __init__(self, folder: Path, library: native.Library, scratch: Path) -> None:
        self.library, self.folder, self.scratch = library, folder, scratch
        self.names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        bundle.read(folder)

    def __call__(self, number: int) -> dict[str, Any]:
        """Make the bundle of that number; what was done to it, and what is wrong with the answers."""
        chance, copied = random.Random(number), self.scratch / COPY
        shutil.rmtree(self.scratch)
        shutil.copytree(self.folder, copied, copy_function=os.link)
        kind, name = self._damage(copied, chance)
        return {"kind": kind, "file": name, "fault": self._fault(copied, name)}

    def _damage(self, folder: Path, chance: random.Random) -> tuple[str, str]:
        name = chance.choice([*self.names, "manifest.json", "manifest.json", "parity.json"])
        if name != "parity.json" and chance.random() < 0.2:
            return self._add_or_exchange(folder, name, chance)
        path = folder / name
        shutil.copy2(path, folder / "copy")  # the file itself is the bundle's own
        (folder / "copy").replace(path)
        damage = chance.choice(IN_PLACE if name == "parity.json" or chance.random() < 0.7 else OTHERS)
        damage(path, chance)
        return damage.__name__, name

    def _add_or_exchange(self, folder: Path, name: str, chance: random.Random) -> tuple[str, str]:
        content = (folder / name).read_bytes()
        others = [one for one in self.names if one != "parity.json" and (folder / one).read_bytes() != content]
        other = chance.choice(others)
        if chance.random() < 0.5:
            new = Path(name).with_name(chance.choice(["x.so", ".hidden", "model.safetensors.bak", "a\nb", "\x1b[2J"]))
            shutil.copy(folder / other, folder / new)
            return "add", str(new)
        (folder / name).rename(folder / "x")
        (folder / other).rename(folder / name)
        (folder / "x").rename(folder / other)
        return "exchange", MANIFEST if MANIFEST in (name, other) else name

    def _fault(self, folder: Path, name: str) -> str | None:
        python = self._python(folder)
        if python is None or shown(name) not in python:
            return f"damage to {name}, and Python says: {python}"
        if name != "parity.json":  # which the C++ library does not read
            try:
                native.Engine(self.library, folder)
                return f"C++ opens it, with damage to {name}"
            except native.NativeError as error:
                words = [OTHERS_WORDS.sub(r"\1", text) for text in (python, str(error))]
                if error.status != BAD_BUNDLE or words[0] != words[1]:
                    return f"Python: {python}\nC++:    {error.status} {error}"
        loaded = str(folder) in Path("/proc/self/maps").read_text()
        return "native code was loaded" if loaded else None

    def _python(self, folder: Path) -> str | None:
        try:
            read_parity(folder, bundle.read(folder))
        except BundleError as error:
            return str(error)
        return None


def cut_code(folder: Path, light: Path) -> None:
    """A copy of a bundle whose libraries hold little but their labels, sealed anew."""
    manifest = bundle.read(folder)
    parity = read_parity(folder, manifest)
    shutil.copytree(folder, light)
    for path in (light / "aoti").iterdir():
        path.write_bytes(path.read_bytes()[-(1 << 14) :])
    sealed = seal(light, manifest)
    if parity is not None:
        update_parity(light, sealed, {key: value for key, value in parity.items() if key != "seal"})


def run(folder: Path, library: Path, count: int) -> Iterator[dict[str, Any]]:
    """What becomes of `count` damaged copies, as the items of `Damager`."""
    return results("soak.damage_bundles", folder, library, count)


def main() -> int:
    """Run, and print what was found; 1 if anything is wrong."""
    options = parser(__doc__, "copies (default 10,000)", 10**4)
    options.add_argument("--light", action="store_true", help="cut the code out of the libraries first")
    args = options.parse_args()
    with tempfile.TemporaryDirectory(dir=args.bundle.parent) as scratch:
        if args.first is not None:
            obey_permissions()
            damager = Damager(args.bundle, native.Library(args.library), Path(scratch))
            work(range(args.first, args.count), damager)
            return 0
        folder = args.bundle
        if args.light:
            folder = Path(scratch, "light")
            cut_code(args.bundle, folder)
        kinds: Counter[str] = Counter()
        faults = 0
        for number, found in enumerate(run(folder, args.library, args.count)):
            kinds[found.get("kind", "none")] += 1
            if found["fault"]:
                faults += 1
                print(f"{number} {found.get('kind')} {found.get('file')}: {found['fault']}", flush=True)
    print(f"{args.count} damaged bundles, {faults} faults: {dict(sorted(kinds.items()))}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
