"""The language model, as transformers' PreTrainedModel classes over two passes: `prefill` and `decode`."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .blocking import first, padding_to
from .blocks import MegalodonBlock
from .cache import FinalCache, MegalodonCache
from .compat.horizon import AbsoluteRotary, reserve
from .config import MegalodonConfig
from .constants import unfreeze_constants
from .distributed.sequence_state import Relay
from .ema import ComplexEMA
from .feed_forward import FeedForward
from .gated_attention import GatedAttention
from .kernels import on_kernels
from .loss import cross_entropy
from .norm import NormState, TimestepNorm
from .plan import BLOCK, PrefillPlan
from .quantized import empty_quantized, replace_linear_layers
from .rotary import Rotary, RotaryTable
from .transformers_api.accelerate_hooks import execution_device, is_dispatched
from .transformers_api.generation import CACHE, MegalodonGenerationMixin
from .transformers_api.padding import Rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_dtype(dtype: torch.dtype, supported: tuple[torch.dtype, ...] = SUPPORTED_DTYPES) -> None:
    """TypeError unless the model can run in `dtype`."""
    if dtype not in supported:
        raise TypeError(
            f"Megalodon does not run in {str(dtype).removeprefix('torch.')}: its running statistics and products "
            "overflow or lose precision there; load it with dtype=torch.bfloat16 or torch.float32 (float64 for tests)"
        )


class MegalodonPreTrainedModel(PreTrainedModel):
    """What the Megalodon classes share: config, initialisation, placement."""

    config: MegalodonConfig
    config_class = MegalodonConfig
    base_model_prefix = "model"
    _input_embed_layer = "embed"
    _no_split_modules = ["MegalodonBlock"]  # noqa: RUF012
    # bfloat16 keeps 8 bits of theta; over a hundred steps of phase that is another model. Scales: of quantised weights.
    _keep_in_fp32_modules_strict = ["cema", "scale"]  # noqa: RUF012
    supports_gradient_checkpointing = True

    def _init_weights(self, module: nn.Module) -> None:
        """The original's initialisation; transformers skips tensors that came from a checkpoint."""
        if isinstance(module, nn.Embedding):
            _truncated_normal(module.weight, 1 / math.sqrt(self.config.model_dim))
        elif isinstance(module, nn.Linear):
            if module is getattr(self, "lm_head", None):
                _truncated_normal(module.weight, 1 / math.sqrt(self.config.model_dim))
            else:
                _init_linear(module.weight, self.config.init_mode)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ComplexEMA):
            _init_ema(module)
        elif isinstance(module, GatedAttention):
            init.zeros_(module.gamma)
            init.zeros_(module.beta)
        elif isinstance(module, FeedForward):
            if module.alpha is not None:
                init.constant_(module.alpha, module.initial_alpha)
        else:  # the norms: every scale is weight + 1
            for parameter in module.parameters(recurse=False):
                init.zeros_(parameter)

    def _prepare_for_quantized_weights(self) -> None:
        if self.config.weight_format != "float":
            replace_linear_layers(self, self.config.weight_format, empty_quantized(self.config.group_size))

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """The dtype of everything but the complex EMA's parameters, which stay in float32, and quantised weights."""
        return self.get_input_embeddings().get_parameter("weight").dtype

    def new_cache(self, batch: int) -> MegalodonCache:
        """A fresh cache for `batch` streams, in the model's dtype and on its device, or its layers' devices."""
        device = execution_device(self.get_input_embeddings(), self.device)
        layers = [execution_device(layer, device) for layer in cast(MegalodonModel, self.base_model).layers]
        return MegalodonCache.allocate(self.config, batch, self.dtype_of_weights, device, layers)

    def train(self, mode: bool = True) -> MegalodonPreTrainedModel:
        """As nn.Module.train; leaving inference drops frozen constants, which would go stale."""
        if mode:
            unfreeze_constants(self)
        return super().train(mode)


class MegalodonModel(MegalodonPreTrainedModel):
    """Embedding, blocks and final TimestepNorm."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.kernels = False  # see `use_kernels`
        self.sequence_group: ProcessGroup | None = None  # see `parallel_loss`
        self.supported_dtypes = SUPPORTED_DTYPES  # an exporter whose runtime keeps statistics in float32 may add to it
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        rotary = RotaryTable if config.kv_horizon is None else AbsoluteRotary
        self.rotary = rotary(config.z_head_dim, config.chunk_size, config.rope_base)
        self.layers = nn.ModuleList(MegalodonBlock(config, i) for i in range(config.num_layers))
        self.norm = TimestepNorm(config.model_dim, config.norm_num_groups, config.norm_eps, config.norm_statistics)
        self._prepare_for_quantized_weights()
        self.post_init()

    def prefill(
        self, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache | None = None, max_length: int | None = None
    ) -> Tensor:
        """Run `lengths` (B) tokens of each row of token_ids (B, L) -> hidden states (B, L, D).

        With a cache, the rows go on from it and it is updated in place; without one they start fresh. Hidden states at
        and after a row's length are 0. A length of 0 leaves the row's cache as it is. `max_length` bounds L where L is
        symbolic (torch.compile, torch.export): it decides what is static in the graph.
        """
        position, relay, ring = None if cache is None else cache.position, None, None
        if self.sequence_group is not None:
            relay = Relay(self.sequence_group)
            position = torch.full_like(lengths, relay.rank * token_ids.shape[1])
        if cache is not None and self.config.kv_horizon is not None:
            if self.config.cache_unbounded:
                reserve(cache, int((cache.position + lengths).max()))
            ring = cache.layers[0].key.shape[2]
        x, plan, rotary = self.begin_prefill(token_ids, lengths, position, max_length, ring)
        for i, layer in enumerate(self.layers):
            x = layer(x, plan, rotary, None if cache is None else cache.layers[i], relay)
        return first(self.end_prefill(x, plan, None if cache is None else cache.final, relay), 1, token_ids.shape[1])

    def decode(self, token_ids: Tensor, cache: MegalodonCache) -> Tensor:
        """Run one token of each row, token_ids (B) -> hidden states (B, D); the cache is updated in place."""
        if self.config.kv_horizon is not None or any(map(is_dispatched, self.layers)):
            return self.prefill(token_ids[:, None], torch.ones_like(token_ids), cache)[:, 0]
        x, rotary = self.begin_decode(token_ids, cache.position)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = cast(MegalodonBlock, layer).step(x, cache.position, rotary, layer_cache)
        return self.end_decode(x, cache.final)

    # Both passes in three stages, which exporters compile one by one: begin, every layer alike, end.

    def begin_prefill(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        position: Tensor | None,
        max_length: int | None = None,
        ring: int | None = None,
    ) -> tuple[Tensor, PrefillPlan, Rotary]:
        """What the first layer takes, x (B, L, D) with L rounded up to whole blocks, and what all layers share.

        `position` (B) is the cache's, None without one; `ring` its slots, if they are not a chunk's.
        """
        check_dtype(self.dtype_of_weights, self.supported_dtypes)
        length = token_ids.shape[1]
        max_length = (max_length or length) + padding_to(max_length or length, BLOCK)
        token_ids = F.pad(token_ids, (0, padding_to(length, BLOCK)))  # once, so that no layer has to
        start = torch.zeros_like(lengths) if position is None else position
        rotary = self.rotary(start[:, None] + torch.arange(token_ids.shape[1], device=token_ids.device))
        plan = PrefillPlan.of(
            lengths, start, token_ids.shape[1], ring or self.config.chunk_size, max_length, position is not None
        )
        return self._embed(token_ids), plan, rotary

    def end_prefill(self, x: Tensor, plan: PrefillPlan, cache: FinalCache | None, relay: Relay | None = None) -> Tensor:
        """The last layer's x (B, L, D) -> hidden states; the cache's last tensors are updated in place."""
        if cache is None:
            state = self.norm.initial_state(x.shape[0], x.device)
            if relay is None:
                return self.norm(x, plan, state)[0]
            x, state = self.norm(x, plan, NormState(*relay.receive(self.norm, state, x, self.norm)))
            return relay.send(self.norm, x, state)
        if on_kernels(self):
            from .kernels.prefill.norms import timestep_norm_

            x = timestep_norm_(self.norm, x, plan.lengths, plan.position, cache.norm_mean, cache.norm_var)
        else:
            x, state = self.norm(x, plan, NormState(cache.norm_mean, cache.norm_var))
            state.store(cache)
        cache.position.copy_(plan.position + plan.lengths)
        return x

    def begin_decode(self, token_ids: Tensor, position: Tensor) -> tuple[Tensor, Rotary]:
        """As `begin_prefill`, for one token of each row: x (B, D)."""
        check_dtype(self.dtype_of_weights, self.supported_dtypes)
        if on_kernels(self):
            from .kernels.decode.embedding import embed_tokens

            angles = self.rotary.constants()
            tables = self.embed.weight, angles["cos"], angles["sin"]
            x, cos, sin = embed_tokens(token_ids, position, *tables, self._embedding_scale)
            return x, Rotary(cos, sin)
        return self._embed(token_ids), self.rotary(position)

    def end_decode(self, x: Tensor, cache: FinalCache) -> Tensor:
        """As `end_prefill`, for one token of each row: x (B, D) -> hidden states (B, D)."""
        if on_kernels(self):
            from .kernels.decode.final_norm import final_norm

            norm, states = self.norm, (cache.position, cache.norm_mean, cache.norm_var)
            return final_norm(x, *states, norm.weight, norm.bias, norm.eps, norm.statistics == "megalodon-hf")
        x, state = self.norm.step(x, cache.position, NormState(cache.norm_mean, cache.norm_var))
        state.store(cache)
        cache.position.add_(1)
        return x

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

        Arguments as those of `MegalodonForCausalLM.forward`.
        """
        _refuse(unsupported)
        rows = Rows.of(input_ids, attention_mask, lengths)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            cache.check_batch(input_ids.shape[0])
            hidden = self._go_on(rows.to_right(input_ids), rows.lengths, cache)
        else:
            if (self.config.use_cache and not self.training) if use_cache is None else use_cache:
                cache = self.new_cache(input_ids.shape[0])
            hidden = self._prefill(rows.to_right(input_ids), rows.lengths, cache)
        return BaseModelOutputWithPast(last_hidden_state=rows.back(hidden), **{CACHE: cache})  # type: ignore[arg-type]

    def _go_on(self, token_ids: Tensor, lengths: Tensor | None, cache: MegalodonCache) -> Tensor:
        """From a cache, by `decode` where every row has one token."""
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

    @property
    def _embedding_scale(self) -> float:
        return math.sqrt(self.config.model_dim) if self.config.scale_emb else 1.0

    def _embed(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        if self.config.scale_emb:
            x = x * self._embedding_scale
        return F.dropout(x, self.config.dropout) if self.training else x


class MegalodonForCausalLM(MegalodonPreTrainedModel, MegalodonGenerationMixin):
    """Megalodon with a language-model head: bias-free, tied to the embedding with share_emb."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.model = MegalodonModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.logits_size, bias=False)
        self._prepare_for_quantized_weights()
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def prefill(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        cache: MegalodonCache | None = None,
        max_length: int | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """As `MegalodonModel.prefill`; float32 logits of each row's last valid token (B, V), or of all (B, L, V)."""
        hidden = self.model.prefill(token_ids, lengths, cache, max_length)
        return self.logits(hidden if all_logits else last_valid(hidden, lengths))

    def decode(self, token_ids: Tensor, cache: MegalodonCache) -> Tensor:
        """As `MegalodonModel.decode`; float32 logits (B, V)."""
        return self.logits(self.model.decode(token_ids, cache))

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
        **unsupported: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V) float32 of input_ids (B, L), and the loss (nats a token) if `labels` (B, L) are given.

        Rows may be padded on either side, as `attention_mask` (1 for a token) says, or on the right, of `lengths` (B)
        valid tokens: each row gives what it gives alone, and 0 at padding. Labels are shifted inside, -100 is ignored,
        and so is padding; with `num_items_in_batch`, which the Trainer gives where it accumulates gradients, the loss
        is the sum over that number. `past_key_values`, which newer versions of transformers call `cache`, is updated in
        place. `logits_to_keep` n computes those of each row's last n tokens alone, a tensor those of these columns.
        """
        items = unsupported.pop("num_items_in_batch", None)
        _refuse(unsupported)
        cache = past_key_values if cache is None else cache
        rows = Rows.of(input_ids, attention_mask, lengths)
        token_ids = rows.to_right(input_ids)
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        if labels is not None and (keep or isinstance(logits_to_keep, Tensor)):
            raise ValueError("labels need the logits of all tokens; leave logits_to_keep out")
        if cache is not None and cache.record_past and rows.lengths is None and 0 < keep < input_ids.shape[1]:
            self.model(token_ids[:, :-keep], past_key_values=cache)  # an assistant's guesses are among those to keep
            cache.forget()
            token_ids = token_ids[:, -keep:]
        out = self.model(token_ids, None, cache, use_cache, rows.lengths, return_dict=True)
        hidden = rows.last(out.last_hidden_state, keep) if keep else rows.back(out.last_hidden_state)
        logits = self.logits(hidden if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep])
        loss = None if labels is None else cross_entropy(logits[:, :-1], rows.targets(labels), items)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(out, CACHE)})

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: hidden states (..., D) -> float32 logits (..., V) (float64 of a float64 model)."""
        if on_kernels(self.model) and hidden.dim() == 2:  # a few rows: as fast as it can be read
            from .kernels.decode.linear import linear
            from .kernels.decode.weights import linear_tensors

            return linear(hidden, *linear_tensors(self.lm_head), None, None, None, torch.float32)
        logits = self.lm_head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()


def last_valid(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The hidden state (B, D) of each row's last valid token, from all of them (B, L, D)."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, (lengths - 1).clamp(min=0)]


def _refuse(unsupported: dict[str, Any]) -> None:
    given = [name for name, value in unsupported.items() if value is not None and value is not False]
    if given:
        raise TypeError(f"Megalodon's forward has no argument {', '.join(given)}; leave it out")


def _truncated_normal(weight: Tensor, std: float) -> None:
    init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def _init_linear(weight: Tensor, mode: str) -> None:
    if mode == "he":
        init.kaiming_normal_(weight, a=math.sqrt(5.0))
    elif mode == "bert":
        init.normal_(weight, std=0.02)
    elif mode == "gaussian":
        _truncated_normal(weight, 1.0)
    elif mode == "xavier":
        init.xavier_uniform_(weight)


def _init_ema(module: ComplexEMA) -> None:
    """Decays around 3/4, log-spaced frequencies in random order, real gamma."""
    init.normal_(module.alpha, std=0.2)
    init.normal_(module.delta, std=0.2)
    steps = torch.arange(1, module.dim + 1, dtype=torch.float64)
    ratio = torch.exp(-math.log(max(module.dim, 2)) / module.dim * steps)[torch.randperm(module.dim)]
    init.copy_(module.theta, torch.logit(ratio).view(-1, 1, 1).to(module.theta.dtype))
    gamma = torch.randn(module.gamma.shape[:2])
    init.copy_(module.gamma, torch.stack([gamma, torch.zeros_like(gamma)], dim=-1).to(module.gamma.dtype))
    init.trunc_normal_(module.omega, std=0.25, a=-1.0, b=1.0)
