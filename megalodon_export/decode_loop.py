"""The generation loop: decode and sample on the device, token after token, while the host reads them some steps late.

One step feeds every row its last token and samples the next, all on the device; on CUDA it is one captured graph. The
tokens travel to the host behind the device's work, which runs up to `lookahead` steps ahead of what the host has
accepted. Whoever stops early rewinds: the stream is then exactly where stepping one by one would have left it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .model import MegalodonCache
from .runtimes import Runtime
from .sampling import Kind, SamplingParams, choose, controls, device_uniform, raise_faults, wrap

# One step ahead hides the host's turn between two steps, the second one its hiccups. A CPU has nothing to hide.
LOOKAHEAD = {"cpu": 0, "cuda": 2}


class DecodeLoop:
    """Generates over one cache: `start`, then `read` and `advance` in turn.

    Token i of a row is the one sampled after i others; the step that feeds it is step i. `fed` steps are accepted by
    the caller, `issued` steps have been started on the device, at most `lookahead` more. `rewind` takes those back; it
    needs `rewindable`, which copies the small states before each step that runs ahead. 0 steps ahead copy nothing.
    """

    def __init__(
        self, runtime: Runtime, cache: MegalodonCache, lookahead: int | None = None, rewindable: bool = True
    ) -> None:
        device, batch = runtime.device, cache.batch
        self.runtime, self.cache = runtime, cache
        self.prefill = runtime.prefiller(cache)
        self.lookahead = LOOKAHEAD[device.type] if lookahead is None else lookahead
        self._token_ids = torch.zeros(batch, dtype=torch.int64, device=device)  # sampled last, to be fed next
        self._index = torch.zeros((), dtype=torch.int64, device=device)  # tokens sampled since `start`
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self._controls = torch.zeros(4, batch, 1, dtype=torch.float64, device=device)
        self._result = torch.zeros(2, batch, dtype=torch.int64, device=device)  # token ids, faults
        on_gpu = device.type == "cuda"
        self._results = torch.zeros(self.lookahead + 1, 2, batch, dtype=torch.int64, pin_memory=on_gpu)
        self._arrived = [torch.cuda.Event() for _ in self._results] if on_gpu else []
        self._state = [*cache.states(), self._token_ids, self._index]
        self._saved = [[t.clone() for t in self._state] for _ in range(self.lookahead if rewindable else 0)]
        self._kind = Kind.GREEDY
        self._captured: dict[Kind, Callable[[], None]] = {}
        self._positions: list[int] = []
        self._last: list[int] = []
        self._steps = self._issued = self._fed = 0

    def start(self, logits: Tensor, rows: Sequence[SamplingParams], count: int) -> None:
        """Sample the first of `count` tokens from the logits (B, V) that the cache's last token gave, and run ahead.

        `rows` are the parameters of each row; their seeds are used from draw 0.
        """
        self._kind = Kind.of(rows)
        self._controls.copy_(controls(rows))
        self._seeds.copy_(torch.tensor([wrap(row.seed) for row in rows]))
        self._index.zero_()
        self._steps, self._issued, self._fed = count - 1, 0, 0
        # Only whoever can go back has to know where a chunk ends.
        self._positions = self.cache.position.tolist() if self._saved else []
        self._sample(logits)
        self._send()
        self._run_ahead()

    def read(self) -> list[int]:
        """The next token of every row; waits for it. ValueError if a row's logits were no distribution."""
        place = self._fed % len(self._results)
        if self._arrived:
            self._arrived[place].synchronize()
        self._last, faults = self._results[place].tolist()
        raise_faults(faults, self.runtime.config.logits_size)
        return self._last

    def advance(self) -> None:
        """Accept the tokens read last as fed, and go on. ValueError for a token id that the model has no row for."""
        self.runtime.check_range(min(self._last), max(self._last))
        if self._issued == self._fed:
            self._issue()
        self._fed += 1
        self._run_ahead()

    def rewind(self) -> None:
        """Take back the steps that ran ahead. The loop can go on afterwards."""
        if self._issued > self._fed:
            _copy(self._state, self._saved[self._fed % self.lookahead])
            self._issued = self._fed

    def forget(self) -> None:
        """The cache has been given another content: there is nothing to take back."""
        self._issued = self._fed

    def _run_ahead(self) -> None:
        while self._issued < min(self._fed + self.lookahead, self._steps) and self._can_be_taken_back():
            self._issue()

    def _can_be_taken_back(self) -> bool:
        """Whether going back over the next step restores what was visible.

        A step at the start of a chunk overwrites a slot that the chunk before sees, if there is a step of it to undo.
        """
        chunk = self.runtime.config.chunk_size
        starts = any((position + self._issued) % chunk == 0 for position in self._positions)
        return self._issued == self._fed or not starts

    def _issue(self) -> None:
        """Start one step."""
        if self._saved:
            _copy(self._saved[self._issued % self.lookahead], self._state)
        if not self.runtime.captures:
            self._step()
        else:
            if self._kind not in self._captured:
                from .runtimes.cuda_graph import CapturedStep

                self._captured[self._kind] = CapturedStep(self._step, self.cache, [self._token_ids, self._index])
            self._captured[self._kind]()
        self._issued += 1
        self._send()

    def _step(self) -> None:
        self._sample(self.runtime.run_decode(self._token_ids, self.cache))

    def _sample(self, logits: Tensor) -> None:
        draws = None if self._kind is Kind.GREEDY else device_uniform(self._seeds, self._index)
        tokens, faults = choose(logits, self._kind, self._controls, draws)
        torch.stack([tokens, faults], out=self._result)
        # A head wider than the vocabulary can choose what cannot be fed: `advance` refuses it, no program sees it.
        self._token_ids.copy_(tokens.clamp(max=self.runtime.config.vocab_size - 1))
        self._index.add_(1)

    def _send(self) -> None:
        """Copy the tokens sampled last to the host, behind what the device does now."""
        place = self._issued % len(self._results)
        self._results[place].copy_(self._result, non_blocking=True)
        if self._arrived:
            self._arrived[place].record()


def _copy(destination: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy tensor to tensor; lists of one dtype, which a GPU copies in one kernel."""
    for dtype in {tensor.dtype for tensor in destination}:
        old, new = ([tensor for tensor in tensors if tensor.dtype == dtype] for tensors in (destination, source))
        torch._foreach_copy_(old, new)


def padded_batch(runtime: Runtime, batch: int) -> int:
    """The rows to run for a batch, so that few sizes are captured: on CUDA the next power of two within the limit."""
    largest = runtime.limits.max_batch
    if runtime.device.type != "cuda" or not 1 <= batch <= largest:
        return batch
    return min(2 ** (batch - 1).bit_length(), largest)
