"""The model "megalodon" of EleutherAI's lm-evaluation-harness: a bundle or a checkpoint, in any runtime.

    import lm_eval
    import megalodon_export.lm_eval_adapter  # registers it

    lm_eval.simple_evaluate("megalodon", {"pretrained": FOLDER, "runtime": "aoti"}, tasks=["lambada_openai"])

A text is a stream, so no context is ever cut and no text is scored in windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..generation.arguments import text
from ..generation.session import Session
from .evaluation import Target, score_continuations

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("the model of lm-eval needs that package: pip install 'megalodon-export[lm-eval]'") from error

DEFAULT_BATCH = 16
# The harness's tasks use these names for the number of tokens to generate. The first that is given counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


@register_model("megalodon")
class MegalodonLM(TemplateLM):
    """Log-likelihoods and continuations, computed as by the commands `eval` and `generate`.

    `pretrained` is the folder; `runtime`, `device` and `dtype` are those of `eval`. `batch_size`: rows at a time, at
    most what the programs take; "auto" is 16. Texts are tokenised as the tokenizer does by itself; an empty context is
    the model's beginning-of-text token.
    """

    def __init__(
        self,
        pretrained: str | Path,
        runtime: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.target = Target.open(Path(pretrained), runtime, device, dtype)
        self._session = Session(self.target.runtime, self.target.tokenizer)
        wanted = DEFAULT_BATCH if str(batch_size).startswith("auto") else int(batch_size)
        if wanted < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1, or auto")
        limits = self.target.runtime.limits
        self.batch_size = min(wanted, max_batch_size or limits.max_batch, limits.max_batch)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or the one that begins it; ValueError for a model with neither."""
        config = self.target.runtime.config
        for token_id in (config.eos_token_id, config.bos_token_id):
            if token_id is not None:
                return int(token_id)
        raise ValueError("the model has neither bos_token_id nor eos_token_id; put one into its config.json")

    @property
    def prefix_token_id(self) -> int:
        """The token that is fed for an empty context."""
        start = self.target.runtime.config.bos_token_id
        return self.eot_token_id if start is None else int(start)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids as a session encodes them; without special tokens if `add_special_tokens` is False."""
        ids: list[int] = self.target.tokenizer.encode(
            text(string, "the text"), add_special_tokens=add_special_tokens is not False
        ).ids
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, ...], list[int], list[int]]],
        disable_tqdm: bool = False,
        method: str = "loglikelihood",
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """`requests`: the key in the harness's cache of answers, the context's ids, the continuation's ids."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i][1]), len(requests[i][2])), reverse=True)
        for rows in self._batches(order, disable_tqdm, method):
            pairs = [(requests[i][1] or [self.prefix_token_id], requests[i][2]) for i in rows]
            for i, answer in zip(rows, score_continuations(self.target.runtime, pairs), strict=True):
                self.cache_hook.add_partial(method, requests[i][0], answer if method == "loglikelihood" else answer[0])
                found[i] = answer
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability in nats of each whole text after the beginning-of-text token."""
        texts = [(r.args, [self.prefix_token_id], self.tok_encode(r.args[0], False)) for r in requests]
        return [nats for nats, _ in self._loglikelihood_tokens(texts, disable_tqdm, "loglikelihood_rolling")]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation, up to a string of `until`, the end of text, or `max_gen_toks` (256) tokens.

        Greedy unless `do_sample` is true, or a temperature is given and `do_sample` is not. ValueError for options that
        sessions do not have.
        """
        options = [generation_options(request.args[1]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (repr(options[i]), -len(requests[i].args[0])))
        found: dict[int, str] = {}
        for _, group in itertools.groupby(order, key=lambda i: repr(options[i])):
            for rows in self._batches(list(group), disable_tqdm, "generate_until"):
                # A batch's rows sample with seeds of their own, those after the first; so do the next batch's.
                seed = (options[rows[0]].get("seed", 0) + len(found)) % 2**64
                contexts = [requests[i].args[0] for i in rows]
                answers = self._session.generate_batch(contexts, **{**options[rows[0]], "seed": seed})
                for i, answer in zip(rows, answers, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                    found[i] = answer
        return [found[i] for i in range(len(requests))]

    def _batches(self, rows: list[int], disable_tqdm: bool, title: str) -> Iterator[list[int]]:
        """Pieces of the batch size, with a bar that counts rows."""
        with tqdm(total=len(rows), disable=disable_tqdm, desc=title) as bar:
            for start in range(0, len(rows), self.batch_size):
                piece = rows[start : start + self.batch_size]
                yield piece
                bar.update(len(piece))


def generation_options(request: dict[str, Any]) -> dict[str, Any]:
    """The harness's options of a continuation as those of `Session.generate_batch`; ValueError for unknown ones."""
    known = {"until", "do_sample", *LENGTHS, *SAMPLING}
    if unknown := sorted(request.keys() - known):
        raise ValueError(f"generation options {unknown} do not exist here; expected some of {sorted(known)}")
    until = request.get("until") or []
    stop = [one for one in ([until] if isinstance(until, str) else until) if one]
    count = next((int(request[name]) for name in LENGTHS if request.get(name) is not None), 256)
    sampling = {name: request[name] for name in SAMPLING if request.get(name) is not None}
    if request.get("do_sample"):
        sampling.setdefault("temperature", 1.0)
    if request.get("do_sample") is False or not sampling.get("temperature"):
        sampling = {}
    return {"max_new_tokens": count, "stop": stop, **sampling}
