"""The kernels of a layer against its plain form, in float32, in a process of its own: interpreted, or on a GPU.

    export PYTHONPATH=tests
    TRITON_INTERPRET=1 python -m support.kernel_cases [CASE ...]        prints the largest difference of each
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m support.kernel_cases --cuda [CASE ...]

Each case is a variant of the small model and a batch. Rows are ragged, calls cross chunks, and rows without tokens
keep their cache.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_export.bundles.verify import visible
from megalodon_export.generation.sampling import SamplerKind, choose
from megalodon_export.model import MegalodonCache, MegalodonForCausalLM, QuantizedLinear, freeze_constants, use_kernels
from megalodon_export.model.quantized import empty_quantized, replace_linear_layers
from support.golden_data import convert, load, write_checkpoint
from support.small_models import VARIANTS, make_model, random_tokens

# name -> variant, rows, lengths of prefill calls, decode steps. Five rows take the GEMM path, three the GEMV path.
# A case whose name begins with int8 or int4 has such weights; "wide" takes the path of models with many features.
CASES = {
    "plain": ("plain", 3, (7, 0, 12), 3),
    "all flags": ("all flags", 3, (9,), 2),
    "no affine": ("no affine", 2, (6,), 2),
    "megalodon-hf": ("megalodon-hf", 2, (6, 3), 2),
    "one head": ("one head", 2, (6,), 2),
    "chunk 1": ("chunk 1", 2, (3,), 2),
    "segments": ("chunk 16", 1, (5, 70), 1),
    "wide": ("chunk 16", 1, (5, 140), 1),
    "many columns": ("many columns", 2, (), 1),
    "GEMM": ("all flags", 5, (3,), 2),
    "int8": ("all flags", 2, (3,), 2),
    "int8 GEMM": ("megalodon-hf", 5, (), 2),
    "int4": ("all flags", 2, (3,), 2),
    "int4 GEMM": ("megalodon-hf", 5, (), 2),
}

# Columns for which a program of the GEMV path has four or eight output features; 640 are 512 and a tail.
COLUMNS = {"num_layers": 1, "model_dim": 512, "value_dim": 640, "ffn_hidden_dim": 640, "norm_num_groups": 32}
SIZES: dict[str, dict[str, Any]] = {**VARIANTS, "many columns": COLUMNS}
GOLDEN = ("model_small_swiglu",)  # of the golden files; the interpreter takes its time
# Not layers: the original's logits, the sampler's most probable tokens, and the kernels around a step's layers.
OTHERS = (*GOLDEN, "argmax", "ends")


def interpret() -> None:
    """Make Triton's interpreter ready, before the kernels are imported."""
    from megalodon_export.model.kernels.decode import attention
    from support import triton_interpreter  # noqa: F401

    attention.FULL_GPU_PROGRAMS = 8  # a GPU's worth of programs takes minutes here


def run(name: str, device: str = "cpu") -> float:
    """Largest difference of logits and visible cache between both forms; see OTHERS."""
    if name == "argmax":
        return wrong_next_tokens(device)
    if name == "ends":
        return wrong_ends(device)
    if name in GOLDEN:
        return golden_difference(name, device)
    if name == "wide":
        from megalodon_export.model.kernels.prefill import ema, norms

        with mock.patch.object(ema, "WIDE_DIM", 1), mock.patch.object(norms, "WIDE_DIM", 1):
            return worst_difference(name, device)
    return worst_difference(name, device)


def worst_difference(name: str, device: str) -> float:
    """Largest difference of logits and visible cache between both forms in one of CASES."""
    variant, batch, calls, steps = CASES[name]
    weights = name.split()[0] if name.startswith("int") else "float"
    plain, fast = (make(weights, SIZES[variant]).to(device) for _ in range(2))
    for model in (plain, fast):
        freeze_constants(model)
    use_kernels(fast)
    caches = [plain.new_cache(batch), fast.new_cache(batch)]
    worst = 0.0
    with torch.no_grad():
        for index, length in enumerate(calls):
            ids = random_tokens(batch, max(length, 1), seed=index).to(device)
            lengths = torch.tensor([length, length // 2, 0, length, 1][:batch], device=device).clamp(max=length)
            pair = [m.prefill(ids, lengths, c) for m, c in zip((plain, fast), caches, strict=True)]
            worst = max(worst, difference(pair[0][lengths > 0], pair[1][lengths > 0]))
        for index in range(steps):
            ids = random_tokens(batch, seed=100 + index).to(device)
            pair = [m.decode(ids, c) for m, c in zip((plain, fast), caches, strict=True)]
            worst = max(worst, difference(*pair))
    return max(worst, cache_difference(*caches))


def make(weights: str, variant: dict[str, Any], dtype: torch.dtype = torch.float32) -> MegalodonForCausalLM:
    """A small model; its int8 or int4 weights are random, so that no library has to quantise."""
    model = make_model(dtype, **variant)
    if weights != "float":
        generator = torch.Generator().manual_seed(0)
        replace_linear_layers(model, weights, empty_quantized(2))
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                packed = layer.weight.dtype == torch.uint8
                low, high = (0, 256) if packed else (-128, 128)
                layer.weight.copy_(torch.randint(low, high, layer.weight.shape, generator=generator))
                layer.scale.copy_(torch.rand(layer.scale.shape, generator=generator) / (8 if packed else 128))
                if layer.bias is not None:
                    layer.bias.data = torch.rand(layer.bias.shape, generator=generator).to(dtype)
        model.config.weight_format = weights
    return model


def golden_difference(name: str, device: str = "cpu") -> float:
    """Largest difference of the kernels' logits from the original's, over a golden file's stream of calls and steps."""
    info, tensors = load(name)
    with tempfile.TemporaryDirectory() as scratch:
        convert(name)(write_checkpoint(name, Path(scratch, "source")), Path(scratch, "model"))
        model = MegalodonForCausalLM.from_pretrained(Path(scratch, "model")).eval().to(device)
    freeze_constants(model)
    use_kernels(model)
    token_ids, expected = (tensors[key].to(device) for key in ("tokens", "stream.logits"))
    segments = next(case["segments"] for case in info["cases"] if case["name"] == "stream")
    cache, logits = model.new_cache(token_ids.shape[0]), []
    with torch.no_grad():
        for piece in token_ids[:, : sum(segments)].split(segments, dim=1):
            step = piece.shape[1] == 1
            found = model.decode(piece[:, 0], cache)[:, None] if step else model(piece, past_key_values=cache).logits
            logits.append(found)
    return difference(torch.cat(logits, dim=1), expected)


def wrong_next_tokens(device: str = "cpu") -> int:
    """Rows for which the kernel and `sampling.choose` differ, in the most probable token or in the logit error."""
    from megalodon_export.model.kernels.decode.argmax import argmax

    wrong = 0
    for vocabulary in (1, 5, 257, 20_000, 40_000):
        logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(vocabulary)).to(device)
        logits[1] = 3.5  # the first of equal ones
        logits[2, vocabulary // 2 :: 2] = 9.0
        logits[3, -1] = 99.0
        logits[4, ::3] = torch.nan
        logits[5] = torch.nan
        logits[6, vocabulary // 2] = torch.inf
        logits[7] = -torch.inf
        logits[8, vocabulary // 2 :] = -torch.inf
        next_tokens = torch.full((2, 9), 77, device=device)
        argmax(logits, next_tokens)
        expected = torch.stack(choose(logits, SamplerKind.GREEDY))
        wrong += int((next_tokens != expected).any(dim=0).sum())
    return wrong


class Operators(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def wrong_ends(device: str = "cpu") -> int:
    """How many numbers of the embedding and of the final norm are not the plain form's, over dtypes and variants.

    It also counts calls that take more than one operator, and unknown tokens that give numbers.
    """
    from megalodon_export.model.kernels.backend import KernelBackend

    wrong = 0
    variants = [{**VARIANTS["all flags"], "model_dim": 18}, VARIANTS["megalodon-hf"], VARIANTS["one head"]]
    for dtype, variant in itertools.product((torch.float32, torch.float16, torch.bfloat16), variants):
        plain, fast = (make_model(dtype, **variant).to(device).model for _ in range(2))
        for model in (plain, fast):
            model.supported_dtypes = (dtype,)
            freeze_constants(model)
        fast.backend = KernelBackend()
        ours, theirs = (model.new_cache(3).final for model in (fast, plain))
        for final in (ours, theirs):
            final.position += torch.tensor([0, 4, 70], device=device)
        for index in range(4):
            ids = random_tokens(3, 2, seed=index).to(device)[:, 0]  # not contiguous
            with torch.no_grad():
                x, rotary = plain.begin_decode(ids, theirs.position)
                y = plain.end_decode(x, theirs)
                with Operators() as operators:
                    found_x, found_rotary = fast.begin_decode(ids, ours.position)
                    found_y = fast.end_decode(x, ours)
            wrong += operators.names != ["megalodon.embed_tokens.default", "megalodon.final_norm.default"]
            near = [(found_y, y), (ours.norm_mean, theirs.norm_mean), (ours.norm_var, theirs.norm_var)]
            same = [*zip(found_rotary, rotary, strict=True), (ours.position, theirs.position)]
            # Triton's interpreter rounds to bfloat16 by truncation.
            (near if (device, dtype) == ("cpu", torch.bfloat16) else same).append((found_x, x))
            wrong += sum(int((a != b).sum()) + (a.dtype != b.dtype) for a, b in same)
            off = [(a - b).abs() > (2 * torch.finfo(dtype).eps + 1e-5) * b.abs().clamp(min=1) for a, b in near]
            wrong += sum(int(those.sum()) for those in off)
        with torch.no_grad():
            x, _ = fast.begin_decode(torch.tensor([-1, fast.config.vocab_size, 0], device=device), ours.position)
        wrong += int((x.isnan() != torch.tensor([[True], [True], [False]], device=device)).sum())
    return wrong


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest |a - b|; infinite if there is no number."""
    largest = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return largest if largest == largest else float("inf")


def cache_difference(a: MegalodonCache, b: MegalodonCache) -> float:
    """Largest difference in what a stream can see of its cache."""
    return max(difference(x, y) for x, y in zip(visible(a), visible(b), strict=True))


if __name__ == "__main__":
    on_gpu = sys.argv[1:2] == ["--cuda"]
    if not on_gpu:
        interpret()
    for case in sys.argv[1 + on_gpu :] or [*CASES, *OTHERS]:
        print(case, run(case, "cuda" if on_gpu else "cpu"), flush=True)
