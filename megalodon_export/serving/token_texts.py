"""The bytes and the text of single tokens, which logprobs report."""

from __future__ import annotations

import re
from typing import Any

from tokenizers import Tokenizer

from ..generation.text import byte_symbols

_FALLBACK = re.compile("<0x([0-9A-F]{2})>")


class TokenTexts:
    """Texts and bytes by token id, for a tokenizer of any of the kinds that bundles hold."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        state = b"" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
        self._byte_level = b"ByteLevel" in state
        self._bytes_of_symbol = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        self._added = tokenizer.get_added_tokens_decoder()
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; none for an id that the tokenizer lacks."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def text_of(self, token: int) -> str:
        r"""The text of a token; "bytes:\xNN..." where its bytes alone are no text."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _find(self, token: int) -> bytes:
        symbol = self._tokenizer.id_to_token(token)
        if symbol is None:
            return b""
        if token in self._added:
            return symbol.encode()
        if self._byte_level:
            codes: Any = [self._bytes_of_symbol.get(character) for character in symbol]
            return symbol.encode() if None in codes else bytes(codes)
        if found := _FALLBACK.fullmatch(symbol):
            return bytes([int(found[1], 16)])
        return symbol.replace("\u2581", " ").encode()
