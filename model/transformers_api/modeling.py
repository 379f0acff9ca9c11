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
from ..loss import IGNORED
from ..modeling import Megalodon, MegalodonLM, Observer
from .accelerate_hooks import execution_device, is_dispatched
from .arguments import Layout, one_cache, one_input, refuse_others, take_layout
from .blocks import MegalodonDecoderLayer
from .cache import MegalodonCache
from .compiling import compiled_by_layer
from .config import MegalodonConfig
from .generation import CACHE, MegalodonGenerationMixin
from .hidden_states import HiddenStates
from .initialization import initialize
from .loss import causal_lm_loss
from .packing import PackedLayout
from .padding import PaddingLayout
from .remote_code import RegisteredClass


class MegalodonPreTrainedModel(RegisteredClass, PreTrainedModel):
    """What the Megalodon classes share: config, initialisation, placement."""

    config: MegalodonConfig
    config_class = MegalodonConfig
    base_model_prefix = "model"
    _input_embed_layer = "embed"
    _no_split_modules = ["MegalodonDecoderLayer", "WindowedDecoderLayer"]  # noqa: RUF012
    # Loading leaves these in float32, as `ComplexEMA` and `QuantizedLinear` do in every cast.
    _keep_in_fp32_modules_strict: set[str] | list[str] = ["cema"]  # noqa: RUF012
    supports_gradient_checkpointing = True

    def __init__(self, config: MegalodonConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.weight_format != "float":
            self._keep_in_fp32_modules_strict = {*self._keep_in_fp32_modules_strict, "scale"}

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

    def decode(self, token_ids: Tensor, cache: ModelCache, observe: Observer | None = None) -> Tensor:
        """As `Megalodon.decode`. accelerate moves weights in `forward` alone, so its models run a prefill of one."""
        if any(map(is_dispatched, self.layers)):
            return self.prefill(token_ids[:, None], torch.ones_like(token_ids), cache, observe=observe)[:, 0]
        return super().decode(token_ids, cache, observe)

    def new_cache(self, batch: int) -> MegalodonCache:
        """A fresh cache for `batch` streams, in the model's dtype and on its device, or its layers' devices."""
        device = execution_device(self.embed, self.device)
        layers = [execution_device(layer, device) for layer in self.layers]
        return MegalodonCache.allocate(self.config, batch, self.dtype_of_weights, device, layers)

    @compiled_by_layer
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MegalodonCache | None = None,
        use_cache: bool | None = None,
        lengths: Tensor | None = None,
        cache: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """transformers' interface to `prefill` and `decode`: input_ids (B, L) -> hidden states (B, L, D), 0 at padding.

        The arguments are those of `MegalodonForCausalLM.forward`, which passes its `layout`.
        """
        tokens, cache = one_input(input_ids, inputs_embeds), one_cache(past_key_values, cache)
        if cache is not None and torch.compiler.is_exporting():
            cache.fix_sizes()
        if layout is None:
            layout = take_layout(tokens, attention_mask, lengths, cache, kwargs)
            refuse_others(kwargs)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if isinstance(layout, PackedLayout):
            if use_cache:
                raise ValueError("packed sequences leave no cache, since every document ends in one: use_cache=False")
            hidden, *kept = layout.map(tokens, partial(self._documents, wanted=wanted))
        else:
            states = HiddenStates(layout, tokens.shape[1]) if wanted else None
            if cache is not None:
                hidden = self._continue(tokens, layout, cache, states)
            else:
                if (self.config.use_cache and not self.training) if use_cache is None else use_cache:
                    cache = self.new_cache(tokens.shape[0])
                hidden = self._prefill(tokens, layout, cache, states)
            kept = [] if states is None else states.kept
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*kept, hidden) if wanted else None,
            **{CACHE: cache},  # type: ignore[arg-type]
        )

    def _documents(self, tokens: Tensor, lengths: Tensor, wanted: bool) -> list[Tensor]:
        """The hidden states of documents, each a fresh stream, and with `wanted` what the layers take."""
        states = HiddenStates(PaddingLayout(lengths), tokens.shape[1]) if wanted else None
        hidden = self.prefill(tokens, lengths, observe=states)
        return [hidden, *([] if states is None else states.kept)]

    def _continue(
        self, tokens: Tensor, layout: PaddingLayout, cache: MegalodonCache, states: HiddenStates | None
    ) -> Tensor:
        """Continue a cache, by `decode` where every row has one token."""
        valid = None if layout.lengths is None else layout.valid(tokens.shape[1])
        cache.record(tokens, valid, partial(self.prefill, cache=cache))
        if tokens.shape == (tokens.shape[0], 1) and valid is None:
            return self.decode(tokens[:, 0], cache, states)[:, None]
        return self._prefill(tokens, layout, cache, states)

    def _prefill(
        self, tokens: Tensor, layout: PaddingLayout, cache: MegalodonCache | None, states: HiddenStates | None
    ) -> Tensor:
        batch, length = tokens.shape[:2]
        if layout.lengths is None:
            return self.prefill(tokens, tokens.new_full((batch,), length, dtype=torch.int64), cache, observe=states)
        before = None if cache is None else cache.position.clone()
        hidden = self.prefill(layout.to_right(tokens), layout.lengths.to(tokens.device), cache, observe=states)
        if cache is not None and before is not None:
            cache.count_padding(length, before)
        return layout.back(hidden)


class MegalodonForCausalLM(MegalodonLM, MegalodonPreTrainedModel, MegalodonGenerationMixin):  # type: ignore[misc]
    """`MegalodonLM` as a transformers model: logits and loss of padded batches, and `generate`."""

    model_class = MegalodonModel
    _loss_function = staticmethod(causal_lm_loss)
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

    @compiled_by_layer
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MegalodonCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        lengths: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: MegalodonCache | None = None,
        num_items_in_batch: int | Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        shift_labels: Tensor | None = None,
        ignore_index: int = IGNORED,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V) float32 of input_ids (B, L), and the loss (nats a token) if `labels` (B, L) are given.

        `inputs_embeds` (B, L, D), rows of `get_input_embeddings()`, may take the place of input_ids.
        `attention_mask` (B, L) is 1 for a token, 0 for padding on either side. `lengths` (B) says instead how many
        tokens each row has, with padding on the right. Each row gives what it gives alone, and 0 at padding.
        `labels` are shifted here; `shift_labels` are aligned with the logits already and replace them. A label of
        `ignore_index` is ignored, and so is padding.
        `num_items_in_batch` makes the loss the sum over this number. The Trainer gives it where it accumulates
        gradients.
        `past_key_values` is updated in place. Newer versions of transformers call it `cache`.
        `use_cache` makes a cache where none is given. It is the config's by default, and False in training.
        `logits_to_keep` n gives the logits of each row's last n tokens alone, a tensor those of these columns.
        `output_hidden_states` gives the embeddings and what each layer makes of them, the last one normed.
        `seq_idx`, `cu_seq_lens_q` or `position_ids` that start again say that rows hold several documents, each of
        which is a stream of its own. Other `position_ids` have to say what the mask and the cache say.
        """
        tokens, cache = one_input(input_ids, inputs_embeds), one_cache(past_key_values, cache)
        layout = take_layout(tokens, attention_mask, lengths, cache, kwargs)
        refuse_others(kwargs)
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        targeted = labels is not None or shift_labels is not None
        if targeted and (keep or isinstance(logits_to_keep, Tensor)):
            raise ValueError("labels need the logits of all tokens; leave logits_to_keep out")
        if cache is not None and cache.record_past and 0 < keep < tokens.shape[1] and not output_hidden_states:
            tokens, layout = self._feed_for_good(tokens, layout, keep, cache)
        given = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
        out = self.model(
            **given, layout=layout, cache=cache, use_cache=use_cache, output_hidden_states=output_hidden_states,
            return_dict=True,
        )  # fmt: skip
        hidden = layout.last(out.last_hidden_state, keep) if keep else out.last_hidden_state
        logits = self.logits(hidden if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep])
        loss = None
        if targeted:
            loss = self._loss(logits, layout, labels, shift_labels, ignore_index, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE: getattr(out, CACHE)}
        )

    def _loss(
        self,
        logits: Tensor,
        layout: Layout,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        ignore_index: int,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor:
        """`loss_function` with the arguments that it has in transformers; those that say nothing are left out."""
        options: dict[str, Any] = {"num_items_in_batch": num_items_in_batch}
        if ignore_index != IGNORED:
            options["ignore_index"] = ignore_index
        if shift_labels is not None:
            options["shift_labels"] = layout.counted_targets(shift_labels, ignore_index)
        if labels is not None:
            labels = layout.counted(labels, ignore_index)
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
        return loss

    def _feed_for_good(self, tokens: Tensor, layout: Layout, keep: int, cache: MegalodonCache) -> tuple[Tensor, Layout]:
        """Assisted generation: feed all but the last `keep` tokens, which are returned.

        An assistant's guesses are among the last `keep` tokens. Those before them are never taken back, so the cache
        need not record them, and `crop` need not feed them again.
        """
        before = layout.without_last(keep, tokens.shape[1]) if isinstance(layout, PaddingLayout) else None
        if before is None:
            return tokens, layout
        self.model(tokens[:, :-keep], cache=cache, layout=before)
        cache.forget()
        return tokens[:, -keep:], PaddingLayout()
