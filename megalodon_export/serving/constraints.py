"""Output that follows a JSON schema, a regular expression or a grammar, by llguidance."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..generation.arguments import show
from .errors import ApiError, bad

_MOST_GRAMMARS = 64  # compiled grammars that are kept
_MOST_BYTES = 1 << 16  # of a schema, an expression or a grammar


def grammar_of(fields: Any) -> str | None:
    """llguidance's grammar for a request's `response_format` or `structured_outputs`; None for plain text."""
    wanted = getattr(fields, "response_format", None)
    outputs = fields.structured_outputs
    if wanted is not None and outputs is not None:
        raise bad("response_format and structured_outputs exclude each other; send one of them", "structured_outputs")
    if outputs is not None:
        return _of_outputs(outputs)
    return None if wanted is None else of_format(wanted, "response_format")


def of_format(wanted: dict[str, Any], param: str) -> str | None:
    """The grammar for OpenAI's form: {"type": "json_schema", "json_schema": {"schema": ...}} and its siblings."""
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _of_schema({"type": "object"}, param)
    if kind != "json_schema":
        raise bad(f"{param}.type is {show(kind)}, expected text, json_object or json_schema", f"{param}.type")
    inner = wanted.get("json_schema", wanted)
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict | bool):
        raise bad(f"{param}.json_schema.schema is {show(schema)}, expected a JSON schema", param)
    return _of_schema(schema, param)


def _of_outputs(outputs: dict[str, Any]) -> str:
    """The grammar for vLLM's form: one of json, regex, choice and grammar."""
    param = "structured_outputs"
    given = {name: value for name, value in outputs.items() if value is not None}
    if len(given) != 1 or not given.keys() <= {"json", "regex", "choice", "grammar"}:
        raise bad(f"{param} is {show(outputs)}, expected one of json, regex, choice and grammar", param)
    ((kind, value),) = given.items()
    if kind == "json":
        schema = _parsed(value) if isinstance(value, str) else value
        if not isinstance(schema, dict | bool):
            raise bad(f"{param}.json is {show(value)}, expected a JSON schema", param)
        return _of_schema(schema, param)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
            raise bad(f"{param}.choice is {show(value)}, expected a list of texts", param)
        value = "|".join(map(re.escape, value))
        kind = "regex"
    if not isinstance(value, str) or not value or len(value.encode()) > _MOST_BYTES:
        raise bad(f"{param}.{kind} is {show(value)}, expected a text of 1..{_MOST_BYTES} bytes", param)
    return f"{kind}:{value}"


def _of_schema(schema: Any, param: str) -> str:
    text = json.dumps(schema)
    if len(text) > _MOST_BYTES:
        raise bad(f"{param}: the schema has {len(text)} bytes, expected at most {_MOST_BYTES}", param)
    return f"json:{text}"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class Grammars:
    """Compiles grammars for one tokenizer, and keeps those used last."""

    def __init__(self, tokenizer_json: str, logits_size: int, eos_token_id: int | None) -> None:
        """ValueError for a tokenizer that llguidance does not read."""
        import llguidance  # of the extra `serve`

        self._size, self._library = logits_size, llguidance
        self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=logits_size, eos_token=eos_token_id)
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> Any:
        """A fresh matcher; ApiError for a grammar that is wrong or too large."""
        with self._lock:
            found = self._kept.get(grammar)
            if found is None:
                found = self._compile(grammar)
                self._kept[grammar] = found
                if len(self._kept) > _MOST_GRAMMARS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(grammar)
            return found.deep_copy()

    def constraint(self, grammar: str) -> GrammarConstraint:
        """A constraint at the beginning of a text."""
        return GrammarConstraint(self.matcher(grammar), self._size)

    def _compile(self, grammar: str) -> Any:
        kind, _, text = grammar.partition(":")
        matcher = self._library.LLMatcher
        try:
            if kind == "json":
                made = matcher.grammar_from_json_schema(text, {"whitespace_flexible": False})
            else:
                made = matcher.grammar_from_regex(text) if kind == "regex" else matcher.grammar_from_lark(text)
            compiled = matcher(self._tokenizer, made, log_level=0)
            error = compiled.get_error()
        except ValueError as fault:
            error = str(fault)
        if error:
            name = {"json": "schema", "regex": "regular expression"}.get(kind, "grammar")
            raise ApiError(400, f"the {name} cannot be used: {error.splitlines()[0]}", "response_format")
        return compiled


class GrammarConstraint:
    """Which tokens may come next in one stream."""

    def __init__(self, matcher: Any, logits_size: int) -> None:
        self._matcher, self._size = matcher, logits_size

    def mask(self) -> Tensor:
        """The tokens that may come next, (V) bool on the CPU."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_))

    def accept(self, token: int) -> None:
        """The stream has got this token."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} breaks the grammar: {self._matcher.get_error()}")

    @property
    def is_over(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())
