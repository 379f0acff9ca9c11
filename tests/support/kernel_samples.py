"""The kernels against the plain form on random layers, caches and inputs, many of them extreme; see `Sample`.

    export PYTHONPATH=tests
    TRITON_INTERPRET=1 python -m support.kernel_samples DTYPE [SEED ...]    prints the largest excess of each
    python -m support.kernel_samples --cuda DTYPE [SEED ...]

The truth is the plain form in a wider dtype. The plain form in the kernels' own dtype is off by some error, also when
one of its calls rounds otherwise. The kernels may be off by TIMES as much, plus ROUNDINGS. Other roundings are tried
because of channels that hardly change: their variance is nearly 0, TimestepNorm makes of one rounding a difference of a
thousand, and how far the plain form is off is luck. An excess is the error over what is allowed; up to 1 is right.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalodon_export.bundles.verify import visible
from megalodon_export.model import MegalodonCache, MegalodonForCausalLM, freeze_constants, use_kernels
from megalodon_export.model.feed_forward import FeedForward
from support.kernel_cases import interpret
from support.small_models import make_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
TIMES = 4.0  # the kernels' allowed error over the plain form's
ROUNDINGS = 32.0  # and beside it, in roundings (eps) of the largest number

# Extremes -> ends of parameters' names -> the factor on such parameters, and the number added to them.
EXTREMES: dict[str, dict[str, tuple[float, float]]] = {
    "none": {},
    "large inputs": {"embed.weight": (3e4, 0.0)},
    "small inputs": {"embed.weight": (1e-6, 0.0)},
    "no inputs": {"embed.weight": (0.0, 0.0)},
    "equal channels": {"embed.weight": (0.0, 1.0)},  # no variance inside a group
    "EMA that lasts": {"cema.alpha": (1.0, -12.0)},  # |q| is nearly 1
    "EMA that forgets": {"cema.alpha": (1.0, 12.0), "cema.delta": (1.0, 12.0)},  # q is nearly 0
    "sharp attention": {"attn.gamma": (30.0, 0.0)},  # one weight of a softmax is 1
    "large biases": {".bias": (100.0, 0.0)},
}


@dataclass(frozen=True)
class Sample:
    """A model's sizes and flags, an extreme, and the calls: tokens and lengths of prefills, and decode steps."""

    config: dict[str, Any]
    extreme: str
    prefills: list[tuple[Tensor, Tensor]]
    steps: Tensor  # (steps, B)
    chunks_before: int  # chunks that the positions skip after the first call

    @classmethod
    def of(cls, seed: int) -> Sample:
        """The sample of a number; consecutive numbers go through the extremes."""
        rng = random.Random(seed)
        heads, groups, chunk = rng.choice([1, 2, 3]), rng.choice([1, 2, 5]), rng.choice([1, 4, 7, 16, 33])
        channels = groups * rng.choice([1, 3, 8, 20])
        config = {
            **{"num_layers": 1, "num_heads": heads, "norm_num_groups": groups, "chunk_size": chunk},
            **{"model_dim": channels if channels >= 5 else 8 * channels, "z_dim": heads * rng.choice([2, 6, 16])},
            **{"value_dim": heads * rng.choice([1, 8, 20]), "ffn_hidden_dim": rng.choice([5, 16, 40])},
            **{"cema_ndim": rng.choice([1, 2, 5, 16]), "norm_statistics": rng.choice(["megalodon", "megalodon-hf"])},
            **{flag: rng.random() < 0.5 for flag in ("swiglu", "projection_bias", "norm_affine", "rescale_nffn")},
        }
        batch = rng.choice([1, 2, 3, 5, 9])
        generator = torch.Generator().manual_seed(seed)
        tokens = lambda *shape: torch.randint(23, shape, generator=generator)  # noqa: E731
        prefills = []
        for length in (rng.choice([1, 5, 33]), rng.choice([1, 8, 70])):
            prefills.append((tokens(batch, length), torch.randint(0, length + 1, (batch,), generator=generator)))
        extreme = [*EXTREMES][seed % len(EXTREMES)]
        return cls(config, extreme, prefills, tokens(3, batch), rng.choice([0, 0, 3, 100_000]))

    def model(self, dtype: torch.dtype, stored: torch.dtype, device: str) -> MegalodonForCausalLM:
        """The model in `dtype`, with weights rounded to `stored`; the EMA's are float32 at least."""
        model = make_model(torch.float64, **self.config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                for ending, (factor, added) in EXTREMES[self.extreme].items():
                    if name.endswith(ending):
                        parameter.mul_(factor).add_(added)
        model = model.to(torch.float32 if stored == torch.bfloat16 else stored)
        ema = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".cema." in name}
        model = model.to(stored).to(dtype)
        for layer in model.model.layers:
            layer.attn.cema.to(torch.float32 if dtype == torch.bfloat16 else dtype)
        model.load_state_dict(ema, strict=False)
        model = model.to(device)
        freeze_constants(model)
        return model

    def disturbed(self, dtype: torch.dtype, call: int, device: str) -> list[Tensor]:
        """`run` on the model with every linear layer and feed-forward of one call wrong by up to a rounding."""
        model = self.model(dtype, dtype, device)
        generator = torch.Generator().manual_seed(call)
        calls: Counter[nn.Module] = Counter()

        def disturb(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            calls[module] += 1
            if calls[module] != call + 1:
                return output
            noise = 2 * torch.rand(output.shape, generator=generator, dtype=torch.float64) - 1
            return (output.double() * (1 + torch.finfo(dtype).eps * noise.to(device))).to(output.dtype)

        for module in model.modules():
            if isinstance(module, (nn.Linear, FeedForward)):
                module.register_forward_hook(disturb)
        return self.run(model)

    @torch.no_grad()
    def run(self, model: MegalodonForCausalLM) -> list[Tensor]:
        """Logits of every call, and the visible part of the cache in the end."""
        device = model.device
        cache: MegalodonCache = model.new_cache(self.steps.shape[1])
        found = []
        for index, (ids, lengths) in enumerate(self.prefills):
            logits = model.prefill(ids.to(device), lengths.to(device), cache)
            found.append(logits[lengths > 0])
            if index == 0:
                cache.position.add_(self.chunks_before * model.config.chunk_size)
        found += [model.decode(ids.to(device), cache) for ids in self.steps]
        return [t.double().cpu() for t in (*found, *visible(cache))]


def excess(seed: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """The kernels' error over what they are allowed, the largest of a sample; infinite if they give NaN."""
    sample = Sample.of(seed)
    exact = sample.run(sample.model(WIDER[dtype], dtype, device))
    rounded = [sample.disturbed(dtype, call, device) for call in range(len(sample.prefills) + len(sample.steps))]
    rounded.append(sample.run(sample.model(dtype, dtype, device)))
    model = sample.model(dtype, dtype, device)
    use_kernels(model)
    worst = 0.0
    for e, k, *others in zip(exact, sample.run(model), *rounded, strict=True):
        if not e.numel():
            continue
        largest = float(e.abs().max())
        off = max(float((r - e).abs().max()) for r in others)
        allowed = TIMES * off + ROUNDINGS * torch.finfo(dtype).eps * max(largest, 1e-3)
        error = float((k - e).abs().max())
        worst = max(worst, error / allowed if error == error else float("inf"))
    return worst


if __name__ == "__main__":
    on_gpu = sys.argv[1] == "--cuda"
    if not on_gpu:
        interpret()
    name, *seeds = sys.argv[2:] if on_gpu else sys.argv[1:]
    for seed in map(int, seeds or range(len(EXTREMES))):
        print(seed, Sample.of(seed).extreme, excess(seed, DTYPES[name], "cuda" if on_gpu else "cpu"), flush=True)
