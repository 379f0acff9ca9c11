"""The smaller routes: the model, its tokenizer, and stored responses."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.responses import JSONResponse, Response

from ..generation.arguments import show, token_ids
from ..generation.snapshot import state_size
from .chat_template import message_texts
from .choices import new_id
from .errors import ApiError, bad
from .fields import DetokenizeFields, TokenizeFields, read
from .response_store import StoredResponse
from .responses import check_state
from .service import Service

_NO_LIMIT = 2**31 - 1  # tokens; clients want a number, and a constant state has no largest context


def model(service: Service, created: int) -> dict[str, Any]:
    """OpenAI's object for the model that is served."""
    return {
        **{"id": service.model, "object": "model", "created": created, "owned_by": "megalodon-export"},
        "max_model_len": service.limits.prompt_tokens or _NO_LIMIT,
    }


def tokenizer_info(service: Service) -> dict[str, Any]:
    """What lm_eval's remote tokenizer asks for."""
    config, text_of = service.config, service.texts.text_of
    ids = {"bos_token": config.bos_token_id, "eos_token": config.eos_token_id}
    tokens = {name: None if one is None else text_of(one) for name, one in ids.items()}
    pad = tokens["eos_token"]
    return {
        **{"tokenizer_class": "PreTrainedTokenizerFast", **tokens, "pad_token": pad, "unk_token": None},
        **{"chat_template": service.template.source, "vocab_size": config.vocab_size},
        "model_max_length": service.limits.prompt_tokens or _NO_LIMIT,
    }


async def tokenize(service: Service, body: bytes, owner: str) -> Response:
    """The token ids of a text or a chat."""
    return JSONResponse(await asyncio.to_thread(_tokenize, service, body))


def _tokenize(service: Service, body: bytes) -> dict[str, Any]:
    fields = read(body, TokenizeFields)
    service.check_model(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise bad("give either prompt, a text, or messages, a chat", "prompt")
    if fields.messages is not None:
        messages = message_texts(fields.messages, "messages")
        text = service.template.render(messages, fields.add_generation_prompt is not False)
        encoded = service.tokenizer.encode(text, add_special_tokens=bool(fields.add_special_tokens))
    else:
        special = fields.add_special_tokens is not False
        encoded = service.tokenizer.encode(fields.prompt or "", add_special_tokens=special)
    strings = [service.texts.text_of(one) for one in encoded.ids] if fields.return_token_strs else None
    most = service.limits.prompt_tokens or _NO_LIMIT
    return {"count": len(encoded.ids), "max_model_len": most, "tokens": encoded.ids, "token_strs": strings}


async def detokenize(service: Service, body: bytes, owner: str) -> Response:
    """The text of token ids."""
    fields = read(body, DetokenizeFields)
    service.check_model(fields.model)
    try:
        ids = token_ids(fields.tokens, service.config.vocab_size)
    except ValueError as error:
        raise bad(f"tokens: {error}", "tokens") from None
    return JSONResponse({"prompt": service.tokenizer.decode(ids, skip_special_tokens=False)})


def no_response(name: str) -> ApiError:
    """A stored response that does not exist, or is another's."""
    return ApiError(404, f"there is no stored response {show(name)}", "response_id", "not_found")


def stored(service: Service, name: str, owner: str) -> StoredResponse:
    """A stored response of this owner."""
    record = service.responses.get(name, owner)
    if record is None:
        raise no_response(name)
    return record


def largest_state(service: Service) -> int:
    """The most bytes that a snapshot file of the model has."""
    runtime = service.engine.runtime
    return state_size(runtime.config, runtime.dtype) + (1 << 20)


def store_state(service: Service, content: bytes, owner: str) -> dict[str, Any]:
    """Store an uploaded snapshot as a response that a chat can go on from."""
    snapshot = check_state(service, content)
    name = new_id("resp")
    body = {
        **{"id": name, "object": "response", "created_at": int(time.time()), "status": "completed"},
        **{"model": service.model, "output": [], "store": True, "error": None, "incomplete_details": None},
        **{"instructions": None, "metadata": {}, "parallel_tool_calls": False, "tool_choice": "none", "tools": []},
        **{"temperature": None, "top_p": None, "previous_response_id": None, "usage": None},
    }
    try:
        record = service.responses.save(name, owner, body, snapshot)
    except OSError as error:
        raise ApiError(507, f"the state cannot be stored: {error.strerror or error}", code="storage_full") from None
    return record.summary()
