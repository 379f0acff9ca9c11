"""Speaks with megalodon-tokenize, the C++ tokenizers without a bundle."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path


class CppTokenizer:
    """A tokenizer.json that the C++ library reads. Raises ValueError, with its words, for one that it refuses."""

    def __init__(self, program: Path, file: Path) -> None:
        self._process = subprocess.Popen(
            [program, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            self.encode("")
        except (BrokenPipeError, struct.error):
            assert self._process.stderr is not None
            raise ValueError(self._process.stderr.read().decode()) from None

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids. Raises ValueError with the library's words."""
        self._ask(b"e", text.encode() if isinstance(text, str) else text)
        failed, count = self._read("<2I")
        if failed:
            raise ValueError(self._take(count).decode())
        return list(struct.unpack(f"<{count}I", self._take(4 * count)))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, joined from the pieces of a stream; the program ends if a piece ends inside a character."""
        self._ask(b"d", struct.pack(f"<{len(ids)}I", *ids), len(ids))
        (size,) = self._read("<I")
        return self._take(size).decode()

    def seconds(self, text: str) -> float:
        """How long encoding a text takes."""
        self._ask(b"t", text.encode())
        (seconds,) = self._read("<d")
        return float(seconds)

    def close(self) -> str:
        """Ends the program. Returns what it wrote to its standard error."""
        _, said = self._process.communicate()
        return said.decode()

    def _ask(self, request: bytes, data: bytes, size: int | None = None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(request + struct.pack("<I", len(data) if size is None else size) + data)
        self._process.stdin.flush()

    def _read(self, form: str) -> tuple:
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def _take(self, size: int) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.read(size)
