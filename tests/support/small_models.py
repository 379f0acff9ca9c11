"""Small models of every kind, in which each parameter moves the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import megalodon_export.model as m

SMALL: dict[str, Any] = {
    **{"vocab_size": 23, "model_dim": 12, "num_layers": 2, "num_heads": 2, "z_dim": 8, "value_dim": 12},
    **{"ffn_hidden_dim": 16, "cema_ndim": 3, "chunk_size": 5, "norm_num_groups": 3},
}
HF: dict[str, Any] = {"norm_statistics": "megalodon-hf", "projection_bias": True, "rescale_nffn": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all flags": {"swiglu": True, "rescale_nffn": True, "scale_emb": True, "share_emb": True, "rope_base": 1e5},
    "no affine": {"norm_affine": False, "norm_eps": 1e-3, "output_size": 7},
    "megalodon-hf": HF,
    "one head": {"num_heads": 1, "norm_num_groups": 12},
    "many heads": {"num_heads": 4, "norm_num_groups": 1},
    **{f"chunk {size}": {"chunk_size": size} for size in (1, 2, 3, 16)},
}


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> m.MegalodonForCausalLM:
    """A small model in which every parameter is random and moves the logits, in evaluation mode."""
    torch.manual_seed(seed)
    model = m.MegalodonForCausalLM(m.MegalodonConfig(**{**SMALL, **overrides})).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            columns = parameter.shape[-1] if parameter.dim() == 2 else 1
            parameter.normal_(std=1.0 if ".cema." in name else 0.4 * min(1.0, (16 / columns) ** 0.5))
            if name.endswith("cema.alpha"):
                parameter[:, 0] -= 5.0  # one mode of a channel that still knows what came 200 tokens ago
    return model.to(dtype).eval()


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids of any shape."""
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def full(token_ids: Tensor) -> Tensor:
    """The lengths of token_ids (B, L) without padding."""
    return torch.full((token_ids.shape[0],), token_ids.shape[1])


def named_tensors(config: m.MegalodonConfig, cache: m.MegalodonCache) -> list[tuple[str, Tensor]]:
    """The tensors of a cache with their names."""
    return [(spec.name, t) for spec, t in zip(m.cache_layout(config), cache.tensors(), strict=True)]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of any lengths as token_ids and attention_mask."""
    length = max(map(len, rows))
    token_ids, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        columns = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        token_ids[i, columns], mask[i, columns] = row, 1
    return token_ids, mask


def greedy(model: m.MegalodonForCausalLM, prompt: Tensor, count: int) -> list[int]:
    """By prefill and decode alone."""
    cache, tokens = model.new_cache(1), []
    with torch.no_grad():
        logits = model.prefill(prompt, full(prompt), cache)
        for _ in range(count):
            tokens.append(int(logits.argmax()))
            logits = model.decode(logits.argmax(-1), cache)
    return tokens


def continued(model: m.MegalodonForCausalLM, prompt: Tensor, **arguments: Any) -> list[int]:
    """What generate() adds to one prompt."""
    return model.generate(prompt, **{"do_sample": False, **arguments})[0, prompt.shape[1] :].tolist()
