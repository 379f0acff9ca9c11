"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from .answers import EventAnswer, WholeAnswer, event
from .chat_template import message_texts
from .choices import Choice, Usage, choices_of, new_id, usage_wanted
from .errors import bad
from .fields import ChatFields, read
from .generation import Generation
from .service import Service
from .streams import Request, Token


async def chat(service: Service, body: bytes, owner: str) -> Response:
    """The answer to a request, which has been queued."""
    fields, request = await asyncio.to_thread(_prepare, service, body, owner)
    generation = Generation(service.engine, [request], service.limits.seconds)
    answer = _Chat(service, fields, Usage([len(request.prompt)], request.n))
    if fields.stream:
        return EventAnswer(generation, answer.events(generation))
    return WholeAnswer(generation, lambda: answer.whole(generation))


def _prepare(service: Service, body: bytes, owner: str) -> tuple[ChatFields, Request]:
    fields = read(body, ChatFields)
    service.check_model(fields.model)
    prompt = service.encode(service.template.render(message_texts(fields.messages, "messages")), "messages")
    service.check_choices(1, fields.n or 1)
    if fields.top_logprobs and not fields.logprobs:
        raise bad("top_logprobs needs logprobs to be true", "top_logprobs")
    if None not in (fields.max_tokens, fields.max_completion_tokens):
        raise bad("max_tokens and max_completion_tokens exclude each other; send one of them", "max_tokens")
    asked = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    return fields, service.request(
        prompt,
        service.new_tokens(asked, service.limits.new_tokens, name),
        fields,
        n=fields.n or 1,
        owner=owner,
        stop=service.stops(fields.stop),
        rules=service.rules(fields),
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )


class _Chat:
    """One answer, whole or in chunks."""

    def __init__(self, service: Service, fields: ChatFields, usage: Usage) -> None:
        self._service, self._fields, self._usage = service, fields, usage
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": service.model}

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The completion, when it is over."""
        choices = await choices_of(generation, self._usage)
        made = []
        for index, choice in enumerate(choices):
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            logprobs = self._logprobs(choice.tokens)
            made.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason})
        return {**self._head, "object": "chat.completion", "choices": made, "usage": self._usage.to_json()}

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The completion's chunks. The first of a choice has its role and text: clients time the first chunk."""
        head = {**self._head, "object": "chat.completion.chunk"}
        include, always = usage_wanted(self._fields.stream_options)
        begun: set[int] = set()
        async for index, update in generation.updates():
            self._usage.add(index, update)
            part = Choice(update.text, update.tokens, reason=update.finish_reason)
            if not (part.text or part.reason or (part.tokens and self._fields.logprobs)):
                continue
            delta: dict[str, Any] = {} if index in begun else {"role": "assistant"}
            if part.text or index not in begun:
                delta["content"] = part.text
            begun.add(index)
            choice = {"index": index, "delta": delta, "logprobs": self._logprobs(part.tokens)}
            chunk: dict[str, Any] = {**head, "choices": [{**choice, "finish_reason": part.reason}]}
            if include:
                chunk["usage"] = self._usage.to_json() if always else None
            yield event(chunk)
        if include:
            yield event({**head, "choices": [], "usage": self._usage.to_json()})
        yield event(b"[DONE]")

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self._fields.logprobs:
            return None
        content = [
            {**self._token(token.id, token.logprob), "top_logprobs": [self._token(*one) for one in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        texts = self._service.texts
        return {"token": texts.text_of(token), "logprob": logprob, "bytes": list(texts.bytes_of(token))}
