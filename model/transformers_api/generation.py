"""transformers' generate() over a MegalodonCache: greedy search, sampling, beam search and assisted generation."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from .arguments import one_cache

# transformers is renaming past_key_values to cache, as a field of outputs and as an argument of forward.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
SUPPORTED = (
    *(GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION),
    *(GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE),
)


class MegalodonGenerationMixin(GenerationMixin):
    """generate() with the model's own cache; modes that it cannot serve are refused."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' generate(), in the model's own dtype: autocast, which is for training, changes no token."""
        with ExitStack() as modes:
            for device in ("cpu", "cuda"):  # offloaded weights are on neither: their device is "meta"
                if torch.is_autocast_enabled(device):
                    modes.enter_context(torch.autocast(device, enabled=False))
            return super().generate(*args, **kwargs)

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # whose signature generate() reads
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers' own.

        PEFT wraps this method and knows the cache by its older name alone: without it, prompt tuning puts its virtual
        tokens before every token.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        wrapped = "prepare_inputs_for_generation" in vars(self)
        if wrapped and CACHE in inputs:
            inputs["past_key_values"] = inputs.pop(CACHE)
        return inputs

    def _get_deprecated_gen_repo(self, generation_mode: GenerationMode, *args: Any, **kwargs: Any) -> str | None:
        if generation_mode not in SUPPORTED:
            raise ValueError(
                f"Megalodon does not generate by {generation_mode.value.replace('_', ' ')}; use greedy search, "
                "sampling, beam search or an assistant"
            )
        return super()._get_deprecated_gen_repo(generation_mode, *args, **kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]  # a bool there, which nobody reads
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}, and Megalodon has one cache, of "
                "constant size; leave it out"
            )
        one_cache(model_kwargs.get(CACHE), None)  # refuses another model's
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if assisted and batch_size > 1:
            raise ValueError(
                f"assisted generation serves one prompt at a time in transformers, and {batch_size} came; call "
                "generate for each of them"
            )
        mask = model_kwargs.get("attention_mask")
        if generation_config.prefill_chunk_size and mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("prefill_chunk_size needs prompts that end in the same column; pad them on the left")
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            beams = max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs[CACHE] = self.new_cache(batch_size * beams)  # type: ignore[attr-defined]
        cache = model_kwargs.get(CACHE)
        if cache is not None and (assisted or generation_config.is_assistant):
            cache.activate_past_recording()

    def _prepare_attention_mask_for_generation(  # type: ignore[override]  # a LongTensor there
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """The mask of prompts that came without one: pad tokens before the first and behind the last other token.

        A pad token between two others is a token. To an assistant all are: padded prompts have a mask, which the model
        that it assists hands on.
        """
        mask: Tensor = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        if generation_config.is_assistant or mask.dim() != 2:
            return torch.ones_like(mask)
        return mask.cummax(1).values & mask.flip(1).cummax(1).values.flip(1)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: continuous batching pages the keys and values of whole texts, which this model does not keep."""
        raise NotImplementedError(
            "Megalodon has no pages of keys and values for continuous batching; rows of a cache are independent "
            "streams of constant size: see MegalodonCache.rows, or megalodon_export.Session.generate_batch"
        )
