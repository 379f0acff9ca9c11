"""The GPU: programs against eager, CUDA graphs against none, memory over many steps. Run with `pytest -m cuda`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalodon_export import Session
from megalodon_export.bundles import bundle
from megalodon_export.bundles.verify import BOUNDS
from megalodon_export.export.aoti import export_aoti
from megalodon_export.generation.sampling import SamplingParams, sample, uniform
from megalodon_export.generation.text import byte_tokenizer
from megalodon_export.runtimes import Runtime, open_runtime
from support.small_models import make_model

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the GPU; the export itself verifies it against eager on the GPU."""
    assert not torch.backends.cuda.matmul.allow_tf32
    place = tmp_path_factory.mktemp(request.param)
    make_model(torch.float32, chunk_size=64).save_pretrained(place / "checkpoint")
    export_aoti(place / "checkpoint", place / "bundle", "cuda", request.param, max_batch=8)
    return place / "bundle"


def opened(folder: Path, name: str = "aoti") -> Runtime:
    return open_runtime(name, folder, bundle.read(folder), "cuda")


def test_gpu_equals_cpu(folder: Path) -> None:
    manifest = bundle.read(folder)
    runtime, reference = opened(folder), open_runtime("eager", folder, manifest, "cpu")
    ids, lengths = torch.randint(runtime.config.vocab_size, (3, 150)), torch.tensor([150, 1, 64])
    found = runtime.bind(runtime.new_cache(3)).prefill(ids.cuda(), lengths).cpu()
    expected = reference.bind(reference.new_cache(3)).prefill(ids, lengths)
    assert (found - expected).abs().max() < BOUNDS[manifest.dtype]


@pytest.mark.parametrize("name", ["aoti", "eager"])
def test_a_captured_decode_gives_the_same_tokens(folder: Path, name: str) -> None:
    runtime = opened(folder, name)
    plain, graphed = (runtime.bind(runtime.new_cache(2), capture) for capture in (False, True))
    tokens = [torch.tensor([3, 5], device="cuda")] * 2
    memory = []
    for index in range(1000):
        tokens[0] = plain.decode(tokens[0]).argmax(-1)
        tokens[1] = graphed.decode(tokens[1]).argmax(-1)
        assert torch.equal(*tokens), f"step {index}"
        memory.append(torch.cuda.memory_allocated())
    assert memory[-1] == memory[10]
    for a, b in zip(plain.cache.tensors(), graphed.cache.tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["aoti", "eager"])
def test_a_captured_prefill_gives_what_the_program_gives(folder: Path, name: str) -> None:
    """Sizes that come a third time are replayed, in any order, with other lengths and from other positions."""
    runtime = opened(folder, name)
    plain, graphed = (runtime.bind(runtime.new_cache(2), capture) for capture in (False, True))
    for index, length in enumerate((70, 33, 70, 33, 70, 1, 33, 128, 70, 128, 200, 128, 33)):
        ids = torch.randint(runtime.config.vocab_size, (2, length), device="cuda")
        lengths = torch.tensor([length, (index * 17) % (length + 1)])
        assert torch.equal(graphed.prefill(ids, lengths), plain.prefill(ids, lengths)), f"call {index}"
        for a, b in zip(plain.cache.tensors(), graphed.cache.tensors(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(1.0, seed=3),
        SamplingParams(0.9, top_k=9, top_p=0.9, min_p=0.01, seed=2**64 - 1),
    ],
    ids=["greedy", "unranked", "ranked"],
)
def test_the_captured_loop_gives_the_tokens_of_the_plain_one(
    folder: Path, params: SamplingParams, lookahead: int
) -> None:
    runtime, steps = opened(folder), 500
    cache = runtime.new_cache(1)
    programs = runtime.bind(cache, capture=False)
    logits = programs.prefill(torch.tensor([[1, 2, 3]], device="cuda"), torch.tensor([3]))
    expected = []
    for index in range(steps):
        draws = torch.tensor([uniform(params.seed, index)], dtype=torch.float64, device="cuda")
        token = sample(logits, params, draws)
        expected.append(int(token))
        logits = programs.decode(token)
    session = Session(runtime, lookahead=lookahead)
    fields = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    memory = []
    for index, token_id in enumerate(session.generate_ids([1, 2, 3], steps + 1, eos_token_id=-1, **fields)):
        assert index == steps or token_id == expected[index], f"token {index}"
        memory.append(torch.cuda.memory_allocated())
    assert memory[-1] == memory[10]
    for a, b in zip(session.cache.tensors(), cache.tensors(), strict=True):
        assert torch.equal(a, b)


def test_a_loop_that_ran_ahead_stops_where_stepping_does(folder: Path) -> None:
    runtime = opened(folder)
    for count in (1, 5, 59, 60, 61, 62, 63, 64, 65, 66):  # the chunk of 64 ends at token 61
        plain, ahead = Session(runtime, lookahead=0), Session(runtime, lookahead=3)
        expected = list(plain.generate_ids([1, 2, 3], count, eos_token_id=-1, temperature=1.0))
        generation = ahead.generate_ids([1, 2, 3], 200, eos_token_id=-1, temperature=1.0)
        assert [next(generation) for _ in range(count)] == expected
        generation.close()
        assert ahead.snapshot().pending == plain.snapshot().pending
        assert list(ahead.generate_ids([], 80, eos_token_id=-1)) == list(plain.generate_ids([], 80, eos_token_id=-1))


def test_batches_of_one_size_are_captured_once(folder: Path) -> None:
    session = Session(opened(folder), byte_tokenizer())
    session.runtime.config.bos_token_id = 1
    first = session.generate_batch(["", "", ""], 40, temperature=1.0)
    assert session.generate_batch(["", "", ""], 40, temperature=1.0) == first  # its prefill is captured now
    loop = session._batch_loop
    allocated = torch.cuda.memory_allocated()
    for _ in range(3):
        assert session.generate_batch(["", "", ""], 40, temperature=1.0) == first
    assert session._batch_loop is loop
    assert torch.cuda.memory_allocated() == allocated


def test_capturing_leaves_the_cache_as_it_was(folder: Path) -> None:
    runtime = opened(folder)
    cache = runtime.new_cache(2)
    programs = runtime.bind(cache)
    programs.prefill(torch.randint(runtime.config.vocab_size, (2, 70), device="cuda"), torch.tensor([70, 9]))
    before = [tensor.clone() for tensor in cache.tensors()]
    token_ids = torch.zeros(2, dtype=torch.int64, device="cuda")
    programs.capture_step(lambda: programs.run_decode(token_ids), [])
    for a, b in zip(before, cache.tensors(), strict=True):
        assert torch.equal(a, b)


def test_an_unknown_token_id_is_refused_and_other_sessions_go_on(folder: Path) -> None:
    runtime = opened(folder)
    session, other = Session(runtime), Session(runtime)
    expected = list(other.generate_ids([1, 2, 3], 5))
    for feed in (lambda: session.prefill([1, 1_000_000]), lambda: session.decode(-1)):
        with pytest.raises(ValueError, match="token ids must be in"):
            feed()
    with pytest.raises(ValueError, match="token ids must be in"):
        list(session.generate_ids([1_000_000], 5))
    other.reset()
    assert list(other.generate_ids([1, 2, 3], 5)) == expected
    assert list(session.generate_ids([1, 2, 3], 5)) == expected
