"""The fields of the requests, and their checks. Null means that a field was not given.

A field that is not listed is refused by its name, and never ignored. A few that clients always send are accepted with
the values that mean nothing; `NEUTRAL` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from ..bundles.strict_json import parse_json
from ..generation.arguments import show
from .errors import ApiError, bad

_ANYTHING = object()
# Fields without an effect here, and the values with which they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "user": (_ANYTHING,),
    "safety_identifier": (_ANYTHING,),
    "prompt_cache_key": (_ANYTHING,),
    "service_tier": ("auto", "default"),
    "parallel_tool_calls": (_ANYTHING,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([],),
    "add_special_tokens": (True,),
    "skip_special_tokens": (True,),
    "top_logprobs": (0,),
    "logprobs": (False,),
    "store": (False,),
    "metadata": ({},),
    "n": (1,),
}

Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream's chunks hold beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields of every request that generates."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    seed: int | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None
    structured_outputs: dict[str, Any] | None = None


class ChoiceFields(SamplingFields, kw_only=True):
    """The fields of completions and of chat completions alike."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Count | None = None
    stop: str | list[str] | None = None
    response_format: dict[str, Any] | None = None


class CompletionFields(ChoiceFields, kw_only=True):
    """POST /v1/completions. `prompt` is a text, token ids, or a list of either."""

    prompt: str | list[Any]
    echo: bool | None = None
    return_token_ids: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class ChatFields(ChoiceFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=65536)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class ResponseFields(SamplingFields, kw_only=True):
    """POST /v1/responses."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    text: dict[str, Any] | None = None


class TokenizeFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /tokenize: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


Fields = TypeVar("Fields", bound=msgspec.Struct)


def read(body: bytes, kind: type[Fields]) -> Fields:
    """The fields of a body; ApiError says what is wrong with it."""
    try:
        found = parse_json(body)
    except ValueError as error:
        raise bad(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise bad(f"the body is {show(found)}, expected a JSON object")
    known = {field.name for field in msgspec.structs.fields(kind)}
    given = {name: value for name, value in found.items() if value is not None}
    for name in [name for name in given if name not in known]:
        _refuse_unknown(name, given.pop(name))
    return convert(given, kind)


def convert(found: Mapping[str, Any], kind: type[Fields], where: str = "") -> Fields:
    """An object of JSON as fields; `where` says in the error which object it is."""
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        param = (where + path.rstrip("`")).lstrip(".") or None
        missing = re.fullmatch(r"Object missing required field `(\w+)`", message)
        if missing:
            param = f"{param}.{missing[1]}" if param else missing[1]
            raise bad(f"{param} is missing; it is required", param) from None
        raise bad(f"{param or 'the body'}: {message[0].lower()}{message[1:]}", param) from None


def _refuse_unknown(name: str, value: Any) -> None:
    """ApiError unless the field asks for nothing."""
    if name not in NEUTRAL:
        raise ApiError(400, f"{show(name)} is not supported; leave it out", name, "unsupported_parameter")
    if not any(one is _ANYTHING or (type(one) is type(value) and one == value) for one in NEUTRAL[name]):
        allowed = " or ".join(show(one) for one in NEUTRAL[name])
        raise ApiError(
            400,
            f"{name} is {show(value)}, which is not supported; leave it out, or send {allowed}",
            name,
            "unsupported_parameter",
        )
