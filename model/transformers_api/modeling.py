"""The model as transformers' PreTrainedModel classes: `forward`, `generate`, `from_pretrained`, `save_pretrained`."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..cache import ModelCache
from ..loss import cross_entropy
from ..modeling import Megalodon, MegalodonLM
from .accelerate_hooks import execution_device, is_dispatched
from .blocks import MegalodonDecoderLayer
from .cache import MegalodonCache
from .config import MegalodonConfig
from .generation import CACHE, MegalodonGenerationMixin
from .initialization import initialize
from .padding import PaddingLayout


class MegalodonPreTrainedModel(PreTrainedModel):
    """What the Megalodon classes share: config, initialisation, placement."""

    config: MegalodonConfig
    config_class = MegalodonConfig
    base_model_prefix = "model"
    _input_embed_layer = "embed"
    _no_split_modules = ["MegalodonDecoderLayer", "WindowedDecoderLayer"]  # noqa: RUF012
    # bfloat16 rounding of theta accumulates as phase error over long texts, so the complex EMA stays in float32, and so
    # do the scales of quantised weights.
    _keep_in_fp32_modules_strict = ["cema", "scale"]  # noqa: RUF012
    supports_gradient_checkpointing = True

    def _init_weights(self, module: nn.Module) -> None:
        """The original's initialisation; transformers skips tensors that came from a checkpoint."""
        initialize(module, self.config, is_head=module is getattr(self, "lm_head", None))


class MegalodonModel(Megalodon, MegalodonPreTrainedModel):  # type: ignore[misc]  # both name `config` and `train`
    """`Megalodon` as a transformers model: hidden states of padded batches, with transformers' cache."""

    block_class = MegalodonDecoderLayer
    cache_class = MegalodonCache

    def __new__(cls, config: MegalodonConfig | None = None, *args: Any, **kwargs: Any) -> Self:
        """The class that a config asks for: attention beyond the chunk has one of its own.

        copy.deepcopy and pickle call this without a config.
        """
        if cls is MegalodonModel and config is not None and config.attention_window is not None:
            from ..compat.windowed_attention import WindowedModel  # which is a subclass of this one

            return super().__new__(WindowedModel)  # type: ignore[return-value]
        return super().__new__(cls)

    def __init__(self, config: MegalodonConfig) -> None:
        MegalodonPreTrainedModel.__init__(self, config)
        self.build(config)
        self.post_init()

    def decode(self, token_ids: Tensor, cache: ModelCache) -> Tensor:
        """As `Megalodon.decode`. accelerate moves weights in `forward` alone, so its models run a prefill of one."""
        if any(map(is_dispatched, self.layers)):
            return self.prefill(token_ids[:, None], torch.ones_like(token_ids), cache)[:, 0]
        return super().decode(token_ids, cache)

    def new_cache(self, batch: int) -> MegalodonCache:
        """A fresh cache for `batch` streams, in the model's dtype and on its device, or its layers' devices."""
        device = execution_device(self.embed, self.device)
        layers = [execution_device(layer, device) for layer in self.layers]
        return MegalodonCache.allocate(self.config, batch, self.dtype_of_weights, device, layers)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MegalodonCache | None = None,
        use_cache: bool | None = None,
        lengths: Tensor | None = None,
        cache: MegalodonCache | None = None,
        **unsupported: Any,
    ) -> BaseModelOutputWithPast:
        """transformers' interface to `prefill` and `decode`: input_ids (B, L) -> hidden states (B, L, D), 0 at padding.

        The arguments are those of `MegalodonForCausalLM.forward`.
        """
        _refuse(unsupported)
        layout = PaddingLayout.of(input_ids, attention_mask, lengths)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            cache.check_batch(input_ids.shape[0])
            hidden = self._continue(layout.to_right(input_ids), layout.lengths, cache)
        else:
            if (self.config.use_cache and not self.training) if use_cache is None else use_cache:
                cache = self.new_cache(input_ids.shape[0])
            hidden = self._prefill(layout.to_right(input_ids), layout.lengths, cache)
        return BaseModelOutputWithPast(last_hidden_state=layout.back(hidden), **{CACHE: cache})  # type: ignore[arg-type]

    def _continue(self, token_ids: Tensor, lengths: Tensor | None, cache: MegalodonCache) -> Tensor:
        """Continue a cache, by `decode` where every row has one token."""
        cache.record(token_ids, lengths, partial(self.prefill, cache=cache))
        if token_ids.shape[1] == 1 and lengths is None:
            return self.decode(token_ids[:, 0], cache)[:, None]
        return self._prefill(token_ids, lengths, cache)

    def _prefill(self, token_ids: Tensor, lengths: Tensor | None, cache: MegalodonCache | None) -> Tensor:
        if lengths is None:
            return self.prefill(token_ids, torch.full_like(token_ids[:, 0], token_ids.shape[1]), cache)
        before = None if cache is None else cache.position.clone()
        hidden = self.prefill(token_ids, lengths, cache)
        if cache is not None and before is not None:
            cache.count_padding(token_ids.shape[1], before)
        return hidden


class MegalodonForCausalLM(MegalodonLM, MegalodonPreTrainedModel, MegalodonGenerationMixin):  # type: ignore[misc]
    """`MegalodonLM` as a transformers model: logits and loss of padded batches, and `generate`."""

    model_class = MegalodonModel
    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config: MegalodonConfig) -> None:
        MegalodonPreTrainedModel.__init__(self, config)
        self.build(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MegalodonCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        lengths: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: MegalodonCache | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **unsupported: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V) float32 of input_ids (B, L), and the loss (nats a token) if `labels` (B, L) are given.

        `attention_mask` (B, L) is 1 for a token, 0 for padding on either side. `lengths` (B) says instead how many
        tokens each row has, with padding on the right. Each row gives what it gives alone, and 0 at padding.
        `labels` are shifted here. A label of -100 is ignored, and so is padding.
        `num_items_in_batch` makes the loss the sum over this number. The Trainer gives it where it accumulates
        gradients.
        `past_key_values` is updated in place. Newer versions of transformers call it `cache`.
        `use_cache` makes a cache where none is given. It is the config's by default, and False in training.
        `logits_to_keep` n gives the logits of each row's last n tokens alone, a tensor those of these columns.
        """
        _refuse(unsupported)
        cache = past_key_values if cache is None else cache
        layout = PaddingLayout.of(input_ids, attention_mask, lengths)
        token_ids = layout.to_right(input_ids)
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        if labels is not None and (keep or isinstance(logits_to_keep, Tensor)):
            raise ValueError("labels need the logits of all tokens; leave logits_to_keep out")
        if cache is not None and cache.record_past and layout.lengths is None and 0 < keep < input_ids.shape[1]:
            token_ids = self._feed_for_good(token_ids, keep, cache)
        out = self.model(token_ids, None, cache, use_cache, layout.lengths, return_dict=True)
        hidden = layout.last(out.last_hidden_state, keep) if keep else layout.back(out.last_hidden_state)
        logits = self.logits(hidden if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep])
        loss = None if labels is None else cross_entropy(logits[:, :-1], layout.targets(labels), num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(out, CACHE)})

    def _feed_for_good(self, token_ids: Tensor, keep: int, cache: MegalodonCache) -> Tensor:
        """Assisted generation: feed all but the last `keep` tokens, which are returned.

        An assistant's guesses are among the last `keep` tokens. Those before them are never taken back, so the cache
        need not record them, and `crop` need not feed them again.
        """
        self.model(token_ids[:, :-keep], past_key_values=cache)
        cache.forget()
        return token_ids[:, -keep:]


def _refuse(unsupported: dict[str, Any]) -> None:
    given = [name for name, value in unsupported.items() if value is not None and value is not False]
    if given:
        raise TypeError(f"Megalodon's forward has no argument {', '.join(given)}; leave it out")
