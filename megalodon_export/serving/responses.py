"""POST /v1/responses. A stored response goes on from its state: a turn costs its own tokens, however long the chat."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from ..generation.arguments import show
from ..generation.snapshot import Snapshot
from .answers import EventAnswer, WholeAnswer, event
from .chat_template import message_texts
from .choices import Choice, Usage, choices_of, new_id
from .constraints import of_format
from .errors import ApiError, bad
from .fields import ResponseFields, read
from .generation import Generation
from .service import Service
from .states import StreamState
from .streams import Request

_LOG = logging.getLogger(__name__)


async def respond(service: Service, body: bytes, owner: str) -> Response:
    """The answer to a request, which has been queued."""
    fields, request = await asyncio.to_thread(_prepare, service, body, owner)
    generation = Generation(service.engine, [request], service.limits.seconds)
    answer = _Response(service, fields, owner, request)
    if fields.stream:
        return EventAnswer(generation, answer.events(generation))
    return WholeAnswer(generation, lambda: answer.whole(generation))


def _prepare(service: Service, body: bytes, owner: str) -> tuple[ResponseFields, Request]:
    fields = read(body, ResponseFields)
    service.check_model(fields.model)
    if fields.input is None and fields.previous_response_id is None:
        raise bad("input is missing; give a text or messages, or previous_response_id to go on from", "input")
    previous = fields.previous_response_id
    snapshot = None if previous is None else load_state(service, previous, owner)
    return fields, _request(service, fields, owner, snapshot)


def load_state(service: Service, name: str, owner: str) -> Snapshot:
    """The state of a stored response of this owner; ApiError if there is none, or it is of another model."""
    record = service.responses.get(name, owner)
    content = None if record is None else service.responses.content(record)
    if content is None:
        raise ApiError(404, f"there is no stored response {show(name)}", "previous_response_id", "not_found")
    return check_state(service, content)


def check_state(service: Service, content: bytes) -> Snapshot:
    """The snapshot in a file's content; ApiError unless it is a state of this model."""
    runtime = service.engine.runtime
    try:
        snapshot = Snapshot.from_bytes(content, "the state")
        snapshot.check(runtime.config, runtime.dtype, runtime.model_id)
    except ValueError as error:
        raise bad(str(error)) from None
    return snapshot


def _request(service: Service, fields: ResponseFields, owner: str, snapshot: Snapshot | None) -> Request:
    text = fields.text or {}
    for name in text.keys() - {"format"}:
        raise ApiError(400, f"text.{name} is not supported; leave it out", f"text.{name}", "unsupported_parameter")
    wanted = text.get("format")
    if wanted is not None and not isinstance(wanted, dict):
        raise bad(f"text.format is {show(wanted)}, expected an object", "text.format")
    grammar = None if wanted is None else of_format(wanted, "text.format")
    others: dict[str, Any] = {
        **{"owner": owner, "rules": service.rules(fields, grammar), "keep_state": fields.store is not False},
    }
    messages = _messages(fields)
    if snapshot is None:
        prompt = service.encode(service.template.render(messages), "input")
    else:
        config = service.engine.runtime.config
        new = service.tokenizer.encode(service.template.render_turn(messages)).ids if messages else []
        prompt = service.check_length(new, "input") if new or snapshot.pending is None else []
        others |= {"state": StreamState.of_snapshot(config, snapshot), "pending": snapshot.pending}
    count = service.new_tokens(fields.max_output_tokens, service.limits.new_tokens, "max_output_tokens")
    return service.request(prompt, count, fields, **others)


def _messages(fields: ResponseFields) -> list[dict[str, Any]]:
    given = fields.input
    messages: list[Any] = [{"role": "user", "content": given}] if isinstance(given, str) else given or []
    made = message_texts(messages, "input")
    return [{"role": "system", "content": fields.instructions}, *made] if fields.instructions else made


class _Response:
    """One answer, whole or in events."""

    def __init__(self, service: Service, fields: ResponseFields, owner: str, request: Request) -> None:
        self._service, self._fields, self._owner, self._request = service, fields, owner, request
        self._id, self._item, self._created = new_id("resp"), new_id("msg"), int(time.time())
        before = 0 if request.state is None else request.state.position
        fed = len(request.prompt) + (request.pending is not None)
        self._before, self._usage, self._number = before, Usage([before + fed], 1), 0

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The response, when it is over and stored."""
        (choice,) = await choices_of(generation, self._usage)
        return await self._finished(choice)

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The response's events, in OpenAI's order. It is stored before the last one."""
        begun = {**self._body("in_progress", []), "usage": None}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        place = {"output_index": 0, "content_index": 0, "item_id": self._item}
        item = {**self._message("", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **place, part=_part(""))
        choice = Choice()
        async for index, update in generation.updates():
            self._usage.add(index, update)
            choice.add(update)
            if update.text:
                yield self._event("response.output_text.delta", **place, delta=update.text, logprobs=[])
        yield self._event("response.output_text.done", **place, text=choice.text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=_part(choice.text))
        body = await self._finished(choice)
        yield self._event("response.output_item.done", output_index=0, item=body["output"][0])
        yield self._event(f"response.{body['status']}", response=body)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)

    async def _finished(self, choice: Choice) -> dict[str, Any]:
        """The whole response. If it is to be stored and cannot be, it says so: `store` is false."""
        status = "completed" if choice.reason == "stop" else "incomplete"
        body = self._body(status, [self._message(choice.text, status)])
        if choice.state is None:
            return body
        try:
            await asyncio.to_thread(self._store, body, choice.state, choice.pending)
        except OSError as error:
            _LOG.warning("a response could not be stored: %s", error)
            body["store"] = False
        return body

    def _store(self, body: dict[str, Any], state: StreamState, pending: int | None) -> None:
        runtime = self._service.engine.runtime
        snapshot = state.snapshot(runtime.config, pending, runtime.model_id)
        self._service.responses.save(self._id, self._owner, body, snapshot)

    def _message(self, text: str, status: str) -> dict[str, Any]:
        head = {"id": self._item, "type": "message", "role": "assistant", "status": status}
        return {**head, "content": [_part(text)]}

    def _body(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        fields, usage = self._fields, self._usage
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **{"id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None},
            **{"incomplete_details": reason, "instructions": fields.instructions, "model": self._service.model},
            **{"max_output_tokens": self._request.max_tokens, "metadata": fields.metadata or {}, "output": output},
            **{"parallel_tool_calls": False, "previous_response_id": fields.previous_response_id},
            **{"store": self._request.keep_state, "temperature": self._request.params.temperature},
            **{"text": fields.text or {"format": {"type": "text"}}, "tool_choice": "none", "tools": []},
            **{"top_p": self._request.params.top_p, "truncation": "disabled"},
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": self._before + usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
