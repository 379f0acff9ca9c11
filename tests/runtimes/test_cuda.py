"""The GPU: programs against eager, CUDA graphs against none, memory over many steps. Run with `pytest -m cuda`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

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


BAD_IDS: dict[str, tuple[object, str]] = {
    "beyond": (1_000_000, "token id 1000000 is outside 0..22"),
    "negative": (-1, "token id -1 is outside 0..22"),
    "2**63": (2**63, "token id 9223372036854775808 is outside 0..22"),
    "2**64": (2**64, "token id 18446744073709551616 is outside 0..22"),
    "float": (1.5, "token id 1.5 is of type float, expected an integer in 0..22"),
    "bool": (True, "token id True is of type bool, expected an integer in 0..22"),
}


@pytest.mark.parametrize("name", ["aoti", "eager"])
@pytest.mark.parametrize("bad", BAD_IDS)
def test_a_bad_token_id_is_refused_and_other_sessions_go_on(folder: Path, name: str, bad: str) -> None:
    """Before it reaches a kernel, where it would be a device-side assert that ends every session of the process."""
    one, message = BAD_IDS[bad]
    runtime = opened(folder, name)
    session, other = Session(runtime), Session(runtime)
    expected = list(other.generate_ids([1, 2, 3], 20, eos_token_id=-1))
    other.reset()
    generation, own = (s.generate_ids([1, 2, 3], 20, eos_token_id=-1) for s in (other, session))
    written, own_written = ([next(tokens) for _ in range(5)] for tokens in (generation, own))
    feeds = (lambda: session.prefill([1, one]), lambda: session.decode(one), lambda: session.generate_ids([one], 5))
    for feed in feeds:
        with pytest.raises(ValueError, match=re.escape(message)):
            feed()
    assert [*written, *generation] == expected
    assert [*own_written, *own] == expected
    torch.cuda.synchronize()
    assert list(Session(runtime).generate_ids([1, 2, 3], 20, eos_token_id=-1)) == expected


@pytest.mark.parametrize("name", ["aoti", "eager"])
def test_bad_ids_on_the_gpu_are_refused_and_other_sessions_go_on(folder: Path, name: str) -> None:
    """Of programs that are called directly, with and without CUDA graphs, and as prompts of a session."""
    runtime = opened(folder, name)
    other = Session(runtime)
    expected = list(other.generate_ids([1, 2, 3], 20, eos_token_id=-1))
    good, bad = (torch.tensor(ids, device="cuda") for ids in ([1, 2], [1, 1_000_000]))
    for programs in (runtime.bind(runtime.new_cache(2), capture) for capture in (True, False)):
        programs.decode(good)
        before = [tensor.clone() for tensor in programs.cache.tensors()]
        with pytest.raises(ValueError, match=r"token id 1000000 of row 1 is outside 0\.\.22"):
            programs.decode(bad)
        with pytest.raises(ValueError, match=r"token id 1000000 of row 1 is outside 0\.\.22"):
            programs.prefill(bad[:, None], torch.tensor([1, 1]))
        with pytest.raises(ValueError, match=r"token_ids are of torch\.float32"):
            programs.decode(good.float())
        assert all(torch.equal(*pair) for pair in zip(programs.cache.tensors(), before, strict=True))
        assert programs.decode(good).isfinite().all()
    for prompt, message in ((bad, "token id 1000000 is outside"), (good.float(), "is of type float")):
        with pytest.raises(ValueError, match=message):
            other.prefill(prompt)
        with pytest.raises(ValueError, match=message):
            other.generate_ids(prompt)
    other.reset()
    assert list(other.generate_ids(torch.tensor([1, 2, 3], device="cuda"), 20, eos_token_id=-1)) == expected


def test_a_text_of_unknown_ids_is_refused_and_other_sessions_go_on(folder: Path) -> None:
    session = Session(opened(folder), byte_tokenizer())  # of more ids than the model has
    session.runtime.config.bos_token_id = 1
    expected = session.generate_batch(["", ""], 20)
    with pytest.raises(ValueError, match=r"token id 97 is outside 0\.\.22"):
        session.generate("a")
    with pytest.raises(ValueError, match=r"token id 97 of prompt 1 is outside 0\.\.22"):
        session.generate_batch(["", "a"])
    assert session.generate_batch(["", ""], 20) == expected


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cuda", torch.bfloat16),
    "float64": lambda: set_and_reset(torch.set_default_dtype, torch.float64, torch.float32),
    "meta": lambda: set_and_reset(torch.set_default_device, "meta", None),
    "cuda": lambda: set_and_reset(torch.set_default_device, "cuda", None),
    "deterministic": lambda: set_and_reset(torch.use_deterministic_algorithms, True, False),
}


@contextmanager
def set_and_reset(function: Callable[[Any], object], value: object, before: object) -> Iterator[None]:
    function(value)
    yield
    function(before)


@pytest.mark.parametrize("name", ["aoti", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_torch_change_nothing(folder: Path, name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch asks for in deterministic mode
    sampling = {"temperature": 1.0, "top_k": 9, "top_p": 0.9}

    def use(session: Session) -> list[Any]:
        found = [list(session.generate_ids([1, 2, 3], 70, eos_token_id=-1, **options)) for options in ({}, sampling)]
        logits = [session.prefill([4, 5]), session.decode(6)]
        assert {tensor.dtype for tensor in logits} == {torch.float32}
        fork = session.fork()
        session.reset()
        return [*found, *(tensor.tolist() for tensor in logits), list(fork.generate_ids([7], 3, eos_token_id=-1))]

    outside = Session(opened(folder, name))
    expected = use(outside)
    with MODES[mode]():
        inside = Session(opened(folder, name))
        assert use(inside) == expected
        assert use(outside) == expected
        fork = inside.fork()
    for session in (inside, outside, fork):
        assert use(session) == expected
