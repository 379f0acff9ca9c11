"""Chats as text: by the tokenizer's template, by one that is given, or by a plain one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from .errors import ApiError, bad

# For models that know no roles: the texts of the messages, one a line; the model goes on with the last.
PLAIN = (
    "{%- for message in messages -%}{{ message.content }}{%- if not loop.last -%}{{ '\\n' }}{%- endif -%}{%- endfor -%}"
)
_ROLES = ("system", "developer", "user", "assistant")
Messages = Sequence[dict[str, Any]]


class ChatTemplate:
    """Renders messages to the text that a model continues."""

    def __init__(self, source: str, tokens: dict[str, str] | None = None) -> None:
        """`tokens`: the special tokens by the names that templates use, such as bos_token. ValueError for a bad one."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error
        self.source, self._tokens = source, tokens or {}

    @classmethod
    def of_bundle(cls, bundle: Path, given: Path | None = None) -> ChatTemplate:
        """The template of a file that is given, else the bundle's own, else the plain one."""
        config = _read_json(bundle / "tokenizer_config.json")
        tokens = {name: _token(value) for name, value in config.items() if name.endswith("_token") and value}
        if given is not None:
            return cls(given.read_text(encoding="utf-8"), tokens)
        own = bundle / "chat_template.jinja"
        source = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
        return cls(source if isinstance(source, str) else PLAIN, tokens)

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The text of a chat; ApiError if the template refuses it."""
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                **self._tokens,
            )  # fmt: skip
        except jinja2.TemplateError as error:
            raise bad(f"the chat template refuses these messages: {error}", "messages") from None
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, MemoryError) as error:
            raise bad(f"the chat template cannot render these messages: {error}", "messages") from None

    def render_turn(self, messages: Messages) -> str:
        """The text that follows a chat whose last answer has been generated: new messages alone.

        Found by rendering a chat with and without them. ApiError for a template whose text is no continuation.
        """
        before: Messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        begun = self.render(before, add_generation_prompt=False)
        whole = self.render([*before, *messages])
        if not whole.startswith(begun):
            raise ApiError(400, "the chat template cannot go on from a stored response", "previous_response_id")
        return whole[len(begun) :]


def message_texts(messages: Sequence[Any], param: str) -> list[dict[str, Any]]:
    """Messages as a template takes them: a role and a text each. ApiError for what is not text."""
    return [_message(message, f"{param}[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    given = {name: value for name, value in message.items() if value is not None}
    allowed = {"role", "content", "name", "type", "id", "status"}
    for name in given.keys() - allowed:
        if given[name] != []:
            raise ApiError(400, f"{where}.{name} is not supported; leave it out", where, "unsupported_parameter")
    role, content = given.get("role"), given.get("content")
    if role not in _ROLES:
        raise bad(f"{where}.role is {role!r:.80}, expected one of {', '.join(_ROLES)}", f"{where}.role")
    if given.get("type", "message") != "message":
        raise bad(f"{where}.type is {given['type']!r:.80}, expected message", f"{where}.type")
    found = {"role": role, "content": _text(content, f"{where}.content")}
    if isinstance(given.get("name"), str):
        found["name"] = given["name"]
    return found


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(f"{where} is missing or no text, expected a text or a list of parts of text", where)
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise bad(f"{where}[{index}] is no part of text; other kinds are not supported", f"{where}[{index}]")
        parts.append(part["text"])
    return "".join(parts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _token(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
