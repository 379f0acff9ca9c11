"""Snapshot files taken apart and put together again, without the code under test: to damage them, and to seal them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "I64": "int64", "F64": "float64", "F16": "float16", "I32": "int32"}


@dataclass
class StoredTensor:
    """A tensor as the header and the data have it; `dtype` is the name in a safetensors header."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class SnapshotFile:
    """The metadata and the tensors of a file."""

    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]

    @classmethod
    def parse(cls, content: bytes) -> SnapshotFile:
        """Take the bytes of a file apart."""
        length = struct.unpack("<Q", content[:8])[0]
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        metadata = header.pop("__metadata__", {})
        tensors = {
            name: StoredTensor(entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        }
        return cls(metadata, tensors)

    def seal(self) -> SnapshotFile:
        """Set the checksum to that of the contents."""
        digest = hashlib.sha256()
        for key in ("format", "model", "pending"):
            digest.update(f"{self.metadata.get(key, '')}\n".encode())
        for name in sorted(self.tensors):
            one = self.tensors[name]
            dtype = TORCH_NAMES.get(one.dtype, one.dtype)
            digest.update(f"{name} {dtype} {','.join(map(str, one.shape))}\n".encode())
            digest.update(one.data)
        self.metadata["sha256"] = digest.hexdigest()
        return self

    def content(self) -> bytes:
        """The bytes of a file, with the tensors in the order of their names."""
        header: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        end, data = 0, b""
        for name, one in self.tensors.items():
            begin, end = end, end + len(one.data)
            header[name] = {"shape": one.shape, "data_offsets": [begin, end], "dtype": one.dtype}
            data += one.data
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data


def numbers(*values: float, kind: str = "f") -> bytes:
    """Values as little-endian elements: "f" is float32, "q" int64, "d" float64."""
    return struct.pack(f"<{len(values)}{kind}", *values)


def _pending(value: str) -> Callable[[SnapshotFile], object]:
    return lambda file: file.metadata.update(pending=value)


def _position(value: int) -> Callable[[SnapshotFile], object]:
    return lambda file: file.tensors.update({"final.position": StoredTensor("I64", [1], numbers(value, kind="q"))})


def _first(name: str, value: float) -> Callable[[SnapshotFile], object]:
    def change(file: SnapshotFile) -> None:
        one = file.tensors[name]
        one.data = numbers(value) + one.data[4:]

    return change


def _change(name: str, dtype: str, shape: list[int], data: bytes) -> Callable[[SnapshotFile], object]:
    return lambda file: file.tensors.update({name: StoredTensor(dtype, shape, data)})


def _no_slots(file: SnapshotFile) -> None:
    one = file.tensors["layers.0.key"]
    one.shape[2], one.data = 0, b""


def _rename(file: SnapshotFile) -> None:
    file.tensors["layers.0.keys"] = file.tensors.pop("layers.0.key")


_TOKEN = "its pending token is {}, expected null or a token id"
_VARIANCE = ".norm_var of the snapshot has a negative variance"

# The damage to a snapshot of the "tiny" checkpoint (tests/conftest.py) at a position inside a chunk whose checksum is
# then made right, and a piece of what both languages say about it.
SEALED_DAMAGE: dict[str, tuple[Callable[[SnapshotFile], object], str]] = {
    "format 1": (
        lambda file: file.metadata.update(format="megalodon-export snapshot 1"),
        "is a snapshot of format 1, and this version reads format 2; take it again",
    ),
    "another format": (lambda file: file.metadata.update(format="it's"), 'its format is "it\'s", expected'),
    "no format": (
        lambda file: file.metadata.pop("format"),
        "its format is None, expected 'megalodon-export snapshot 2'",
    ),
    "no metadata": (lambda file: file.metadata.clear(), "its format is None"),
    "no pending": (
        lambda file: file.metadata.pop("pending"),
        "its metadata has format, model, sha256, expected format, model, pending, sha256",
    ),
    "no model": (lambda file: file.metadata.pop("model"), "its metadata has format, pending, sha256, expected"),
    "more metadata": (lambda file: file.metadata.update(author="x"), "its metadata has author, format"),
    **{
        f"pending {text!r}": (_pending(text), _TOKEN.format(repr(text)))
        for text in (
            "abc",
            "1.5",
            str(2**63),
            str(10**18),
            "007",
            "+7",
            "-1",
            " 7",
            "7 ",
            "",
            "None",
            "nul",
            "1e3",
            "0x1",
        )
    },
    "pending beyond the vocabulary": (_pending("257"), "pending token is 257, expected none or a token id in 0..256"),
    "pending far beyond": (_pending("9" * 18), "expected none or a token id in 0..256"),
    "another model": (lambda file: file.metadata.update(model="0" * 64), "the snapshot is of another model"),
    "a missing tensor": (lambda file: file.tensors.pop("layers.1.value"), "the snapshot has no layers.1.value"),
    "a tensor of another name": (_rename, "the snapshot has no layers.0.key;"),
    "one tensor more": (_change("x'", "F32", [1], numbers(1)), 'the snapshot has a tensor "x\'", and the model'),
    "a shape that broadcasts": (
        _change("final.norm_mean", "F32", [1, 1], numbers(0)),
        "final.norm_mean of the snapshot has the shape [1, 1], expected [1, 4]",
    ),
    "a shape without the batch": (
        _change("final.position", "I64", [], numbers(70, kind="q")),
        "has the shape [], expected [1]",
    ),
    "two rows": (
        _change("final.norm_mean", "F32", [2, 4], numbers(*range(8))),
        "has the shape [2, 4], expected [1, 4]",
    ),
    "a whole ring": (
        _change("layers.0.key", "F32", [1, 2, 64, 8], bytes(4096)),
        "layers.0.key of the snapshot has the shape [1, 2, 64, 8], expected [1, 2, 0..63, 8]",
    ),
    "another dtype": (
        _change("final.norm_mean", "F64", [1, 4], numbers(*range(4), kind="d")),
        "final.norm_mean of the snapshot is float64, expected float32",
    ),
    "a position of float": (_change("final.position", "F32", [1], numbers(70)), "is float32, expected int64"),
    **{
        f"{name} {value}": (_first(name, value), f"{name} of the snapshot has values that are not finite")
        for name in ("layers.0.key", "layers.1.ema_state", "final.norm_var")
        for value in (float("nan"), float("inf"))
    },
    "a negative variance": (_first("final.norm_var", -1e-30), f"final{_VARIANCE}"),
    "a layer's negative variance": (_first("layers.1.norm_var", -1.0), f"layers.1{_VARIANCE}"),
    **{
        f"position {value}": (_position(value), f"final.position of the snapshot is {value}, expected 0..{2**53 - 1}")
        for value in (-1, 2**53, 2**62, -(2**63))
    },
    "a position of other slots": (_position(71), "has 6 slots, expected 7 of 64 at position 71"),
    "a position where a chunk ends": (_position(128), "has 6 slots, expected 0 of 64 at position 128"),
    "no slots": (_no_slots, "layers.0.key of the snapshot has 0 slots, expected 6 of 64 at position 70"),
}


def _header(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        text = content[8 : 8 + length].replace(old, new, 1)
        assert text != content[8 : 8 + length]
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return change


UNREADABLE = "is no snapshot, or not a whole one: it cannot be read as a safetensors file"
# The damage to the bytes of a snapshot whose checksum stays, and a piece of what both languages say about it.
RAW_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "an empty file": (lambda content: b"", UNREADABLE),
    "text": (lambda content: b"no snapshot", UNREADABLE),
    "a file cut off": (lambda content: content[:-1], UNREADABLE),
    "a file cut off in its header": (lambda content: content[:100], UNREADABLE),
    "a byte more": (lambda content: content + b"\0", UNREADABLE),
    "a header of 2**63 bytes": (lambda content: struct.pack("<Q", 2**63) + content[8:], UNREADABLE),
    "a flipped bit": (
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "is damaged: its checksum",
    ),
    "another checksum": (_header(b'"sha256":"', b'"sha256":"0'), "is damaged: its checksum"),
    "no checksum": (_header(b"sha256", b"sha257"), "its metadata has format, model, pending, sha257"),
    "a key twice": (_header(b'"pending":', b'"pending":"null","pending":'), UNREADABLE),
    "a byte order mark": (_header(b"{", "\ufeff{".encode()), UNREADABLE),
    "a control character": (_header(b"pending", b"pend\x1bing"), UNREADABLE),
    "an escape": (_header(b"pending", b"\\u0070ending"), UNREADABLE),
    "a lone surrogate": (_header(b"pending", b"\\ud800"), UNREADABLE),
    "no UTF-8": (_header(b"pending", b"\xff"), UNREADABLE),
    "metadata of another type": (_header(b'"pending":"', b'"pending":7,"p":"'), UNREADABLE),
    "an entry with a key more": (_header(b'"dtype":', b'"x":1,"dtype":'), UNREADABLE),
    "a size that is no whole number": (_header(b'"shape":[1]', b'"shape":[1.0]'), UNREADABLE),
    "a negative offset": (_header(b"[0,8]", b"[-8,8]"), UNREADABLE),
    "a number beyond floats": (_header(b'"shape":[1]', b'"shape":[1e400]'), UNREADABLE),
    "NaN": (_header(b'"shape":[1]', b'"shape":[NaN]'), UNREADABLE),
    "sizes that overflow": (_header(b'"shape":[1]', b'"shape":[999999999999999999,999999999999999999,0]'), UNREADABLE),
    "deep nesting": (_header(b'"shape":[1]', b'"shape":' + b"[" * 5000 + b"]" * 5000), UNREADABLE),
}


def damaged(content: bytes, name: str) -> tuple[bytes, str]:
    """A snapshot's bytes with one of the damages, and a piece of the error."""
    if name in RAW_DAMAGE:
        change_bytes, said = RAW_DAMAGE[name]
        return change_bytes(content), said
    change, said = SEALED_DAMAGE[name]
    file = SnapshotFile.parse(content)
    change(file)
    return (file if name == "no metadata" else file.seal()).content(), said


def odd_files(folder: Path) -> dict[str, Path]:
    """Paths that are no files, by what they are."""
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    return {"a pipe": folder / "pipe", "a folder": folder, "a device": Path("/dev/zero")}
