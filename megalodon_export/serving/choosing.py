"""Choosing the next token of each stream of a batch, every stream by its own rules.

All that is computed for a row depends on that row alone, so a stream's tokens do not depend on its company.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..generation.sampling import SamplerKind, SamplingParams, choose, controls, device_uniform, wrap
from .streams import Stream, Token

_PLAIN = SamplingParams(temperature=1.0)  # stands in for greedy rows where others draw


class Chooser:
    """The parameters of a batch of streams, as tensors on the device. Made again when a stream joins or leaves."""

    def __init__(self, streams: list[Stream], device: torch.device, logits_size: int) -> None:
        self._streams, self._device = streams, device
        params = [stream.request.params for stream in streams]
        drawn = [row for row in params if not row.greedy]
        self._kind = SamplerKind.of(drawn) if drawn else SamplerKind.GREEDY
        self._mixed = bool(drawn) and len(drawn) < len(params)
        rows = [_PLAIN if row.greedy and drawn else row for row in params]
        self._controls = controls(rows).to(device)
        seeds = [wrap((row.seed + stream.index) % 2**64) for row, stream in zip(params, streams, strict=True)]
        self._seeds = torch.tensor(seeds, dtype=torch.int64, device="cpu").to(device)
        drawn_before = [len(stream.generated) for stream in streams]
        self._index = torch.tensor(drawn_before, dtype=torch.int64, device="cpu").to(device)
        self._greedy = torch.tensor([row.greedy for row in params], device="cpu").to(device)
        self._edits = {
            row: LogitEdits(stream, device, logits_size) for row, stream in enumerate(streams) if has_edits(stream)
        }
        self._logprob_rows = [row for row, stream in enumerate(streams) if stream.request.logprobs is not None]

    def choose(self, logits: Tensor) -> tuple[list[Token], list[int]]:
        """The next token of every stream from logits (B, V), and each row's logit error, 0 for none."""
        edited = logits
        if self._edits:
            edited = logits.clone()
            for row, edits in self._edits.items():
                edits.apply(edited[row])
        tokens, errors = self._choose(edited)
        self._index.add_(1)
        chosen, row_errors = torch.stack((tokens, errors)).tolist()
        for row, edits in self._edits.items():
            edits.count(chosen[row])
        found = [Token(token) for token in chosen]
        if self._logprob_rows:
            self._add_logprobs(logits, tokens, found)
        return found, row_errors

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self._kind is SamplerKind.GREEDY:
            return choose(logits, self._kind)
        drawn, errors = choose(logits, self._kind, self._controls, device_uniform(self._seeds, self._index))
        if not self._mixed:
            return drawn, errors
        best, _ = choose(logits, SamplerKind.GREEDY)
        return torch.where(self._greedy, best, drawn), errors

    def _add_logprobs(self, logits: Tensor, tokens: Tensor, found: list[Token]) -> None:
        rows = torch.tensor(self._logprob_rows, device="cpu").to(logits.device)
        most = max(self._streams[row].request.logprobs or 0 for row in self._logprob_rows)
        made = with_logprobs(logits[rows], tokens[rows], most)
        for row, token in zip(self._logprob_rows, made, strict=True):
            found[row] = Token(token.id, token.logprob, token.top[: self._streams[row].request.logprobs])


def with_logprobs(logits: Tensor, tokens: Tensor, most: int) -> list[Token]:
    """Tokens (B) with their logprobs under logits (B, V), and the `most` most probable ones beside each."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Token(*one) for one in zip(tokens.tolist(), own, tops, strict=True)]


def has_edits(stream: Stream) -> bool:
    """Whether something changes the logits of a stream."""
    rules = stream.request.rules
    penalties = rules.presence_penalty, rules.frequency_penalty, rules.repetition_penalty - 1.0
    return any(penalties) or bool(rules.bias) or stream.constraint is not None


class LogitEdits:
    """The penalties, the bias and the constraint of one stream."""

    def __init__(self, stream: Stream, device: torch.device, logits_size: int) -> None:
        self._rules, self._constraint = stream.request.rules, stream.constraint
        self._counts = _counts(stream.generated, logits_size, device)  # (V), of generated tokens
        seen = stream.request.prompt if self._rules.repetition_penalty != 1.0 else []
        self._in_prompt = _counts(seen, logits_size, device) > 0
        bias = torch.zeros(logits_size, dtype=torch.float32, device="cpu")
        for token, value in self._rules.bias.items():
            bias[token] = value
        self._bias = bias.to(device) if self._rules.bias else None

    def apply(self, logits: Tensor) -> None:
        """Change logits (V) in place."""
        rules = self._rules
        if rules.repetition_penalty != 1.0:
            seen = self._in_prompt | (self._counts > 0)
            scaled = torch.where(logits > 0, logits / rules.repetition_penalty, logits * rules.repetition_penalty)
            logits.copy_(torch.where(seen, scaled, logits))
        if rules.frequency_penalty:
            logits.sub_(self._counts * rules.frequency_penalty)
        if rules.presence_penalty:
            logits.sub_((self._counts > 0) * rules.presence_penalty)
        if self._bias is not None:
            logits.add_(self._bias)
        if self._constraint is not None:
            logits.masked_fill_(~self._constraint.mask().to(logits.device), -torch.inf)

    def count(self, token: int) -> None:
        """The stream has got a token."""
        self._counts[token] += 1.0


def _counts(tokens: object, size: int, device: torch.device) -> Tensor:
    ids = torch.tensor(tokens, dtype=torch.int64, device="cpu")
    return torch.bincount(ids, minlength=size)[:size].float().to(device)
