"""The Triton kernels against the plain form: under Triton's interpreter on a CPU, compiled on a GPU (`-m cuda`)."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from megalodon_export.bundles.verify import BOUNDS, visible
from megalodon_export.model import MegalodonForCausalLM, freeze_constants, use_kernels
from support.golden_data import names
from support.interpreted import TESTS
from support.kernel_cases import CASES, OTHERS, golden_difference, make, wrong_ends, wrong_next_tokens
from support.kernel_samples import DTYPES, EXTREMES, excess
from support.slow import slow_except
from support.small_models import VARIANTS, random_tokens

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (it comes with a CUDA build of torch)"
)


@needs_triton
@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_interpreted_kernels_compute_what_they_should(interpreted_kernels: dict[str, list[float]], case: str) -> None:
    assert max(interpreted_kernels[case]) < BOUNDS["float32"]


# The samples in bfloat16 add its roundings; every path of the kernels is in those in float32.
@needs_triton
@pytest.mark.parametrize("dtype", slow_except(DTYPES, "float32"))
def test_interpreted_kernels_are_right_on_random_and_extreme_samples(
    interpreted_kernels: dict[str, list[float]], dtype: str
) -> None:
    assert len(interpreted_kernels[dtype]) == len(EXTREMES)
    assert max(interpreted_kernels[dtype]) <= 1


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(60))
def test_compiled_kernels_are_right_on_random_and_extreme_samples(seed: int, dtype: str) -> None:
    assert excess(seed, DTYPES[dtype], "cuda") <= 1


@needs_triton
def test_compiled_for_a_gpu_no_kernel_becomes_float64_by_its_eps() -> None:
    """Compiled programs pass eps as float64; a float64 sum made the up projection take twice the time."""
    found = compiled("float64")
    names = {"up_projection_gemv", "attend", "rms_norm", "layer_norm", "embed_tokens", "final_norm"}
    assert found == {f"megalodon_{name}": "0" for name in names}


@needs_triton
def test_compiled_for_a_gpu_attention_loads_whole_vectors() -> None:
    """A choice between two pointers, to the ring and to what is new, once made it load values number by number."""
    names = {"pv_matmul", "scores", "softmax", "store_ring"}
    assert compiled("narrow") == {f"megalodon_{name}": "0" for name in names}


def compiled(count: str) -> dict[str, str]:
    """What `kernel_types.py` counts, by kernel."""
    command = [sys.executable, str(TESTS / "support" / "kernel_types.py"), count]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split() for line in done.stdout.splitlines())


def pair(
    dtype: torch.dtype, weights: str = "float", **sizes: object
) -> tuple[MegalodonForCausalLM, MegalodonForCausalLM]:
    """The same model twice on the GPU, the second on the kernels."""
    models = []
    for _ in range(2):
        model = make(weights, sizes, dtype).cuda()
        for layer in model.model.layers:
            layer.attn.cema.float()
        freeze_constants(model)
        models.append(model)
    use_kernels(models[1])
    return models[0], models[1]


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 3, 5, 17])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_compiled_kernels_equal_the_plain_form(name: str, batch: int) -> None:
    plain, fast = pair(torch.float32, **VARIANTS[name])
    caches = [plain.new_cache(batch), fast.new_cache(batch)]
    for index, length in enumerate((7, 3, 70, 1)):
        ids = random_tokens(batch, length, seed=index).cuda()
        lengths = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(index)).cuda()
        a, b = (m.prefill(ids, lengths, c) for m, c in zip((plain, fast), caches, strict=True))
        assert (a - b).abs().max() < 1e-4
    for index in range(8):
        ids = random_tokens(batch, seed=index).cuda()
        a, b = (m.decode(ids, c) for m, c in zip((plain, fast), caches, strict=True))
        assert (a - b).abs().max() < 1e-4
    for x, y in zip(*(visible(c) for c in caches), strict=True):
        assert (x - y).abs().max() <= 1e-4 * max(1.0, float(x.abs().max()))


@pytest.mark.cuda
@pytest.mark.parametrize("name", [*(n for n in names("model_") if n != "model_inference_longdoc"), *names("hf_")])
def test_compiled_kernels_compute_what_the_original_does(name: str) -> None:
    assert golden_difference(name, "cuda") < (1e-3 if name.startswith("hf_") else 2e-4)


@pytest.mark.cuda
def test_compiled_next_tokens_are_those_of_the_sampler() -> None:
    assert wrong_next_tokens("cuda") == 0


@pytest.mark.cuda
def test_compiled_ends_of_a_step_equal_the_plain_form() -> None:
    assert wrong_ends("cuda") == 0


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("batch", [1, 6])
@torch.no_grad()
def test_compiled_kernels_read_integers(weights: str, batch: int, dtype: torch.dtype) -> None:
    plain, fast = pair(dtype, weights, swiglu=True, projection_bias=True)
    caches = [plain.new_cache(batch), fast.new_cache(batch)]
    for index in range(6):
        ids = random_tokens(batch, seed=index).cuda()
        a, b = (m.decode(ids, c) for m, c in zip((plain, fast), caches, strict=True))
        assert (a - b).abs().max() < BOUNDS[str(dtype).removeprefix("torch.")]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [3, 9])
@torch.no_grad()
def test_kernels_are_batch_invariant_and_deterministic(dtype: torch.dtype, batch: int) -> None:
    _, model = pair(dtype, chunk_size=64)
    ids = random_tokens(batch, 90).cuda()
    other = random_tokens(batch, 90, seed=1).cuda()
    other[0] = ids[0]
    lengths = torch.full((batch,), 90, device="cuda")
    found = []
    for tokens in (ids, ids, other):
        cache = model.new_cache(batch)
        model.prefill(tokens, lengths, cache)
        found.append(torch.stack([model.decode(tokens[:, i], cache) for i in range(5)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][:, 0], found[2][:, 0])
