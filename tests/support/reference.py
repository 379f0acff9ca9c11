"""Megalodon, slowly and obviously: one stream, token by token, float64, every sum written out. No code of `model/`.

Takes a model only for its config and its parameters, whose names and layouts are the model's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass
class NormHistory:
    """Mean and variance inside each group (G) at every step so far: all that a TimestepNorm has seen."""

    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)

    def statistics(self, kind: str) -> tuple[Tensor, Tensor]:
        """Mean and variance (G) over everything seen."""
        means, variances = torch.stack(self.means), torch.stack(self.variances)
        mean = means.mean(0)
        between = (means - mean).square().sum(0)
        count = len(self.means)
        if kind == "megalodon-hf":
            return mean, ((1 + between) / count).clamp(min=1e-6)
        return mean, variances.mean(0) + between / count


@dataclass
class LayerState:
    """What a layer remembers: keys and values (H, d) of the current chunk, EMA state (D, N) complex, its norm."""

    ema: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    norm: NormHistory = field(default_factory=NormHistory)


class Reference:
    """A stream: feed it tokens, it returns logits (V)."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.weights: Weights = {name: t.detach().double() for name, t in model.state_dict().items()}
        size = (self.config.model_dim, self.config.cema_ndim)
        self.layers = [LayerState(torch.zeros(size, dtype=torch.complex128)) for _ in range(self.config.num_layers)]
        self.final = NormHistory()
        self.position = 0

    def feed(self, token_ids: list[int]) -> Tensor:
        """Logits (L, V) of the next tokens."""
        return torch.stack([self.feed_one(token) for token in token_ids])

    def feed_one(self, token: int) -> Tensor:
        """Logits (V) of the next token."""
        x = self.weights["model.embed.weight"][token]
        if self.config.scale_emb:
            x = x * math.sqrt(self.config.model_dim)
        for i, state in enumerate(self.layers):
            prefix = f"model.layers.{i}."
            weights = {k.removeprefix(prefix): t for k, t in self.weights.items() if k.startswith(prefix)}
            h = self._attention(x, weights, state)
            x = x + self._feed_forward(h, weights)  # the residual is the block's input, not h
        x = self._timestep_norm(x, self.final, self.weights["model.norm.weight"], self.weights["model.norm.bias"])
        self.position += 1
        return self.weights["lm_head.weight"] @ x

    def _timestep_norm(self, x: Tensor, history: NormHistory, weight: Tensor, bias: Tensor) -> Tensor:
        groups = x.view(self.config.norm_num_groups, -1)
        history.means.append(groups.mean(1))
        history.variances.append(groups.var(1, correction=0))
        mean, variance = history.statistics(self.config.norm_statistics)
        normed = (groups - mean[:, None]) / torch.sqrt(variance[:, None] + self.config.norm_eps)
        return normed.flatten() * (weight + 1) + bias

    def _ema(self, x: Tensor, weights: Weights, state: LayerState) -> Tensor:
        ndim = self.config.cema_ndim
        p = torch.sigmoid(weights["attn.cema.alpha"])[:, :, 0]
        delta = torch.sigmoid(weights["attn.cema.delta"])[:, :, 0]
        theta = torch.sigmoid(weights["attn.cema.theta"])[:, :, 0] * 2 * math.pi / ndim * torch.arange(1, ndim + 1)
        q = torch.polar(1 - p * delta, theta)
        gamma = torch.view_as_complex(weights["attn.cema.gamma"].contiguous()) / math.sqrt(ndim)
        state.ema = q * state.ema + p * x[:, None]
        return (gamma * state.ema).sum(1).real + weights["attn.cema.omega"][:, 0] * x

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        base = self.config.rope_base or 10_000.0
        angle = (self.position % self.config.chunk_size) * base ** (-torch.arange(half).double() / half)
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones(half).double(), angle)
        return torch.cat([turned.real, turned.imag], dim=1)

    def _attention(self, x: Tensor, weights: Weights, state: LayerState) -> Tensor:
        heads = self.config.num_heads
        x_norm = self._timestep_norm(x, state.norm, weights["attn.timenorm.weight"], weights["attn.timenorm.bias"])
        m = self._rms(self._ema(x_norm, weights, state)) * (weights.get("attn.rmsnorm.weight", torch.zeros(())) + 1)
        z = self._rms(_linear(m, weights, "attn.wz").view(heads, -1))  # (H, dz)
        scale = (weights["attn.gamma"] + 1) / math.sqrt(z.shape[1])
        q, k = (self._rotate(z * scale[i].view(heads, -1) + weights["attn.beta"][i].view(heads, -1)) for i in range(2))
        v = _silu(_linear(x_norm, weights, "attn.wv")).view(heads, -1)

        if self.position % self.config.chunk_size == 0:  # a new chunk sees nothing of the one before
            state.keys, state.values = [], []
        state.keys.append(k)
        state.values.append(v)
        out = []
        for head in range(heads):
            scores = torch.stack([q[head] @ key[head] for key in state.keys])
            shares = torch.exp(scores - scores.max())
            shares = shares / shares.sum()
            terms = [share * value[head] for share, value in zip(shares, state.values, strict=True)]
            out.append(torch.stack(terms).sum(0))
        gated = torch.cat(out) * _silu(_linear(m, weights, "attn.wr"))
        return _linear(m, weights, "attn.wh1") + _linear(gated, weights, "attn.wh2") + x

    def _feed_forward(self, h: Tensor, weights: Weights) -> Tensor:
        h = (h - h.mean()) / torch.sqrt(h.var(correction=0) + self.config.norm_eps)
        if self.config.norm_affine:
            h = h * (weights["ffn.norm.weight"] + 1) + weights["ffn.norm.bias"]
        hidden = _silu(_linear(h, weights, "ffn.fc1"))
        if self.config.swiglu:
            hidden = hidden * _linear(h, weights, "ffn.fc3")
        out = _linear(hidden, weights, "ffn.fc2")
        return out * weights["ffn.alpha"] if self.config.rescale_nffn else out

    def _rms(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps)


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))
