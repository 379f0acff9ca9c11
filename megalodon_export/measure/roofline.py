"""The roofline of a model: the bytes that a decode step has to move, and the operations that a prefill has to do.

A program cannot be faster than these over the peak rates of its device (`PeakRates` in `bench.py`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import nn

from ..model import MegalodonLM, ModelConfig, QuantizedLinear, cache_layout, dimension_sizes
from ..model.cache import RING_DIM


@dataclass(frozen=True)
class RooflineBytes:
    """Bytes that a decode step reads and writes at least. Activations and logits are not counted.

    `weights` are read once, whatever the batch (`weight_bytes`). The others are sums over the rows of the batch:
    `embedding` is one row of the embedding for each token, `ring` the visible keys and values, read, and one slot of
    each, written; `states` are all other tensors of the cache, read and written.
    """

    weights: int
    embedding: int
    ring: float
    states: int

    @property
    def total(self) -> float:
        """The sum of all four."""
        return self.weights + self.embedding + self.ring + self.states


def decode_bytes(config: ModelConfig, dtype: torch.dtype, batch: int, visible: float) -> RooflineBytes:
    """The bytes of a decode step of `batch` rows, each of which attends to `visible` tokens (itself included)."""
    sizes, slot, states = dimension_sizes(config), 0, 0  # bytes of a row
    for tensor in cache_layout(config):
        size = tensor.torch_dtype(dtype).itemsize * torch.Size(tensor.shape(sizes, 1)).numel()
        if RING_DIM in tensor.dims:
            slot += size // config.chunk_size
        else:
            states += size
    embedding = config.model_dim * dtype.itemsize
    return RooflineBytes(
        weight_bytes(config, dtype), batch * embedding, batch * slot * (visible + 1), batch * 2 * states
    )


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights that a decode step reads whole, the derived constants of the EMA among them.

    The embedding is not counted, unless it is the head as well. The EMA's parameters are not counted either: a step
    reads what is derived from them, p, q, gamma and omega in float32.
    """
    counts = _count_parameters(_key(config))
    ema = config.num_layers * config.model_dim * (5 * config.cema_ndim + 1)
    return counts.read_whole * dtype.itemsize + counts.quantized_bytes + ema * max(dtype.itemsize, 4)


def prefill_flops(config: ModelConfig, batch: int, tokens: int, start: int = 0, all_logits: bool = False) -> int:
    """Floating-point operations of a prefill of `tokens` tokens a row, the first at position `start`.

    A multiplication and an addition are 2 operations. A token needs 2 for each weight of a linear layer, 2 (Z + E) for
    each token that it attends to, in each layer, and D (12 N + 2) for the EMA as a recurrence, in each layer. The head
    is computed for the last token alone unless `all_logits`. Norms, activations and gates are not counted.
    """
    c = config
    linear = _count_parameters(_key(config)).linear_weights
    ema = c.model_dim * (12 * c.cema_ndim + 2)
    attention = 2 * (c.z_dim + c.value_dim) * visible_tokens(config, start, tokens)
    head = 2 * c.model_dim * c.logits_size * (tokens if all_logits else 1)
    return batch * (tokens * (2 * linear + c.num_layers * ema) + c.num_layers * attention + head)


def visible_tokens(config: ModelConfig, start: int, tokens: int) -> int:
    """The sum, over `tokens` tokens from position `start`, of how many tokens each attends to (itself included).

    A token attends to its chunk: with chunk_size 4, the tokens at positions 3, 4 and 5 attend to 4, 1 and 2 tokens.
    """

    def before(position: int) -> int:
        chunks, rest = divmod(position, config.chunk_size)
        return chunks * config.chunk_size * (config.chunk_size + 1) // 2 + rest * (rest + 1) // 2

    return before(start + tokens) - before(start)


@dataclass(frozen=True)
class _ParameterCounts:
    read_whole: int  # parameters that a decode step reads whole, without the EMA's
    quantized_bytes: int  # bytes of quantised weights and their scales
    linear_weights: int  # weights of the layers' linear layers, without the head's


def _key(config: ModelConfig) -> str:
    """The config as a string, which a cache can hold."""
    return json.dumps(asdict(config), sort_keys=True, default=str)


@lru_cache
def _count_parameters(key: str) -> _ParameterCounts:
    config = ModelConfig.from_dict(json.loads(key))
    with torch.device("meta"):
        model = MegalodonLM(config)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    quantized = sum(m.weight.nbytes + m.scale.nbytes for m in layers if isinstance(m, QuantizedLinear))
    linear = sum(m.in_features * m.out_features for m in layers if m is not model.lm_head)
    read = {id(p): p.numel() for name, p in model.named_parameters() if ".cema." not in name and ".embed." not in name}
    if config.head_is_embedding:  # the head reads the whole embedding
        read[id(model.lm_head.weight)] = model.lm_head.weight.numel()
    return _ParameterCounts(sum(read.values()), quantized, linear)
