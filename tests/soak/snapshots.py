"""Damage a snapshot in thousands of ways, and restore each one in Python and in C++.

Every node of the header is deleted, renamed, and given other types and boundary numbers, with the checksum made right
again and without. Values of tensors are set to boundary values. Bits are flipped, and bytes are cut off and added.

Both sides must say the same words, or go on from the same state. A refused snapshot must leave both sessions as they
were. The work is done in a process of its own, so a crash or a hang is found and named.

    python tests/soak/snapshots.py BUNDLE build/libmegalodon.so             # about 7,000 edits, some two minutes
    python tests/soak/snapshots.py BUNDLE build/libmegalodon.so --edits 300  # a sample
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import megalodon_export
from megalodon_export import Session, Snapshot
from support import native
from support.snapshot_files import SnapshotFile

INVALID = 1
PROMPT = list(b"In the beginning God created the heaven and the earth. And the earth was")
SCALARS: list[Any] = [None, True, "", "x", "F64", "BF16", "I32", -1, 0, 1, 2, 63, 64, 2**31, 2**53, 2**62, 2**63, 2**64]
OTHERS: list[Any] = [*SCALARS, 10**30, -(2**63), 1.5, 1e308, [], [1], [[0]], {}, {"x": 1}]
TEXTS = [
    *("null", "NULL", "0", "00", "-0", "1", "256", "257", "1e1", "0x1", " 1", "1 ", "1\n", "١", "9" * 18, "9" * 19, ""),
    *(str(2**53), str(2**63), str(2**64), "megalodon-export snapshot 1", "megalodon-export snapshot 3", "0" * 64),
]
FLOATS = [0x7FC00000, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001, 0x80000001, 0x7F7FFFFF, 0xBF800000]
POSITIONS = [-(2**63), -1, 0, 1, 71, 72, 73, 136, 2**31, 2**53 - 56, 2**53 - 1, 2**53, 2**53 + 8, 2**62 + 8, 2**63 - 1]

Edit = tuple[str, bytes]


# ---- the edits -------------------------------------------------------------------------------------------------------


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    """The bytes of a file."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def sealed(content: bytes) -> bytes | None:
    """The file with the right checksum, or None if it has too little of a snapshot to have one."""
    try:
        checksum = SnapshotFile.parse(content).seal().metadata["sha256"]
        header, data = split(content)
        header["__metadata__"]["sha256"] = checksum
        return join(header, data)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from nodes(child, (*path, key))


def header_edits(content: bytes) -> Iterator[Edit]:
    """Every node of the header deleted, renamed, doubled, and set to other values."""
    whole, data = split(content)

    def changed(path: tuple[Any, ...], change: Callable[[Any, Any], object]) -> bytes:
        header = copy.deepcopy(whole)
        parent = header
        for key in path[:-1]:
            parent = parent[key]
        change(parent, path[-1])
        return join(header, data)

    for path in nodes(whole):
        where = ".".join(map(str, path))
        yield f"{where} deleted", changed(path, lambda parent, key: parent.pop(key))
        for value in [*OTHERS, *(TEXTS if path[0] == "__metadata__" else ())]:
            yield f"{where} = {value!r}", changed(path, lambda parent, key, v=value: parent.__setitem__(key, v))
        if isinstance(path[-1], str):
            for name in (path[-1] + "x", "", "final.position", "layers.9.key", "dtype", "format", "'", "é", "\x1b[0m"):
                rename = lambda parent, key, n=name: parent.__setitem__(n, parent.pop(key))  # noqa: E731
                yield f"{where} renamed {name!r}", changed(path, rename)
        else:
            yield f"{where} twice", changed(path, lambda parent, key: parent.insert(key, parent[key]))


def value_edits(content: bytes) -> Iterator[Edit]:
    """The first and the last element of every tensor set to boundary values."""
    for name, tensor in SnapshotFile.parse(content).tensors.items():
        kind, values = ("<q", POSITIONS) if tensor.dtype == "I64" else ("<I", FLOATS)
        for value in values:
            for end in ("first", "last"):
                file = SnapshotFile.parse(content)
                piece, old = struct.pack(kind, value), file.tensors[name].data
                file.tensors[name].data = (
                    piece + old[len(piece) :] if end == "first" else old[: len(old) - len(piece)] + piece
                )
                yield f"{end} of {name} = {value:#x}", file.content()


def byte_edits(content: bytes, count: int, chance: random.Random) -> Iterator[Edit]:
    """Flipped bits, bytes cut off, added and moved, at random places."""
    begin = len(content) - len(split(content)[1])
    for _ in range(count):
        kind = chance.choice(["header", "data", "data", "cut", "add", "insert", "length"])
        at = chance.randrange(begin) if kind == "header" else chance.randrange(begin, len(content))
        if kind in ("header", "data"):
            bit = 1 << chance.randrange(8)
            yield f"bit {bit} of byte {at} ({kind})", content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        elif kind == "cut":
            size = chance.randrange(len(content))
            yield f"cut to {size} bytes", content[:size]
        elif kind == "add":
            yield "bytes added", content + bytes(chance.randrange(1, 20))
        elif kind == "insert":
            yield f"a byte inserted at {at}", content[:at] + b"\0" + content[at:]
        else:
            length = chance.choice([0, 1, 7, begin - 9, begin - 7, 10**8, 2**31, 2**63, 2**64 - 1])
            yield f"a header of {length} bytes", struct.pack("<Q", length) + content[8:]


def all_edits(content: bytes, seed: int) -> list[Edit]:
    """Every edit with the checksum as it was, and with the right one where that is another file."""
    chance = random.Random(seed)
    edits = [*header_edits(content), *value_edits(content), *byte_edits(content, 1500, chance)]
    for name, changed in [*edits]:
        again = sealed(changed)
        if again is not None and again != changed:
            edits.append((f"{name}, sealed", again))
    chance.shuffle(edits)
    return edits


# ---- both sides ------------------------------------------------------------------------------------------------------


class Sides:
    """A session in Python and one in C++, at the same point of a stream."""

    def __init__(self, bundle: Path, library: Path, folder: Path) -> None:
        self.python: Session = megalodon_export.load(bundle, runtime="eager", device="cpu")
        self.native = native.Session(native.Engine(native.Library(library), bundle))
        self.path, self.saved = folder / "edited", folder / "saved"
        list(self.python.generate_ids(PROMPT, 1, eos_token_id=-1))  # one token is pending
        self.content = self.python.snapshot().to_bytes()
        self.go_back()

    def go_back(self) -> None:
        """Restore the snapshot that is edited."""
        self.path.write_bytes(self.content)
        self.python.restore(Snapshot.load(self.path))
        self.native.restore(self.path)

    def native_state(self) -> bytes:
        """The bytes of a snapshot of the C++ session."""
        self.native.save(self.saved)
        return self.saved.read_bytes()

    def verdicts(self, changed: bytes) -> tuple[str, str]:
        """What both sides say of an edited snapshot; "" where they restore it."""
        self.path.write_bytes(changed)
        said = ["", ""]
        try:
            self.python.restore(Snapshot.load(self.path))
        except ValueError as error:
            said[0] = str(error)
        except Exception as error:
            said[0] = f"a bare {type(error).__name__}: {error}"
        try:
            self.native.restore(self.path)
        except native.NativeError as error:
            said[1] = str(error) if error.status == INVALID else f"status {error.status}: {error}"
        return said[0], said[1]

    def fault(self, changed: bytes) -> tuple[str, str]:
        """What is wrong with how both sides take an edited snapshot, "" if nothing; and what Python says of it."""
        said = self.verdicts(changed)
        states = self.python.snapshot().to_bytes(), self.native_state()
        if said[0] != said[1]:
            fault = f"Python says {said[0]!r}, C++ says {said[1]!r}"
        elif said[0].startswith("a bare"):
            fault = said[0]
        elif any(state != self.content for state in states) and said[0]:
            fault = f"refused ({said[0]}), and the stream has moved"
        elif states[0] != states[1]:
            fault = "both restore it, to other states"
        else:
            fault = ""
        if states != (self.content, self.content):
            self.go_back()
        return fault, said[0]


def work(bundle: Path, library: Path, folder: Path, count: int, seed: int) -> int:
    """Try the edits; the number of faults. The file `current` names the edit that is tried."""
    sides = Sides(bundle, library, folder)
    edits = all_edits(sides.content, seed)[:count]
    faults, kinds = 0, Counter[str]()
    for name, changed in edits:
        (folder / "current").write_text(name, encoding="utf-8")
        fault, said = sides.fault(changed)
        if fault:
            faults += 1
            print(f"{name}: {fault}", flush=True)
        kinds[kind_of(said.replace(str(sides.path), "FILE"))] += 1
    for kind, number in kinds.most_common():
        print(f"{number:>6}  {kind}")
    print(f"{len(edits)} edits, {faults} faults")
    return faults


def kind_of(said: str) -> str:
    """The words that do not depend on the values."""
    known = (
        *("cannot be read as a safetensors file", "format 1, and this version", "its format is", "its metadata has"),
        *("its checksum is not", "pending token", "of another model", "has no", "has a tensor", "has the shape"),
        *("expected float32", "expected int64", "not finite", "negative variance", "expected 0..", "slots, expected"),
    )
    return next((words for words in known if words in said), said or "restored")


def main() -> int:
    """Run the work in a process of its own; 0 if it ends in time without a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help='the tests\' "tiny" model, exported: chunks of 64 tokens')
    parser.add_argument("library", type=Path, help="libmegalodon.so")
    parser.add_argument("--edits", type=int, default=10**9, help="how many, chosen by the seed; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for all")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return min(work(options.bundle, options.library, options.worker, options.edits, options.seed), 1)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--worker", folder]
        try:
            status = subprocess.run(command, timeout=options.timeout, check=False).returncode
        except subprocess.TimeoutExpired:
            status = -1
        current = Path(folder) / "current"
        if status not in (0, 1):
            doing = current.read_text(encoding="utf-8") if current.exists() else "the start"
            print(f"it ended with status {status}, or hung, at: {doing}")
        return 0 if status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
