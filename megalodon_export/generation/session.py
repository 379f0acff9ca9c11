"""Sessions: text in, text out, over any runtime. A session owns the state of its stream; the runtime owns the weights.

Example:

session = megalodon_export.load(BUNDLE, runtime="aoti")
for piece in session.generate("In the beginning", max_new_tokens=64):
    print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..bundles import bundle
from ..bundles.manifest import TOKENIZER
from ..model import ModelCache
from ..runtimes import PlainModes, Runtime, check_runtime, default_runtime, open_runtime
from .arguments import device as device_name
from .arguments import integer, is_integer, path, plain, show, stop_strings, switch, text, texts, token_id, token_ids
from .decode_loop import MOST_LOOKAHEAD, DecodeLoop, padded_batch
from .sampling import SamplingParams
from .snapshot import Snapshot, copy_state
from .text import TextStream


class SessionError(RuntimeError):
    """The session cannot be used now.

    Another call is using it, or an earlier call failed half-way, so that its state is unknown until `reset`.
    """


def load(folder: str | Path, runtime: str | None = None, device: str | None = None, check: bool = True) -> Session:
    """Open a bundle and start a session on it.

    `runtime` is "aoti", "onnx" or "eager". By default it is "aoti", or "onnx" for a bundle with ONNX programs alone.
    `device` is "cpu" or "cuda". By default AOTInductor takes the one that its programs are for, and the other runtimes
    take CUDA where there is a GPU.
    `check=False` skips the hashes, for a folder that was verified before. Sizes are always checked.
    BundleError for a damaged bundle, RuntimeUnavailable where its programs cannot run here.
    """
    folder, device, check = path(folder, "the bundle"), device_name(device), switch("check", check)
    if runtime is not None:
        check_runtime(runtime)
    manifest = bundle.read(folder, check="full" if check else "sizes")
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER)) if (folder / TOKENIZER).is_file() else None
    return Session(
        open_runtime(default_runtime(manifest) if runtime is None else runtime, folder, manifest, device), tokenizer
    )


class Session:
    """One stream of tokens, which may run forever at constant memory.

    `generate` continues the stream: text generated before is context. `reset` starts a new stream. After a
    ValueError the session can be used on: wrong arguments are refused before anything is fed. After any other error
    inside a call, it refuses further calls until `reset` or `restore`.

    One call at a time: a second one, from another thread, is refused with a SessionError. A generation is in use while
    it computes a token, not between two tokens. The modes of the caller's thread (inference mode, autocast) change
    nothing. In a child of os.fork() a session of the parent is refused with a ForkedProcess.
    """

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer | None = None, lookahead: int | None = None) -> None:
        """`lookahead`: steps that the device may run before the reader asks; by default 0 on a CPU, 2 on a GPU."""
        _require("runtime", runtime, Runtime, "a Runtime, such as that of another session")
        if tokenizer is not None:
            _require("tokenizer", tokenizer, Tokenizer, "a Tokenizer of the package tokenizers, or None")
        lookahead = None if lookahead is None else integer("lookahead", lookahead, 0, MOST_LOOKAHEAD)
        self.runtime, self.tokenizer = runtime, tokenizer
        self.programs = runtime.bind(runtime.new_cache(1))
        self._lookahead = lookahead
        with PlainModes():
            self._loop = DecodeLoop(self.programs, lookahead)
        self._batch_loop: DecodeLoop | None = None  # of the last batch; one of the same size uses its CUDA graphs again
        self._pending: int | None = None  # sampled and returned, not yet fed
        self._broken = False
        self._moves = 0  # calls that moved the stream, so that a generator notices those made meanwhile
        self._lock = Lock()  # held by the one call at a time that may use the session

    @property
    def cache(self) -> ModelCache:
        """The stream's state. The token that `generate` returned last is not in it yet."""
        with self._in_use():
            self._roll_back()
            return self.programs.cache

    def fork(self) -> Session:
        """A new session on the same weights, at the same point of the stream."""
        with self._usable():
            other = Session(self.runtime, self.tokenizer, self._lookahead)
            copy_state(self.runtime.config, self.programs.cache, other.programs.cache)
            other._pending = self._pending
            return other

    def reset(self) -> None:
        """Forget the stream."""
        with self._in_use():
            self._loop.discard_lookahead()
            self.programs.cache.reset()
            self._pending, self._broken = None, False
            self._moves += 1

    def snapshot(self) -> Snapshot:
        """A copy of the stream's state. `Snapshot.save` and `Snapshot.load` keep it on disk.

        It holds the keys and values of the current chunk alone, so it is small where a chunk ends.
        """
        with self._usable():
            return Snapshot.of(self.runtime.config, self.programs.cache, self._pending, self.runtime.model_id)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this model; ValueError, with the stream as it was, for any other."""
        if not isinstance(snapshot, Snapshot):
            kind = type(snapshot).__name__
            raise TypeError(f"restore takes a Snapshot, not {kind}; Snapshot.load reads one from a file")
        with self._in_use():
            snapshot.check(self.runtime.config, self.runtime.dtype, self.runtime.model_id)
            self._loop.discard_lookahead()
            with self._poisoning():
                snapshot.copy_to(self.runtime.config, self.programs.cache)
            self._pending, self._broken = snapshot.pending, False
            self._moves += 1

    def prefill(self, token_ids: Sequence[int]) -> Tensor:
        """Feed tokens; float32 logits (V) after the last. For callers that choose tokens themselves."""
        ids = self._ids(token_ids)
        with self._moving():
            return self._feed(ids)

    def decode(self, token_id: int) -> Tensor:
        """Feed one token; float32 logits (V)."""
        one = self._id(token_id)
        with self._moving():
            if self._pending is not None:
                return self._feed([one])
            return self.programs.step(_on_host([one]))[0].clone()

    def generate(
        self,
        prompt: str = "",
        max_new_tokens: int = 256,
        stop: str | Iterable[str] | None = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """Feed a prompt and stream the continuation as pieces of text, each as soon as it is certain.

        `sampling` are the fields of SamplingParams (temperature 0, the default, is greedy). Ends at `max_new_tokens`,
        at the model's end-of-sequence token, or before the first of the `stop` strings. Arguments are checked at the
        call; the prompt is fed when the first piece is asked for.
        """
        tokenizer = self._tokenizer()
        stream = TextStream(tokenizer, stop)
        return _pieces(stream, self.generate_ids(tokenizer.encode(text(prompt)).ids, max_new_tokens, **sampling))

    def generate_ids(
        self, prompt: Sequence[int] = (), max_new_tokens: int = 256, eos_token_id: int | None = None, **sampling: Any
    ) -> Iterator[int]:
        """Feed a prompt of token ids and yield the continuation's ids; see `generate` for the other arguments.

        `eos_token_id` replaces the model's end-of-sequence token; -1 turns it off.
        """
        params = SamplingParams(**sampling)
        count = integer("max_new_tokens", max_new_tokens, 1)
        eos = self.runtime.config.eos_token_id if eos_token_id is None else self._eos(eos_token_id)
        return self._tokens(self._ids(prompt), count, eos, params)

    def _tokens(self, prompt: list[int], count: int, eos: int | None, params: SamplingParams) -> Iterator[int]:
        with self._moving():
            logits = self._feed(self._opening(prompt))
            self._loop.start(logits[None], [params], count)
        moves = self._moves
        for index in range(count):
            with self._in_use():
                if self._moves != moves:
                    raise SessionError("the stream was moved while it was being generated; use a fork for that")
                with self._poisoning():
                    if index:
                        self._loop.advance()
                        self._pending = None
                    (token,) = self._loop.read()
                    self._pending = token
            if token == eos:
                return
            yield token

    def generate_batch(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 256,
        stop: str | Iterable[str] | None = (),
        **sampling: Any,
    ) -> list[str]:
        """Continue several prompts of any lengths side by side, each as a fresh stream; this one is not touched.

        Row i samples with seed + i modulo 2**64, so a row's text does not depend on which rows share the batch.
        """
        tokenizer, params = self._tokenizer(), SamplingParams(**sampling)
        count, stops = integer("max_new_tokens", max_new_tokens, 1), stop_strings(stop)
        encoded = [tokenizer.encode(prompt).ids for prompt in texts(prompts)]
        ids = [self._with_start(self._ids(row, f" of prompt {i}")) for i, row in enumerate(encoded)]
        with self._in_use():
            return self._continue_all(ids, count, [TextStream(tokenizer, stops) for _ in ids], params)

    def _continue_all(
        self, prompts: list[list[int]], count: int, streams: list[TextStream], params: SamplingParams
    ) -> list[str]:
        loop, self._batch_loop = self._loop_for(len(prompts)), None
        rows = [replace(params, seed=(params.seed + i) % 2**64) for i in range(loop.cache.batch)]
        loop.start(_prefill_rows(loop, prompts), rows, count)
        written, done, eos = [""] * len(prompts), [False] * len(prompts), self.runtime.config.eos_token_id
        for index in range(count):
            for i, token in enumerate(loop.read()[: len(prompts)]):
                if not done[i] and token != eos:
                    written[i] += streams[i].push(token)
                done[i] = done[i] or token == eos or streams[i].stopped
            if all(done) or index + 1 == count:
                break
            loop.advance()
        self._batch_loop = loop
        return [part + ("" if s.stopped else s.flush()) for part, s in zip(written, streams, strict=True)]

    def _loop_for(self, batch: int) -> DecodeLoop:
        """A loop over at least `batch` fresh streams. The last batch's loop, if of that size, keeps its CUDA graphs."""
        rows, loop = padded_batch(self.runtime, batch), self._batch_loop
        if loop is not None and loop.cache.batch == rows:
            loop.cache.reset()
            return loop
        self._batch_loop = loop = None  # frees its memory before the new cache is allocated
        programs = self.runtime.bind(self.runtime.new_cache(rows))
        return DecodeLoop(programs, self._lookahead, can_roll_back=False)

    def _feed(self, ids: list[int]) -> Tensor:
        """Feed the pending token and others; logits (V) after the last."""
        fed = ids if self._pending is None else [self._id(self._pending), *ids]
        if not fed:
            raise ValueError("there are no tokens to feed; give at least one")
        logits = self.programs.feed(_on_host([fed]), _on_host([len(fed)]))[0]
        self._pending = None
        return logits

    def _opening(self, prompt: list[int]) -> list[int]:
        fresh = self._pending is None and int(self.programs.cache.position[0]) == 0
        return self._with_start(prompt) if fresh else prompt

    def _with_start(self, prompt: list[int]) -> list[int]:
        """The prompt, or the beginning-of-sequence token for an empty one: a stream must begin with some token."""
        start = self.runtime.config.bos_token_id
        if prompt:
            return prompt
        if start is None:
            raise ValueError("the prompt is empty and the model has no bos_token_id to begin with; give some text")
        return [start]

    def _ids(self, values: object, whose: str = "") -> list[int]:
        return token_ids(values, self.runtime.config.vocab_size, whose)

    def _id(self, value: object) -> int:
        return token_id(value, self.runtime.config.vocab_size)

    def _eos(self, value: object) -> int:
        size, one = self.runtime.config.logits_size, plain(value)
        if not is_integer(one) or not -1 <= one < size:
            raise ValueError(f"eos_token_id is {show(one)}, expected 0..{size - 1}, or -1 for none")
        return int(one)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"the bundle has no {TOKENIZER}; use generate_ids with token ids")
        return self.tokenizer

    def _roll_back(self) -> None:
        """Roll the cache back to where the stream is, if the device is ahead of it."""
        if not self._broken:
            self._loop.roll_back()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """A call that uses the session alone, in this process, in modes of its own."""
        self.runtime.check_process()
        if not self._lock.acquire(blocking=False):
            raise SessionError("the session is in use by another call; use a fork for that, or wait")
        try:
            with PlainModes():
                yield
        finally:
            self._lock.release()

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """A call that needs the stream's state: where it is, without lookahead."""
        with self._in_use():
            if self._broken:
                raise SessionError(
                    "an earlier call failed half-way, so the stream's state is unknown; call reset or restore"
                )
            with self._poisoning():
                self._roll_back()
                yield

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """A call that moves the stream."""
        with self._usable():
            self._moves += 1
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


def _require(name: str, value: object, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is of type {type(value).__name__}, expected {expected}")


def _pieces(stream: TextStream, ids: Iterator[int]) -> Iterator[str]:
    """The text of token ids, up to a stop string."""
    for token in ids:
        if piece := stream.push(token):
            yield piece
        if stream.stopped:
            return
    if piece := stream.flush():
        yield piece


def _on_host(values: list[Any]) -> Tensor:
    """Whole numbers on the CPU, whatever torch's default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _prefill_rows(loop: DecodeLoop, prompts: list[list[int]]) -> Tensor:
    """Feed each prompt to its row of a loop's fresh cache, nothing to the rows beyond; logits (B, V)."""
    batch, longest = loop.cache.batch, max(map(len, prompts))
    lengths = _on_host([*map(len, prompts), *[0] * (batch - len(prompts))])
    padded = torch.zeros(batch, longest, dtype=torch.int64, device="cpu")
    for row, tokens in zip(padded, prompts, strict=False):
        row[: len(tokens)] = _on_host(tokens)
    return loop.programs.feed(padded, lengths)
