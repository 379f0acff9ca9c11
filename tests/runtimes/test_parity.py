"""The programs of every runtime against the eager model: the same numbers at every batch, length and split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalodon_export.bundles import bundle
from megalodon_export.bundles.verify import Case, compare
from megalodon_export.model import MegalodonCache
from megalodon_export.runtimes import Runtime, open_runtime
from support.slow import slow_except

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = (None,) * 3
Pair = tuple[Runtime, Runtime]


BUNDLES = ("tiny_bundle", "short_chunk_bundle", "tiny_onnx_bundle", "short_chunk_onnx_bundle")


# The slow one adds what Inductor makes of prefill's second form, which ONNX and eager mode run too.
@pytest.fixture(scope="module", params=slow_except(BUNDLES, *(set(BUNDLES) - {"short_chunk_bundle"})))
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    """The bundle's runtime, eager."""
    manifest = bundle.read(folder)
    (name,) = manifest.programs.by_runtime()
    return open_runtime(name, folder, manifest), open_runtime("eager", folder, manifest)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def contents(cache: MegalodonCache) -> list[Tensor]:
    return [t.clone() for t in cache.tensors()]


def assert_close(pair: Pair, batch: int, *calls: tuple[int, ...] | None) -> None:
    logits, cache, agreement = compare(*pair, Case("", batch, calls))
    assert logits < 1e-4
    assert cache < 1e-4
    assert agreement == 1.0


LENGTHS: dict[str, Callable[[int], int]] = {
    "1": lambda chunk: 1,
    "chunk - 1": lambda chunk: chunk - 1,
    "chunk": lambda chunk: chunk,
    "chunk + 1": lambda chunk: chunk + 1,
    "2 chunk + 5": lambda chunk: 2 * chunk + 5,
}


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_then_decode(pair: Pair, batch: int, length: str) -> None:
    count = LENGTHS[length](pair[0].config.chunk_size)
    assert_close(pair, batch, (count,) * batch, *STEPS)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("start", [1, 0.5, -1])
def test_prefill_from_inside_a_chunk(pair: Pair, length: str, start: float) -> None:
    chunk = pair[0].config.chunk_size
    first = {1: 1, 0.5: chunk // 2, -1: chunk - 1}[start]
    assert_close(pair, 2, (first, first), (LENGTHS[length](chunk),) * 2, *STEPS)


def test_ragged_rows_and_empty_ones(pair: Pair) -> None:
    chunk = pair[0].config.chunk_size
    ragged = (1, chunk, 0, chunk - 1, 2 * chunk + 5, 3, chunk + 1, 0)
    assert_close(pair, 8, ragged, ragged[::-1], *STEPS)
    assert_close(pair, 8, ragged, *STEPS, (0, 0, 0, 0, 0, 0, 0, chunk + 1), *STEPS)


def test_decode_from_nothing_across_chunks(pair: Pair) -> None:
    chunk = pair[0].config.chunk_size
    assert_close(pair, 2, *(None,) * (2 * chunk + 3))
    assert_close(pair, 3, (chunk - 2, chunk - 1, 1), *(None,) * (chunk + 2))


def test_greedy_tokens_are_equal_for_512_steps(pair: Pair) -> None:
    written = []
    for runtime in pair:
        programs = runtime.bind(runtime.new_cache(2))
        logits = programs.prefill(random_ids(2, 100), torch.tensor([100, 37]))
        tokens = []
        for _ in range(512):
            tokens.append(logits.argmax(-1))
            logits = programs.decode(tokens[-1])
        written.append(torch.stack(tokens))
    assert torch.equal(*written)
    assert len(set(written[0].flatten().tolist())) > 10  # not one token over and over


def test_prompts_beyond_one_call_are_those_of_the_whole_model(folder: Path, pair: Pair) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    longest = pair[0].limits.max_length
    token_ids = random_ids(2, 3 * longest + 7)
    lengths = torch.tensor([3 * longest + 7, longest + 1])
    with torch.no_grad():
        expected = model(token_ids, lengths=lengths).logits[torch.arange(2), lengths - 1]
    for runtime in pair:
        cache = runtime.new_cache(2)
        assert (runtime.bind(cache).prefill(token_ids, lengths) - expected).abs().max() < 1e-4
        assert cache.position.tolist() == lengths.tolist()


def test_rows_of_a_batch_are_rows_run_alone(pair: Pair) -> None:
    runtime, chunk = pair[0], pair[0].config.chunk_size
    lengths = [1, chunk + 1, 2 * chunk + 5]
    token_ids, following = random_ids(3, max(lengths)), random_ids(4, 3, seed=1)
    together = runtime.bind(runtime.new_cache(3))
    logits = [together.prefill(token_ids, torch.tensor(lengths))]
    logits += [together.decode(step) for step in following]
    for row, length in enumerate(lengths):
        alone = runtime.bind(runtime.new_cache(1))
        own = [alone.prefill(token_ids[row : row + 1, :length], torch.tensor([length]))]
        own += [alone.decode(step[row : row + 1]) for step in following]
        for a, b in zip(logits, own, strict=True):
            assert (a[row] - b[0]).abs().max() < 2e-5


def test_the_cache_is_updated_in_place(pair: Pair) -> None:
    for runtime in pair:
        cache = runtime.new_cache(2)
        programs = runtime.bind(cache)
        addresses, before = [t.data_ptr() for t in cache.tensors()], contents(cache)
        programs.prefill(random_ids(2, 11), torch.tensor([11, 3]))
        assert all(not torch.equal(a, b) for a, b in zip(cache.tensors(), before, strict=True))
        programs.decode(random_ids(2))
        assert [t.data_ptr() for t in cache.tensors()] == addresses
        assert cache.position.tolist() == [12, 4]


def test_scoring_gives_the_logits_of_every_token_where_the_programs_do(pair: Pair) -> None:
    token_ids, lengths = random_ids(2, 20), torch.tensor([20, 7])
    runtime, eager = (r.bind(r.new_cache(2)) for r in pair)
    found = eager.score(token_ids, lengths)
    assert found.shape == (2, 20, 257)
    last = eager.runtime.bind(eager.runtime.new_cache(2)).prefill(token_ids, lengths)
    assert (found[[0, 1], lengths - 1] - last).abs().max() < 2e-5
    before = contents(runtime.cache)
    with pytest.raises(ValueError, match=r"export it again with --all-logits"):
        runtime.score(token_ids, lengths)
    assert all(map(torch.equal, runtime.cache.tensors(), before))


def test_programs_run_on_more_threads_than_they_were_compiled_on(tiny_bundle: Path) -> None:
    """The bundle is exported on one thread; from code for one thread, two once computed other logits."""
    manifest = bundle.read(tiny_bundle)
    pair = [open_runtime(name, tiny_bundle, manifest, "cpu") for name in ("aoti", "eager")]
    torch.set_num_threads(2)  # `one_thread` sets it back
    for batch in (1, 2):
        case = Case("two threads", batch, ((40,) * batch, *(None,) * 12))
        for _ in range(3):
            logits, cache, _ = compare(pair[0], pair[1], case)
            assert max(logits, cache) < 1e-4
