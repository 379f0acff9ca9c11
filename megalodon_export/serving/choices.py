"""What completions, chats and responses count and collect alike."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .fields import StreamOptions
from .generation import Generation
from .streams import StreamState, Token, Update


@dataclass
class Choice:
    """One answer, or a part of one."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    reason: str | None = None
    state: StreamState | None = None
    pending: int | None = None

    def add(self, update: Update) -> None:
        """Add what is new."""
        self.text += update.text
        self.tokens += update.tokens
        self.prompt += update.prompt
        self.reason, self.state, self.pending = update.finish_reason, update.state, update.pending


class Usage:
    """Counts tokens. Choice i belongs to prompt i // n; a prompt is counted once, however many choices it has."""

    def __init__(self, prompts: Sequence[int], n: int) -> None:
        self.prompt_tokens, self.completion_tokens, self._n = sum(prompts), 0, n
        self._cached: dict[int, int] = {}

    @property
    def cached_tokens(self) -> int:
        """Tokens of prompts that were not fed."""
        return sum(self._cached.values())

    def add(self, index: int, update: Update) -> None:
        """Count what is new in a choice."""
        self.completion_tokens += len(update.tokens)
        prompt = index // self._n
        self._cached[prompt] = max(self._cached.get(prompt, 0), update.cached_tokens)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


async def choices_of(generation: Generation, usage: Usage) -> list[Choice]:
    """All choices, when they are over."""
    choices = [Choice() for _ in generation.streams]
    async for index, update in generation.updates():
        usage.add(index, update)
        choices[index].add(update)
    return choices


def usage_wanted(options: StreamOptions | None) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether every chunk has it."""
    if options is None:
        return False, False
    always = bool(options.continuous_usage_stats)
    return bool(options.include_usage) or always, always


def new_id(kind: str) -> str:
    """An id that nobody can guess."""
    return f"{kind}-{secrets.token_hex(16)}" if kind in ("cmpl", "chatcmpl") else f"{kind}_{secrets.token_hex(24)}"
