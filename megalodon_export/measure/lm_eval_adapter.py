"""The model "megalodon" of EleutherAI's lm-evaluation-harness: a bundle or a checkpoint, in any runtime.

    import lm_eval
    import megalodon_export.lm_eval_adapter  # registers it

    lm_eval.simple_evaluate("megalodon", {"pretrained": FOLDER, "runtime": "aoti"}, tasks=["lambada_openai"])

The command `megalodon-export lm-eval` does the same from a shell. A text is a stream, so no context is cut and no text
is scored in windows, unless `max_length` asks for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm

from ..bundles.checkpoints import default_checkpoint
from ..bundles.manifest import TOKENIZER
from ..generation.arguments import text
from ..generation.session import Session
from .evaluation import Target, score_continuations
from .lm_eval_arguments import check_others, dtype_name, usable_device, whole_number

try:
    # The harness imports its own models if none is registered, so they have to be registered before this one.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("the model of lm-eval needs that package: pip install 'megalodon-export[lm-eval]'") from error

DEFAULT_BATCH = 16
# The harness's tasks use these names for the number of tokens to generate. The first that is given counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


@register_model("megalodon")
class MegalodonLM(TemplateLM):
    """Log-likelihoods and continuations, computed as by the commands `eval` and `generate`.

    `pretrained` is the folder, by default that of the checkpoint that ships with the package. `runtime`, `device` and
    `dtype` are those of `eval`. `batch_size`: rows at a time, at most what the programs take; "auto" is 16. Texts are
    tokenised as the tokenizer does by itself; an empty context is the model's beginning-of-text token.

    As in the harness's own models: `tokenizer` is a folder with another tokenizer.json; `add_bos_token` says whether a
    context begins with that token; `prefix_token_id` is fed for an empty context; `max_length` is the most tokens that
    are fed of a text; `max_gen_toks` is how many are generated where a task does not say. `others` are arguments of
    `--model hf`, see `check_others`.
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        runtime: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        tokenizer: str | Path | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        chat_template_args: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        check_others(others, [name for name in signature(type(self)).parameters if name != "others"])
        self.folder = Path(pretrained or default_checkpoint())
        self._prefix = whole_number("prefix_token_id", prefix_token_id, 0)
        self._max_length = whole_number("max_length", max_length, 1)
        self._max_gen_toks = whole_number("max_gen_toks", max_gen_toks, 1)
        thinking = {name: others[name] for name in ("enable_thinking",) if others.get(name) is not None}
        self._chat_options = {**thinking, **(chat_template_args or {})}
        device = usable_device(self.folder, runtime, device)
        self.target = Target.open(self.folder, runtime, device, dtype_name(dtype))
        self._tokenizer_folder = self.folder if tokenizer is None else Path(tokenizer)
        if tokenizer is not None:
            self.target = replace(self.target, tokenizer=_read_tokenizer(self._tokenizer_folder))
        if add_bos_token is not None:
            self._set_start(add_bos_token)
        self._session = Session(self.target.runtime, self.target.tokenizer)
        wanted = DEFAULT_BATCH if str(batch_size).startswith("auto") else int(batch_size)
        if wanted < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1, or auto")
        limits = self.target.runtime.limits
        self.batch_size = min(wanted, max_batch_size or limits.max_batch, limits.max_batch)

    def _set_start(self, add_bos_token: bool) -> None:
        """Let the tokenizer put the beginning-of-text token before every text, or no special token."""
        special: list[tuple[str, int]] = []
        if add_bos_token:
            bos = self.target.runtime.config.bos_token_id
            token = None if bos is None else self.target.tokenizer.id_to_token(bos)
            if bos is None or token is None:
                raise ValueError("add_bos_token needs a bos_token_id in config.json that the tokenizer knows")
            special = [(token, bos)]
        start = [token for token, _ in special]
        self.target.tokenizer.post_processor = TemplateProcessing(
            single=[*start, "$A"], pair=[*start, "$A", "$B"], special_tokens=special
        )

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
        if self._prefix is not None:
            return self._prefix
        start = self.target.runtime.config.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def max_length(self) -> int | None:
        """The most tokens of a text that are fed; None, which is the default, feeds all."""
        return self._max_length

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
            pairs = [self._within_length(requests[i][1] or [self.prefix_token_id], requests[i][2]) for i in rows]
            for i, answer in zip(rows, score_continuations(self.target.runtime, pairs), strict=True):
                if method == "loglikelihood":
                    self.cache_hook.add_partial(method, requests[i][0], answer)
                found[i] = answer
        return [found[i] for i in range(len(requests))]

    def _within_length(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """All but the last token are fed, at most `max_length`; of the context the last ones, and one at least."""
        if self._max_length is None:
            return context, continuation
        kept = max(self._max_length + 1 - len(continuation), 1)
        return context[-kept:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability in nats of each whole text after the beginning-of-text token."""
        owners, pieces = [], []
        for i, request in enumerate(requests):
            for context, continuation in self._windows(self.tok_encode(request.args[0], False)):
                owners.append(i)
                pieces.append((request.args, context, continuation))
        found = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(pieces, disable_tqdm, "loglikelihood_rolling")
        for i, (nats, _) in zip(owners, scored, strict=True):
            found[i] += nats
        for request, nats in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return found

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """A text as contexts and continuations: one pair, or those of the harness's windows of `max_length`."""
        if self._max_length is None:
            return [([self.prefix_token_id], ids)]
        windows = get_rolling_token_windows(ids, self.prefix_token_id, self._max_length, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation, up to a string of `until`, the end of text, or `max_gen_toks` tokens.

        Greedy unless `do_sample` is true, or a temperature is given and `do_sample` is not. ValueError for options that
        sessions do not have.
        """
        options = [generation_options(request.args[1], self._max_gen_toks) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (repr(options[i]), -len(requests[i].args[0])))
        found: dict[int, str] = {}
        for _, group in itertools.groupby(order, key=lambda i: repr(options[i])):
            for rows in self._batches(list(group), disable_tqdm, "generate_until"):
                # A batch's rows sample with seeds of their own, those after the first; so do the next batch's.
                seed = (options[rows[0]].get("seed", 0) + len(found)) % 2**64
                count = options[rows[0]]["max_new_tokens"]
                contexts = [self._last_part(requests[i].args[0], count) for i in rows]
                answers = self._session.generate_batch(contexts, **{**options[rows[0]], "seed": seed})
                for i, answer in zip(rows, answers, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                    found[i] = answer
        return [found[i] for i in range(len(requests))]

    def _last_part(self, context: str, count: int) -> str:
        """The end of a context that leaves `count` tokens of `max_length`; one token at least."""
        if self._max_length is None:
            return context
        offsets = self.target.tokenizer.encode(text(context, "the context"), add_special_tokens=False).offsets
        kept = max(self._max_length - count, 1)
        return context if len(offsets) <= kept else context[offsets[-kept][0] :]

    # ---- chat templates

    @cached_property
    def _chat_tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # takes seconds, and only chat templates need it

        return AutoTokenizer.from_pretrained(self._tokenizer_folder)

    @property
    def tokenizer_name(self) -> str:
        """The folder of the tokenizer, by which the harness tells its caches of requests apart."""
        return str(self._tokenizer_folder.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of the folder, or the one of that name; None if none is asked for."""
        if chat_template is False or chat_template is None:
            return None
        name = None if chat_template is True else chat_template
        return str(self._chat_tokenizer.get_chat_template(name))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as one text, by the chat template of the folder."""
        return str(
            self._chat_tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._chat_options,
            )
        )

    def _batches(self, rows: list[int], disable_tqdm: bool, title: str) -> Iterator[list[int]]:
        """Pieces of the batch size, with a bar that counts rows."""
        with tqdm(total=len(rows), disable=disable_tqdm, desc=title) as bar:
            for start in range(0, len(rows), self.batch_size):
                piece = rows[start : start + self.batch_size]
                yield piece
                bar.update(len(piece))


def _read_tokenizer(folder: Path) -> Tokenizer:
    if not (folder / TOKENIZER).is_file():
        raise ValueError(f"tokenizer is {str(folder)!r}, expected a folder with {TOKENIZER}")
    return Tokenizer.from_file(str(folder / TOKENIZER))


def generation_options(request: dict[str, Any], default_count: int | None = 256) -> dict[str, Any]:
    """The harness's options of a continuation as those of `Session.generate_batch`; ValueError for unknown ones."""
    known = {"until", "do_sample", *LENGTHS, *SAMPLING}
    if unknown := sorted(request.keys() - known):
        raise ValueError(f"generation options {unknown} do not exist here; expected some of {sorted(known)}")
    until = request.get("until") or []
    stop = [one for one in ([until] if isinstance(until, str) else until) if one]
    count = next((int(request[name]) for name in LENGTHS if request.get(name) is not None), default_count)
    sampling = {name: request[name] for name in SAMPLING if request.get(name) is not None}
    if request.get("do_sample"):
        sampling.setdefault("temperature", 1.0)
    if request.get("do_sample") is False or not sampling.get("temperature"):
        sampling = {}
    return {"max_new_tokens": count, "stop": stop, **sampling}
