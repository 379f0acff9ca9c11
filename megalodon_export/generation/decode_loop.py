"""The generation loop: decode and sample on the device, token after token, while the host reads them some steps late.

One step feeds every row its last token and samples the next, all on the device; on CUDA it is one captured graph. The
results travel to the host behind the device's work, which is up to `lookahead` steps ahead of the tokens that the
caller has accepted. A caller that stops early rolls back: the stream is then exactly where stepping one by one would
have left it.

Example with a lookahead of 2, after the caller has accepted the tokens of steps 0 and 1:

    step       0    1    2    3
    launched   yes  yes  yes  yes    launched = 4
    accepted   yes  yes  no   no     accepted = 2; `roll_back` takes steps 2 and 3 back
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..runtimes import BoundPrograms, Runtime
from .arguments import token_ids
from .sampling import SamplerKind, SamplingParams, choose, controls, device_uniform, raise_logit_errors, wrap

# On a GPU, one step of lookahead hides the host's work between two steps, and a second one its variation. A CPU runs
# steps on the host itself, so there is nothing to hide.
LOOKAHEAD = {"cpu": 0, "cuda": 2}
MOST_LOOKAHEAD = 256  # rolling back would replay as many steps
# A checkpoint is saved every 8 + lookahead steps and takes microseconds. Rolling back replays at most 7 + lookahead.
_CHECKPOINT_INTERVAL = 8


class DecodeLoop:
    """Generates over one cache: `start`, then `read` and `advance` alternately.

    Token i of a row is sampled after i others, and step i feeds it. Rolling back needs a loop made with
    `can_roll_back`, which saves a checkpoint of the small states every few steps. Without lookahead there is nothing
    to roll back and no checkpoint is saved.
    """

    def __init__(self, programs: BoundPrograms, lookahead: int | None = None, can_roll_back: bool = True) -> None:
        runtime, cache = programs.runtime, programs.cache
        device, batch = runtime.device, cache.batch
        self.programs, self.runtime, self.cache = programs, runtime, cache
        self.lookahead = LOOKAHEAD.get(device.type, 0) if lookahead is None else lookahead
        self._next_tokens = torch.zeros(2, batch, dtype=torch.int64, device=device)  # to be fed next; logit errors
        self._index = torch.zeros((), dtype=torch.int64, device=device)  # tokens sampled since `start`
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self._controls = torch.zeros(4, batch, 1, dtype=torch.float64, device=device)
        on_gpu = device.type == "cuda"
        # The host's copies of `next_tokens`, used in turn, and the events after which they have arrived.
        size = (self.lookahead + 1, 2, batch)
        self._results = torch.zeros(size, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self._arrived = [torch.cuda.Event() for _ in self._results] if on_gpu else []
        self._state = [*cache.states(), self._next_tokens, self._index]
        # Two: the newest may be of a step that is not accepted yet.
        count = 2 if self.lookahead and can_roll_back else 0
        self._checkpoints = [[t.clone() for t in self._state] for _ in range(count)]
        self._checkpoint_steps: list[int] = []  # the steps before which they were saved, the newest first
        self._kind = SamplerKind.GREEDY
        self._captured: dict[SamplerKind, Callable[[], None]] = {}
        self._positions: list[int] = []
        self._last: list[int] = []
        self._steps = self._launched = self._accepted = 0

    def start(self, logits: Tensor, params: Sequence[SamplingParams], count: int) -> None:
        """Sample the first of `count` tokens from logits (B, V), those after the cache's last token, and launch steps.

        `params` has the parameters of each row; their seeds are used from draw 0.
        """
        self._kind = SamplerKind.of(params)
        self._controls.copy_(controls(params))
        self._seeds.copy_(torch.tensor([wrap(row.seed) for row in params], device="cpu"))
        self._index.zero_()
        self._steps, self._launched, self._accepted = count - 1, 0, 0
        # Only a loop that can roll back has to know where a chunk ends.
        self._positions = self.cache.position.tolist() if self._checkpoints else []
        self._checkpoint_steps = []
        self._sample(logits)
        self._send()
        self._launch_ahead()

    def read(self) -> list[int]:
        """The next token of every row; waits for it. ValueError if a row's logits cannot be sampled."""
        index = self._accepted % len(self._results)
        if self._arrived:
            self._arrived[index].synchronize()
        self._last, logit_errors = self._results[index].tolist()
        raise_logit_errors(logit_errors, self.runtime.config.logits_size)
        return self._last

    def advance(self) -> None:
        """Accept the tokens read last, and launch steps. ValueError for a token id that the model has no row for."""
        token_ids(self._last, self.runtime.config.vocab_size)
        if self._launched == self._accepted:
            self._launch()
        self._accepted += 1
        self._launch_ahead()

    def roll_back(self) -> None:
        """Take back the launched steps that are not accepted. The loop can go on afterwards."""
        if self._launched == self._accepted:
            return
        step = next(step for step in self._checkpoint_steps if step <= self._accepted)
        _copy(self._state, self._checkpoints[self._checkpoint_steps.index(step)])
        for _ in range(step, self._accepted):
            self._run()
        self._launched = self._accepted

    def discard_lookahead(self) -> None:
        """Forget the launched steps that are not accepted: the cache has been given other contents."""
        self._launched = self._accepted

    def _launch_ahead(self) -> None:
        while self._launched < min(self._accepted + self.lookahead, self._steps):
            if self._launched > self._accepted and self._starts_a_chunk():
                break  # wait until the step before it is accepted: see `_checkpoint`
            self._launch()

    def _starts_a_chunk(self) -> bool:
        """Whether the next step is the first of a chunk, in any row."""
        chunk = self.runtime.config.chunk_size
        return any((position + self._launched) % chunk == 0 for position in self._positions)

    def _checkpoint(self) -> None:
        """Save the small states before the next step, if a checkpoint is due.

        The rings need no copy. A replayed step finds in them what it found before, because a step writes the same
        again. The exception is the first step of a chunk: it overwrites a slot that the previous chunk reads. So no
        checkpoint from before such a step is used after it.
        """
        first = self._starts_a_chunk()
        if first:
            self._checkpoint_steps = []
        due = not self._checkpoint_steps or (
            self._launched - self._checkpoint_steps[0] >= _CHECKPOINT_INTERVAL + self.lookahead
        )
        if due:
            self._checkpoints.reverse()
            _copy(self._checkpoints[0], self._state)
            self._checkpoint_steps = [self._launched, *self._checkpoint_steps[:1]]

    def _launch(self) -> None:
        """Start one step on the device."""
        if self._checkpoints:
            self._checkpoint()
        self._run()
        self._launched += 1
        self._send()

    def _run(self) -> None:
        if not self.programs.captures:
            return self._step()
        if self._kind not in self._captured:
            self._captured[self._kind] = self.programs.capture_step(self._step, [self._next_tokens, self._index])
        self._captured[self._kind]()

    def _step(self) -> None:
        fed, config = self._next_tokens[0], self.runtime.config
        if config.logits_size > config.vocab_size:
            # Such a head can choose a token that cannot be fed. `advance` refuses it; no program may see it.
            fed = fed.clamp(max=config.vocab_size - 1)
        if self._kind is SamplerKind.GREEDY:
            self.programs.run_greedy(fed, self._next_tokens)
        else:
            self._sample(self.programs.run_decode(fed))

    def _sample(self, logits: Tensor) -> None:
        draws = None if self._kind is SamplerKind.GREEDY else device_uniform(self._seeds, self._index)
        torch.stack(choose(logits, self._kind, self._controls, draws), out=self._next_tokens)
        self._index.add_(1)

    def _send(self) -> None:
        """Copy the tokens sampled last to the host, behind what the device does now."""
        index = self._launched % len(self._results)
        self._results[index].copy_(self._next_tokens, non_blocking=True)
        if self._arrived:
            self._arrived[index].record()


def _copy(destination: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy tensor to tensor. A GPU copies a list of tensors of one dtype in one kernel."""
    for dtype in {tensor.dtype for tensor in destination}:
        old, new = ([tensor for tensor in tensors if tensor.dtype == dtype] for tensors in (destination, source))
        torch._foreach_copy_(old, new)


def padded_batch(runtime: Runtime, batch: int) -> int:
    """The rows to run for a batch. On CUDA the next power of two within the limit, so that few sizes are captured."""
    largest = runtime.limits.max_batch
    if runtime.device.type != "cuda" or not 1 <= batch <= largest:
        return batch
    return min(2 ** (batch - 1).bit_length(), largest)
