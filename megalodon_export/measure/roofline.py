"""What a model cannot avoid: bytes that a decode step moves, operations that a prefill does. One function each."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache

import torch
from torch import nn

from ..model import MegalodonLM, ModelConfig, QuantizedLinear, cache_layout, dimension_sizes


def decode_bytes(config: ModelConfig, dtype: torch.dtype, batch: int, visible: float) -> float:
    """Bytes read and written by a decode step of `batch` rows, each of which sees `visible` tokens (itself included).

    Weights once, whatever the batch: every parameter but the embedding (one row of it for each row of the batch) and
    but the EMA's, of which a step reads what is derived from them: p, q, gamma and omega in float32. Of the cache, per
    row: the visible keys and values read, one slot of each written, and all other states read and written. Activations
    and logits are not counted.
    """
    sizes, rings, slots, states = dimension_sizes(config), 0, 0, 0
    for tensor in cache_layout(config):
        size = tensor.torch_dtype(dtype).itemsize * torch.Size(tensor.shape(sizes, 1)).numel()
        if "C" in tensor.dims:
            rings += size
            slots += size // config.chunk_size
        else:
            states += size
    row = rings * visible / config.chunk_size + slots + 2 * states
    row += config.model_dim * dtype.itemsize  # of the embedding
    return weight_bytes(config, dtype) + batch * row


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights that a step reads whole; the rows of the embedding that it looks up are not among them."""
    parameters, quantized, _ = _counts(_key(config))
    ema = config.num_layers * config.model_dim * (5 * config.cema_ndim + 1)
    return parameters * dtype.itemsize + quantized + ema * max(dtype.itemsize, 4)


def prefill_flops(config: ModelConfig, batch: int, tokens: int, start: int = 0, all_logits: bool = False) -> int:
    """Floating-point operations of a prefill of `tokens` tokens a row, the first at position `start`; a product is 2.

    Per token: 2 for each weight of a linear layer; attention over what the token sees of its chunk, 2 (Z + E) for each
    token seen; the EMA as a recurrence, D (12 N + 2). The head is taken for the last token alone unless `all_logits`.
    Norms, activations and gates are not counted.
    """
    c = config
    _, _, linear = _counts(_key(config))
    ema = c.model_dim * (12 * c.cema_ndim + 2)
    attention = 2 * (c.z_dim + c.value_dim) * visible_tokens(config, start, tokens)
    head = 2 * c.model_dim * c.logits_size * (tokens if all_logits else 1)
    return batch * (tokens * (2 * linear + c.num_layers * ema) + c.num_layers * attention + head)


def visible_tokens(config: ModelConfig, start: int, tokens: int) -> int:
    """How many tokens of their chunks `tokens` tokens from position `start` see, themselves included, in sum."""

    def before(position: int) -> int:
        chunks, rest = divmod(position, config.chunk_size)
        return chunks * config.chunk_size * (config.chunk_size + 1) // 2 + rest * (rest + 1) // 2

    return before(start + tokens) - before(start)


def _key(config: ModelConfig) -> str:
    return json.dumps(asdict(config), sort_keys=True, default=str)


@lru_cache
def _counts(key: str) -> tuple[int, int, int]:
    """What a step reads whole, without the EMA's: the number of parameters, and the bytes of quantised weights and
    their scales. And the number of weights of the layers' linear layers.
    """
    config = ModelConfig(**json.loads(key))
    with torch.device("meta"):
        model = MegalodonLM(config)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    quantized = sum(m.weight.nbytes + m.scale.nbytes for m in layers if isinstance(m, QuantizedLinear))
    linear = sum(m.in_features * m.out_features for m in layers if m is not model.lm_head)
    read = {id(p): p.numel() for name, p in model.named_parameters() if ".cema." not in name and ".embed." not in name}
    if config.head_is_embedding:  # the head is the embedding, read whole
        read[id(model.lm_head.weight)] = model.lm_head.weight.numel()
    return sum(read.values()), quantized, linear
