"""The generation loop: decode and sample on the device, token after token, while the host reads them some steps late.

One step feeds every row its last token and samples the next, all on the device; on CUDA it is one captured graph. The
tokens travel to the host behind the device's work, which runs up to `lookahead` steps ahead of what the host has
accepted. Whoever stops early rewinds: the stream is then exactly where stepping one by one would have left it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model import MegalodonCache
from ..runtimes import Runtime
from .sampling import Kind, SamplingParams, choose, controls, device_uniform, raise_faults, wrap

# One step ahead hides the host's turn between two steps, the second one its hiccups. A CPU has nothing to hide.
LOOKAHEAD = {"cpu": 0, "cuda": 2}
_KEEP_EVERY = 8  # steps: keeping takes a few microseconds, going back as many steps


class DecodeLoop:
    """Generates over one cache: `start`, then `read` and `advance` in turn.

    Token i of a row is the one sampled after i others; the step that feeds it is step i. `fed` steps are accepted by
    the caller, `issued` steps have been started on the device, at most `lookahead` more. `rewind` takes those back; it
    needs `rewindable`: every few steps the small states are kept, and going back starts from there. 0 steps ahead keep
    nothing.
    """

    def __init__(
        self, runtime: Runtime, cache: MegalodonCache, lookahead: int | None = None, rewindable: bool = True
    ) -> None:
        device, batch = runtime.device, cache.batch
        self.runtime, self.cache = runtime, cache
        self.prefill = runtime.prefiller(cache)
        self.lookahead = LOOKAHEAD[device.type] if lookahead is None else lookahead
        self._choice = torch.zeros(2, batch, dtype=torch.int64, device=device)  # tokens to be fed next, faults
        self._index = torch.zeros((), dtype=torch.int64, device=device)  # tokens sampled since `start`
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self._controls = torch.zeros(4, batch, 1, dtype=torch.float64, device=device)
        on_gpu = device.type == "cuda"
        self._results = torch.zeros(self.lookahead + 1, 2, batch, dtype=torch.int64, pin_memory=on_gpu)
        self._arrived = [torch.cuda.Event() for _ in self._results] if on_gpu else []
        self._state = [*cache.states(), self._choice, self._index]
        # Two: the last one may be of a step that is not accepted yet.
        self._kept = [[t.clone() for t in self._state] for _ in range(2 if self.lookahead and rewindable else 0)]
        self._kept_at: list[int] = []  # the steps before which they were kept, the last one first
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
        self._positions = self.cache.position.tolist() if self._kept else []
        self._kept_at = []
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
        if self._issued == self._fed:
            return
        step = next(step for step in self._kept_at if step <= self._fed)
        _copy(self._state, self._kept[self._kept_at.index(step)])
        for _ in range(step, self._fed):
            self._run()
        self._issued = self._fed

    def forget(self) -> None:
        """The cache has been given another content: there is nothing to take back."""
        self._issued = self._fed

    def _run_ahead(self) -> None:
        while self._issued < min(self._fed + self.lookahead, self._steps):
            if self._issued > self._fed and self._starts_a_chunk():
                break  # until the step before it is accepted: see `_keep`
            self._issue()

    def _starts_a_chunk(self) -> bool:
        """Whether the next step does, in any row."""
        chunk = self.runtime.config.chunk_size
        return any((position + self._issued) % chunk == 0 for position in self._positions)

    def _keep(self) -> None:
        """Keep the small states before the next step, if it is time to.

        Going back repeats steps, which then see the ring as it was: a step writes what it wrote. But at the start of
        a chunk it overwrites a slot that the chunk before sees, so nobody goes back to before such a step.
        """
        fresh = self._starts_a_chunk()
        if fresh:
            self._kept_at = []
        if fresh or not self._kept_at or self._issued - self._kept_at[0] >= _KEEP_EVERY + self.lookahead:
            self._kept.reverse()
            _copy(self._kept[0], self._state)
            self._kept_at = [self._issued, *self._kept_at[:1]]

    def _issue(self) -> None:
        """Start one step."""
        if self._kept:
            self._keep()
        self._run()
        self._issued += 1
        self._send()

    def _run(self) -> None:
        if not self.runtime.captures:
            return self._step()
        if self._kind not in self._captured:
            from ..runtimes.cuda_graph import CapturedStep

            self._captured[self._kind] = CapturedStep(self._step, self.cache, [self._choice, self._index])
        self._captured[self._kind]()

    def _step(self) -> None:
        token_ids, config = self._choice[0], self.runtime.config
        if config.logits_size > config.vocab_size:
            # Such a head can choose what cannot be fed: `advance` refuses it, no program sees it.
            token_ids = token_ids.clamp(max=config.vocab_size - 1)
        if self._kind is Kind.GREEDY:
            self.runtime.run_greedy(token_ids, self.cache, self._choice)
        else:
            self._sample(self.runtime.run_decode(token_ids, self.cache))

    def _sample(self, logits: Tensor) -> None:
        draws = None if self._kind is Kind.GREEDY else device_uniform(self._seeds, self._index)
        torch.stack(choose(logits, self._kind, self._controls, draws), out=self._choice)
        self._index.add_(1)

    def _send(self) -> None:
        """Copy the tokens sampled last to the host, behind what the device does now."""
        place = self._issued % len(self._results)
        self._results[place].copy_(self._choice, non_blocking=True)
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
