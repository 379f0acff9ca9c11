"""The original's initialisation of a model's parameters; transformers leaves alone what came from a checkpoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..config import ModelConfig
from ..ema import ComplexEMA
from ..feed_forward import FeedForward
from ..gated_attention import GatedAttention


def initialize(module: nn.Module, config: ModelConfig, is_head: bool) -> None:
    """Initialise the parameters that a module holds itself; `is_head` says whether it is the language-model head."""
    if isinstance(module, nn.Embedding):
        _truncated_normal(module.weight, 1 / math.sqrt(config.model_dim))
    elif isinstance(module, nn.Linear):
        if is_head:
            _truncated_normal(module.weight, 1 / math.sqrt(config.model_dim))
        else:
            _init_linear(module.weight, config.init_mode)
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
    else:  # the norms, whose scales are weight + 1
        for parameter in module.parameters(recurse=False):
            init.zeros_(parameter)


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
