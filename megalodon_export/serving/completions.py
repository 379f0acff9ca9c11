"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from ..generation.arguments import token_ids
from .answers import EventAnswer, WholeAnswer, event
from .choices import Choice, Usage, choices_of, new_id, usage_wanted
from .errors import bad
from .fields import CompletionFields, read
from .generation import Generation
from .service import Service
from .streams import Request, Token

_DEFAULT_TOKENS = 16


async def complete(service: Service, body: bytes, owner: str) -> Response:
    """The answer to a request, which has been queued."""
    fields, prompts, requests = await asyncio.to_thread(_prepare, service, body, owner)
    generation = Generation(service.engine, requests, service.limits.seconds)
    answer = _Completion(service, fields, prompts)
    if fields.stream:
        return EventAnswer(generation, answer.events(generation))
    return WholeAnswer(generation, lambda: answer.whole(generation))


def _prepare(service: Service, body: bytes, owner: str) -> tuple[CompletionFields, list[list[int]], list[Request]]:
    fields = read(body, CompletionFields)
    service.check_model(fields.model)
    prompts = _prompts(service, fields.prompt)
    n = fields.n or 1
    service.check_choices(len(prompts), n)
    scored = fields.logprobs if fields.echo else None
    others: dict[str, Any] = {
        **{"n": n, "owner": owner, "stop": service.stops(fields.stop), "rules": service.rules(fields)},
        **{"logprobs": fields.logprobs, "prompt_logprobs": scored},
    }
    count = service.new_tokens(fields.max_tokens, _DEFAULT_TOKENS, "max_tokens")
    return fields, prompts, [service.request(prompt, count, fields, **others) for prompt in prompts]


def _prompts(service: Service, given: str | list[Any]) -> list[list[int]]:
    """The prompts as token ids."""
    if isinstance(given, str):
        return [service.encode(given)]
    if not given:
        raise bad("prompt is an empty list, expected a text, token ids, or a list of either", "prompt")
    if all(isinstance(one, str) for one in given):
        return [service.encode(one) for one in given]
    rows = given if all(isinstance(one, list) for one in given) else [given]
    try:
        found = [token_ids(row, service.config.vocab_size, f" of prompt {i}") for i, row in enumerate(rows)]
    except (ValueError, OverflowError) as error:
        raise bad(f"prompt: {error}", "prompt") from None
    return [service.check_length(row, "prompt") for row in found]


class _Completion:
    """One answer, whole or in chunks."""

    def __init__(self, service: Service, fields: CompletionFields, prompts: list[list[int]]) -> None:
        self._service, self._fields, self._prompts = service, fields, prompts
        self._n = fields.n or 1
        self._head = {
            **{"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time())},
            **{"model": service.model},
        }
        self._usage = Usage([len(prompt) for prompt in prompts], self._n)

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The completion, when it is over."""
        choices = await choices_of(generation, self._usage)
        made = [self._choice(index, choice, True) for index, choice in enumerate(choices)]
        return {**self._head, "choices": made, "usage": self._usage.to_json()}

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The completion's chunks."""
        include, always = usage_wanted(self._fields.stream_options)
        begun: set[int] = set()
        offsets: dict[int, int] = {}
        async for index, update in generation.updates():
            self._usage.add(index, update)
            part = Choice(update.text, update.tokens, update.prompt, update.finish_reason)
            first = index not in begun
            told = self._fields.logprobs is not None or self._fields.return_token_ids
            if not (part.text or part.reason or (part.tokens and told)):
                continue
            begun.add(index)
            choice = self._choice(index, part, first, offsets.get(index, 0))
            if choice["logprobs"]:
                offsets[index] = offsets.get(index, 0) + sum(map(len, choice["logprobs"]["tokens"]))
            chunk = {**self._head, "choices": [choice]}
            if include:
                chunk["usage"] = self._usage.to_json() if always else None
            yield event(chunk)
        if include:
            yield event({**self._head, "choices": [], "usage": self._usage.to_json()})
        yield event(b"[DONE]")

    def _choice(self, index: int, choice: Choice, first: bool, offset: int = 0) -> dict[str, Any]:
        """A choice; the first part of one has the prompt, where that is to be echoed."""
        text, tokens = choice.text, choice.tokens
        if first and self._fields.echo:
            prompt = self._prompts[index // self._n]
            text = self._service.tokenizer.decode(prompt, skip_special_tokens=False) + text
            tokens = [*(choice.prompt or map(Token, prompt)), *tokens]
        logprobs = None if self._fields.logprobs is None else self._logprobs(tokens, offset)
        made = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.reason}
        if self._fields.return_token_ids:
            made["token_ids"] = [token.id for token in choice.tokens]
            if first:
                made["prompt_token_ids"] = self._prompts[index // self._n]
        return made

    def _logprobs(self, tokens: list[Token], offset: int) -> dict[str, Any]:
        """The legacy form: lists beside each other. The token itself is always among the top ones."""
        text_of, offsets, tops = self._service.texts.text_of, [], []
        for token in tokens:
            offsets.append(offset)
            offset += len(text_of(token.id))
            top = dict((*token.top, (token.id, token.logprob)))
            tops.append(None if token.logprob is None else {text_of(one): value for one, value in top.items()})
        return {
            "tokens": [text_of(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }
