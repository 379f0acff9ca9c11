"""What all routes share: the model, its tokenizer and template, the limits, and requests made from fields."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tokenizers import Tokenizer

from ..generation.arguments import show
from ..generation.sampling import SamplingParams
from .chat_template import PLAIN, ChatTemplate
from .constraints import Grammars, grammar_of
from .engine import Engine
from .errors import ApiError, bad
from .fields import SamplingFields
from .response_store import ResponseStore
from .streams import LogitRules, Request
from .token_texts import TokenTexts

_STOPS, _STOP_BYTES = 16, 1024
_MOST_CHOICES = 512


@dataclass(frozen=True)
class ServiceLimits:
    """body_bytes: of a request. new_tokens: most that a request may ask for, and a chat's default.

    prompt_tokens: of one prompt; 0 for any number. seconds: for a whole request, once it has been read.
    body_seconds: until its body has arrived.
    """

    body_bytes: int = 16 << 20
    new_tokens: int = 4096
    prompt_tokens: int = 0
    seconds: float = 3600.0
    body_seconds: float = 60.0


@dataclass
class Service:
    """A model that is served. `model` is its name."""

    engine: Engine
    tokenizer: Tokenizer
    model: str
    template: ChatTemplate = field(default_factory=lambda: ChatTemplate(PLAIN))
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    responses: ResponseStore = field(default_factory=ResponseStore)

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.tokenizer)
        self.config = self.engine.runtime.config
        self._grammars: Grammars | None = None

    def check_model(self, name: str | None) -> None:
        """ApiError for the name of another model."""
        if name is not None and name != self.model:
            raise ApiError(404, f"there is no model {show(name)}; this is {self.model}", "model", "model_not_found")

    def encode(self, text: str, param: str = "prompt") -> list[int]:
        """The token ids of a text."""
        return self.check_length(list(self.tokenizer.encode(text).ids), param)

    def check_length(self, ids: list[int], param: str) -> list[int]:
        """Token ids, or the beginning-of-sequence token for none: a stream must begin with some token."""
        most = self.limits.prompt_tokens
        if most and len(ids) > most:
            raise ApiError(400, f"{param} has {len(ids)} tokens, expected at most {most}", param, "prompt_too_long")
        if not ids and self.config.bos_token_id is None:
            raise bad(f"{param} is empty, and the model has no token to begin with; give some text", param)
        return ids or [int(self.config.bos_token_id or 0)]

    def new_tokens(self, asked: int | None, default: int, param: str) -> int:
        """How many tokens to generate at most."""
        most = self.limits.new_tokens
        if asked is not None and asked > most:
            raise bad(f"{param} is {asked}, expected at most {most}, the limit of this server", param)
        return min(default, most) if asked is None else asked

    def request(self, prompt: Sequence[int], max_tokens: int, fields: SamplingFields, **others: Any) -> Request:
        """A request with the sampling parameters and the rules that the fields ask for."""
        eos = None if fields.ignore_eos else self.config.eos_token_id
        return Request(prompt, max_tokens, self._sampling(fields), eos_token_id=eos, **others)

    def rules(self, fields: SamplingFields, grammar: str | None = None) -> LogitRules:
        """What changes the logits."""
        grammar = grammar or grammar_of(fields)
        return LogitRules(
            fields.presence_penalty or 0.0,
            fields.frequency_penalty or 0.0,
            1.0 if fields.repetition_penalty is None else fields.repetition_penalty,
            self._bias(fields.logit_bias or {}),
            None if grammar is None else self._constraint(grammar),
        )

    def stops(self, stop: str | list[str] | None) -> tuple[str, ...]:
        """The stop strings."""
        stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
        if len(stops) > _STOPS or any(not one or len(one.encode()) > _STOP_BYTES for one in stops):
            expected = f"at most {_STOPS} texts of 1..{_STOP_BYTES} bytes"
            raise bad(f"stop is {show(stop)}, expected {expected}", "stop")
        return stops

    def check_choices(self, prompts: int, n: int) -> None:
        """ApiError for more answers than one request may have."""
        if prompts * n > _MOST_CHOICES:
            raise bad(f"{prompts} prompts and n {n} are {prompts * n} choices, expected at most {_MOST_CHOICES}", "n")
        if n > self.engine.capacity:
            raise bad(f"n is {n}, expected 1..{self.engine.capacity}, the streams that can run at once", "n")

    def _sampling(self, fields: SamplingFields) -> SamplingParams:
        top_k = fields.top_k or 0
        seed = secrets.randbits(64) if fields.seed is None else fields.seed % 2**64
        try:
            return SamplingParams(
                temperature=1.0 if fields.temperature is None else fields.temperature,
                top_k=max(top_k, 0),
                top_p=1.0 if fields.top_p is None else fields.top_p,
                min_p=fields.min_p or 0.0,
                seed=seed,
            )
        except ValueError as error:
            raise bad(str(error), str(error).split()[0]) from None

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        size, bias = self.config.vocab_size, {}
        for token, value in given.items():
            if not token.isascii() or not token.isdigit() or len(token) > 9 or int(token) >= size:
                raise bad(f"logit_bias has the key {show(token)}, expected token ids in 0..{size - 1}", "logit_bias")
            bias[int(token)] = value
        return bias

    def _constraint(self, grammar: str) -> Any:
        if self._grammars is None:
            eos = self.config.eos_token_id
            self._grammars = Grammars(self.tokenizer.to_str(), self.config.logits_size, eos)
        self._grammars.matcher(grammar)  # refuses a wrong one before anything is queued
        return partial(self._grammars.constraint, grammar)
