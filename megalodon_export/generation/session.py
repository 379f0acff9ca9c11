"""Sessions: text in, text out, over any runtime. A session owns the state of its stream; the runtime owns the weights.

Example:

session = megalodon_export.load(BUNDLE, runtime="aoti")
for piece in session.generate("In the beginning", max_new_tokens=64):
    print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..bundles import bundle
from ..bundles.manifest import TOKENIZER
from ..model import ModelCache
from ..runtimes import Runtime, default_runtime, open_runtime
from .decode_loop import DecodeLoop, padded_batch
from .sampling import SamplingParams
from .snapshot import Snapshot, copy_state
from .text import TextStream


class SessionError(RuntimeError):
    """The session cannot be used: an earlier call failed half-way, so its state is unknown until `reset`."""


def load(folder: str | Path, runtime: str | None = None, device: str | None = None, check: bool = True) -> Session:
    """Open a bundle and start a session on it.

    `runtime` is "aoti", "onnx" or "eager". By default it is "aoti", or "onnx" for a bundle with ONNX programs alone.
    `device` is "cpu" or "cuda". By default AOTInductor takes the one that its programs are for, and the other runtimes
    take CUDA where there is a GPU.
    `check=False` skips the hashes, for a folder that was verified before. Sizes are always checked.
    BundleError for a damaged bundle, RuntimeUnavailable where its programs cannot run here.
    """
    folder = Path(folder)
    manifest = bundle.read(folder, check="full" if check else "sizes")
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER)) if (folder / TOKENIZER).is_file() else None
    return Session(open_runtime(runtime or default_runtime(manifest), folder, manifest, device), tokenizer)


class Session:
    """One stream of tokens, which may run forever at constant memory.

    `generate` continues the stream: text generated before is context. `reset` starts a new stream. After a
    ValueError the session can be used on. After any other error inside a call, it refuses further calls until `reset`
    or `restore`.
    """

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer | None = None, lookahead: int | None = None) -> None:
        """`lookahead`: steps that the device may run before the reader asks; by default 0 on a CPU, 2 on a GPU."""
        self.runtime, self.tokenizer = runtime, tokenizer
        self.programs = runtime.bind(runtime.new_cache(1))
        self._lookahead = lookahead
        self._loop = DecodeLoop(self.programs, lookahead)
        self._batch_loop: DecodeLoop | None = None  # of the last batch; one of the same size uses its CUDA graphs again
        self._pending: int | None = None  # sampled and returned, not yet fed
        self._broken = False
        self._moves = 0  # calls that moved the stream, so that a generator notices those made meanwhile

    @property
    def cache(self) -> ModelCache:
        """The stream's state. The token that `generate` returned last is not in it yet."""
        self._roll_back()
        return self.programs.cache

    def fork(self) -> Session:
        """A new session on the same weights, at the same point of the stream."""
        self._check_usable()
        other = Session(self.runtime, self.tokenizer, self._lookahead)
        copy_state(self.runtime.config, self.programs.cache, other.programs.cache)
        other._pending = self._pending
        return other

    def reset(self) -> None:
        """Forget the stream."""
        self._loop.discard_lookahead()
        self.programs.cache.reset()
        self._pending, self._broken = None, False
        self._moves += 1

    def snapshot(self) -> Snapshot:
        """A copy of the stream's state. `Snapshot.save` and `Snapshot.load` keep it on disk.

        It holds the keys and values of the current chunk alone, so it is small where a chunk ends.
        """
        self._check_usable()
        return Snapshot.of(self.runtime.config, self.programs.cache, self._pending, self.runtime.model_id)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this model; ValueError, with the stream as it was, for any other."""
        if not isinstance(snapshot, Snapshot):
            kind = type(snapshot).__name__
            raise TypeError(f"restore takes a Snapshot, not {kind}; Snapshot.load reads one from a file")
        snapshot.check(self.runtime.config, self.runtime.dtype, self.runtime.model_id)
        self._loop.discard_lookahead()
        with self._poisoning():
            snapshot.copy_to(self.runtime.config, self.programs.cache)
        self._pending, self._broken = snapshot.pending, False
        self._moves += 1

    def prefill(self, token_ids: Sequence[int]) -> Tensor:
        """Feed tokens; float32 logits (V) after the last. For callers that choose tokens themselves."""
        fed = [*([] if self._pending is None else [self._pending]), *token_ids]
        if not fed:
            raise ValueError("there are no tokens to feed; give at least one")
        with self._guarded():
            ids = torch.tensor([fed])  # on the host, where ids are checked before they are uploaded
            lengths = torch.tensor([len(fed)])
            logits = self.programs.prefill(ids, lengths)[0]
        self._pending = None
        return logits

    def decode(self, token_id: int) -> Tensor:
        """Feed one token; float32 logits (V)."""
        if self._pending is not None:
            return self.prefill([token_id])
        with self._guarded():
            return self.programs.decode(torch.tensor([token_id]))[0].clone()

    def generate(
        self,
        prompt: str = "",
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """Feed a prompt and stream the continuation as pieces of text, each as soon as it is certain.

        `sampling` are the fields of SamplingParams (temperature 0, the default, is greedy). Ends at `max_new_tokens`,
        at the model's end-of-sequence token, or before the first of the `stop` strings.
        """
        tokenizer = self._tokenizer()
        text = TextStream(tokenizer, stop)
        for token_id in self.generate_ids(tokenizer.encode(prompt).ids, max_new_tokens, **sampling):
            piece = text.push(token_id)
            if piece:
                yield piece
            if text.stopped:
                return
        if piece := text.flush():
            yield piece

    def generate_ids(
        self, prompt: Sequence[int] = (), max_new_tokens: int = 256, eos_token_id: int | None = None, **sampling: Any
    ) -> Iterator[int]:
        """Feed a prompt of token ids and yield the continuation's ids; see `generate` for the other arguments.

        `eos_token_id` replaces the model's end-of-sequence token; -1 turns it off.
        """
        params = SamplingParams(**sampling)
        _check_count(max_new_tokens)
        eos = self.runtime.config.eos_token_id if eos_token_id is None else eos_token_id
        loop, logits = self._loop, self.prefill(self._opening(prompt))
        moves = self._moves
        try:
            with self._poisoning():
                loop.start(logits[None], [params], max_new_tokens)
            for index in range(max_new_tokens):
                (token_id,) = loop.read()
                self._pending = token_id
                if token_id == eos:
                    return
                yield token_id
                if index + 1 < max_new_tokens:
                    if self._moves != moves:
                        raise SessionError("the stream was moved while it was being generated; use a fork for that")
                    with self._poisoning():
                        loop.advance()
                    self._pending = None
        finally:
            self._roll_back()

    def generate_batch(
        self, prompts: Sequence[str], max_new_tokens: int = 256, stop: Sequence[str] = (), **sampling: Any
    ) -> list[str]:
        """Continue several prompts of any lengths side by side, each as a fresh stream; this one is not touched.

        Row i samples with seed + i, so a row's text does not depend on which rows share the batch.
        """
        tokenizer, runtime = self._tokenizer(), self.runtime
        base = SamplingParams(**sampling)
        _check_count(max_new_tokens)
        rows = [replace(base, seed=base.seed + i) for i in range(len(prompts))]
        ids = [self._with_start(tokenizer.encode(prompt).ids) for prompt in prompts]
        loop, self._batch_loop = self._loop_for(len(prompts)), None
        rows += [base] * (loop.cache.batch - len(rows))
        logits = _prefill_rows(loop, ids)
        loop.start(logits, rows, max_new_tokens)
        streams = [TextStream(tokenizer, stop) for _ in prompts]
        texts, done = [""] * len(prompts), [False] * len(prompts)
        for index in range(max_new_tokens):
            for i, token_id in enumerate(loop.read()[: len(prompts)]):
                if not done[i] and token_id != runtime.config.eos_token_id:
                    texts[i] += streams[i].push(token_id)
                done[i] = done[i] or token_id == runtime.config.eos_token_id or streams[i].stopped
            if all(done) or index + 1 == max_new_tokens:
                break
            loop.advance()
        self._batch_loop = loop
        return [text + ("" if s.stopped else s.flush()) for text, s in zip(texts, streams, strict=True)]

    def _loop_for(self, batch: int) -> DecodeLoop:
        """A loop over at least `batch` fresh streams. The last batch's loop, if of that size, keeps its CUDA graphs."""
        rows, loop = padded_batch(self.runtime, batch), self._batch_loop
        if loop is not None and loop.cache.batch == rows:
            loop.cache.reset()
            return loop
        self._batch_loop = loop = None  # frees its memory before the new cache is allocated
        programs = self.runtime.bind(self.runtime.new_cache(rows))
        return DecodeLoop(programs, self._lookahead, can_roll_back=False)

    def _opening(self, prompt: Sequence[int]) -> Sequence[int]:
        fresh = self._pending is None and int(self.cache.position[0]) == 0
        return self._with_start(prompt) if fresh else prompt

    def _with_start(self, prompt: Sequence[int]) -> Sequence[int]:
        """The prompt, or the beginning-of-sequence token for an empty one: a stream must begin with some token."""
        start = self.runtime.config.bos_token_id
        if prompt:
            return prompt
        if start is None:
            raise ValueError("the prompt is empty and the model has no bos_token_id to begin with; give some text")
        return [start]

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"the bundle has no {TOKENIZER}; use generate_ids with token ids")
        return self.tokenizer

    def _check_usable(self) -> None:
        if self._broken:
            raise SessionError(
                "an earlier call failed half-way, so the stream's state is unknown; call reset or restore"
            )
        self._roll_back()

    def _roll_back(self) -> None:
        """Roll the cache back to where the stream is, if the device is ahead of it."""
        if not self._broken:
            self._loop.roll_back()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        self._check_usable()
        self._moves += 1
        with self._poisoning():
            yield

    @contextmanager
    def _poisoning(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # refused before anything ran
            raise
        except BaseException:
            self._broken = True
            raise


def _prefill_rows(loop: DecodeLoop, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Feed each prompt to its row of a loop's fresh cache, nothing to the rows beyond; logits (B, V)."""
    batch = loop.cache.batch
    lengths = torch.tensor([*map(len, prompts), *[0] * (batch - len(prompts))])
    padded = torch.zeros(batch, int(lengths.max()), dtype=torch.int64)
    for row, tokens in zip(padded, prompts, strict=False):
        row[: len(tokens)] = torch.tensor(tokens)
    return loop.programs.prefill(padded, lengths)


def _check_count(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
