"""Compiled programs: arguments, the cache and the weights, what is refused. test_parity.py has their numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor
from transformers import AutoModelForCausalLM

import megalodon_export.model as m
from megalodon_export.bundles import bundle
from megalodon_export.bundles.weights import WeightStore, save_constants, with_sources
from megalodon_export.exporters.aoti import CompileRequest, compile_stage, inductor_options
from megalodon_export.exporters.manifest_types import CompiledProgram, CompiledStage
from megalodon_export.exporters.programs import Limits
from megalodon_export.exporters.stages import Stage, export_stages, one_layer_model
from megalodon_export.model import MegalodonCache, MegalodonConfig
from megalodon_export.runtimes import Runtime, open_runtime
from support.slow import slow_except
from support.small_models import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = (None,) * 3
PROGRAMS = ("prefill", "decode", "decode_one")
Pair = tuple[Runtime, Runtime]


# Short chunks add that what is refused does not depend on prefill's form.
@pytest.fixture(scope="module", params=slow_except(("tiny_bundle", "short_chunk_bundle"), "tiny_bundle"))
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    """aoti, eager."""
    manifest = bundle.read(folder)
    return open_runtime("aoti", folder, manifest), open_runtime("eager", folder, manifest)


@pytest.fixture(scope="module")
def aoti(tiny_bundle: Path) -> Runtime:
    return open_runtime("aoti", tiny_bundle, bundle.read(tiny_bundle))


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def contents(cache: MegalodonCache) -> list[Tensor]:
    return [t.clone() for t in cache.tensors()]


def unchanged(cache: MegalodonCache, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(cache.tensors(), before, strict=True))


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_strided_arguments_are_those_of_their_copies(aoti: Runtime) -> None:
    wide, lengths = random_ids(3, 40), torch.tensor([[20, 0], [7, 0], [1, 0]])[:, 0]
    logits, caches = [], [aoti.new_cache(3), aoti.new_cache(3)]
    for cache, same in zip(caches, (lambda t: t, lambda t: t.contiguous()), strict=True):
        programs = aoti.bind(cache)
        first = programs.prefill(same(wide[:, ::2]), same(lengths))
        turned = programs.prefill(same(wide.T[:3].T), same(lengths.clamp(max=3)))
        logits.append(torch.stack([first, turned, programs.decode(same(wide[:, 5]))]))
    assert torch.equal(*logits)
    assert unchanged(caches[0], contents(caches[1]))


def test_all_token_dtypes_that_hold_ids(aoti: Runtime) -> None:
    results = []
    for dtype in (torch.int64, torch.int32, torch.uint8):
        programs = aoti.bind(aoti.new_cache(1))
        first = programs.prefill(random_ids(1, 9).to(dtype), torch.tensor([9], dtype=torch.int32))
        results.append(first + programs.decode(torch.tensor([65], dtype=dtype)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- the cache and the weights ---------------------------------------------------------------------------------------


def test_a_decode_step_allocates_nothing_as_large_as_a_ring(aoti: Runtime) -> None:
    cache = aoti.new_cache(8)
    smallest = min(t.nbytes for layer in cache.layers for t in (layer.key, layer.value))
    token_ids, programs = random_ids(8), aoti.bind(cache)
    programs.decode(token_ids)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        programs.run_decode(token_ids)
    allocated = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    logits = 8 * aoti.config.logits_size * 4
    assert logits in allocated  # what the program allocates is seen at all
    assert max(size for size in allocated if size != logits) < smallest


def test_programs_hold_no_weights(folder: Path) -> None:
    manifest = bundle.read(folder)
    store = WeightStore(folder, torch.device("cpu"))
    parameters = {name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    programs = [path.read_bytes() for path in (folder / "aoti").iterdir()]
    for _, stage in stages_of(folder):
        weights = stage.weights
        assert {w.file for w in weights} <= {"model.safetensors", "constants.safetensors"}
        assert {str(w.tensor).format(layer=0) for w in weights if w.file == "model.safetensors"} <= parameters
        for layer in range(manifest.config.num_layers):
            for name, tensor in store.bind(weights, layer).items():
                start = tensor.flatten()[-16:].numpy().tobytes()
                if tensor.numel() >= 16 and len(set(start)) > 16:
                    assert not any(start in program for program in programs), name


def stages_of(folder: Path) -> list[tuple[str, CompiledStage]]:
    """Every stage of a bundle, with the name of its program."""
    aoti = bundle.read(folder).programs.aoti
    assert aoti is not None
    return [(name, stage) for name, program in aoti.stages.items() for stage in program.stages]


def test_all_programs_use_the_same_tensors(tiny_bundle: Path) -> None:
    store = WeightStore(tiny_bundle, torch.device("cpu"))
    bound: dict[str, dict[tuple[str, int], Tensor]] = {name: {} for name in PROGRAMS}
    for program, stage in stages_of(tiny_bundle):
        for layer in range(2):
            tensors = store.bind(stage.inputs, layer)
            bound[program] |= {(name, layer): tensor for name, tensor in tensors.items()}
    shared = set.intersection(*(set(tensors) for tensors in bound.values()))
    assert {("lm_head.weight", 0), ("model.layers.{layer}.attn.wz.weight", 1)} <= shared
    for name in shared:
        assert len({tensors[name].data_ptr() for tensors in bound.values()}) == 1


def test_every_layer_has_its_own_weights_and_cache(tiny_bundle: Path) -> None:
    store = WeightStore(tiny_bundle, torch.device("cpu"))
    for _, stage in stages_of(tiny_bundle):
        names = [one.name for one in stage.inputs]
        first, second = (store.bind(stage.inputs, layer) for layer in range(2))
        own = {name for name in first if first[name].data_ptr() != second[name].data_ptr()}
        assert own == {name for name in first if "{layer}" in name}
        if own:
            assert {"layers.{layer}.key", "layers.{layer}.ema_state"} <= set(names)


# ---- stages ----------------------------------------------------------------------------------------------------------


def exported(layers: int, program: str, folder: Path) -> dict[str, Stage]:
    """The stages of a program, from the checkpoint of a model with some number of layers."""
    make_model(torch.float32, num_layers=layers).save_pretrained(folder / f"{layers}")
    limits = Limits.of(MegalodonConfig.from_pretrained(folder / f"{layers}"))
    return export_stages(one_layer_model(folder / f"{layers}", "cpu", "float32"), program, limits)


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_compiled_does_not_depend_on_the_number_of_layers(program: str, tmp_path: Path) -> None:
    few, many = (exported(layers, program, tmp_path) for layers in (1, 5))
    assert list(few) == list(many) == ["begin", "layer", "end"]
    for name, stage in few.items():
        assert str(stage.graph.graph) == str(many[name].graph.graph)
        assert (stage.inputs, stage.outputs) == (many[name].inputs, many[name].outputs)


def test_a_bundle_has_three_libraries_a_program_however_deep(tiny_bundle: Path, default_bundle: Path) -> None:
    for folder in (tiny_bundle, default_bundle):  # of two layers, and of more
        libraries = {stage.library for _, stage in stages_of(folder)}
        assert libraries == {f"{p}_{s}.so" for p in PROGRAMS for s in ("begin", "layer", "end")}
        assert {path.name for path in (folder / "aoti").iterdir()} == {"model.pt2", *libraries}


def test_stages_take_only_what_they_use(tmp_path: Path) -> None:
    for program in PROGRAMS:
        stages = exported(2, program, tmp_path)
        for stage in stages.values():
            placeholders = stage.graph.graph.find_nodes(op="placeholder")
            assert len(placeholders) == len(stage.inputs) == len(stage.examples)
            assert all(node.users for node in placeholders)
        results = {one.name for stage in stages.values() for one in stage.inputs if one.kind == "stage"}
        assert results == set(stages["begin"].outputs)
        assert stages["layer"].outputs == ("x",)
        assert stages["end"].outputs == ("logits",)


@pytest.mark.slow
def test_kernels_of_other_sizes_are_not_taken_from_a_cache(tmp_path: Path) -> None:
    """Two compilations; slow, because one option of AOTInductor decides it, and that seldom changes."""
    embeddings = []
    for vocabulary in (40, 30):
        folder = tmp_path / f"{vocabulary}"
        make_model(torch.float32, num_layers=1, vocab_size=vocabulary).save_pretrained(folder)
        config = MegalodonConfig.from_pretrained(folder)
        request = CompileRequest(
            str(folder), "decode", "cpu", "float32", Limits.of(config), False, False, str(folder / "out")
        )
        stage = export_stages(one_layer_model(folder, "cpu", "float32"), "decode", request.limits)["begin"]
        files = compile_stage(stage, inductor_options(request, stage.name)).files
        (library,) = (Path(file).read_bytes() for file in files if file.endswith(".so"))
        embeddings.append(f"< {vocabulary}L".encode() in library)  # the bound that ids are checked against
    assert embeddings == [True, True]


def test_a_stage_is_exported_from_one_layer() -> None:
    model = make_model(torch.float32, num_layers=2)
    with pytest.raises(ValueError, match="a model of one layer, not of 2"):
        export_stages(model, "decode", Limits.of(model.config))


def test_a_tied_head_is_bound_to_the_embedding(tmp_path: Path) -> None:
    model = make_model(torch.float32, num_layers=2, share_emb=True)
    model.save_pretrained(tmp_path)
    m.freeze_constants(model)
    save_constants(model, tmp_path)
    limits = Limits.of(model.config)
    stages = export_stages(one_layer_model(tmp_path, "cpu", "float32"), "decode", limits)
    compiled = CompiledProgram(*(CompiledStage(s.name, "", s.inputs, s.outputs) for s in stages.values()))
    program = with_sources({"decode": compiled}, 2, tmp_path)["decode"]
    store = WeightStore(tmp_path, torch.device("cpu"))
    begin, end = ({t.data_ptr() for t in store.bind(s.inputs).values()} for s in (program.begin, program.end))
    assert len(begin & end) == 1
    layer = replace(program.layer, inputs=tuple(replace(one, dtype="bfloat16") for one in program.layer.inputs))
    with pytest.raises(ValueError, match=r"attn\.gamma is float32 .* the manifest says bfloat16"):
        with_sources({"decode": replace(program, layer=layer)}, 2, tmp_path)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_batches_out_of_range_are_refused(aoti: Runtime) -> None:
    for batch in (0, 9):
        with pytest.raises(ValueError, match=rf"batch of {batch} is outside 1\.\.8.*--max-batch"):
            aoti.new_cache(batch)


WRONG_PREFILL: dict[str, tuple[Tensor, Tensor, str]] = {
    "id too large": (torch.tensor([[1, 257]]), torch.tensor([2]), r"token id 257 is outside 0\.\.256"),
    "negative id": (torch.tensor([[-1, 3]]), torch.tensor([2]), r"token id -1 is outside 0\.\.256"),
    "float ids": (torch.ones(1, 2), torch.tensor([2]), r"token_ids are of torch.float32, expected integers"),
    "bool ids": (
        torch.ones(1, 2, dtype=torch.bool),
        torch.tensor([2]),
        r"token_ids are of torch.bool, expected",
    ),
    "one dimension": (torch.tensor([1, 2]), torch.tensor([2]), r"must be \(B, L\) with B = 1, got \(2,\)"),
    "too many rows": (torch.ones(2, 2, dtype=torch.int64), torch.tensor([2, 2]), r"B = 1, got \(2, 2\)"),
    "no tokens": (torch.ones(1, 0, dtype=torch.int64), torch.tensor([0]), r"got \(1, 0\)"),
    "length too large": (torch.tensor([[1, 2]]), torch.tensor([3]), r"integers in 0\.\.2, got \[3\]"),
    "negative length": (torch.tensor([[1, 2]]), torch.tensor([-1]), r"integers in 0\.\.2, got \[-1\]"),
    "too many lengths": (torch.tensor([[1, 2]]), torch.tensor([1, 1]), r"lengths must be \(B,\) = \(1,\)"),
    "float lengths": (torch.tensor([[1, 2]]), torch.tensor([1.5]), r"lengths must be .*got \[1\.5\]"),
}


@pytest.mark.parametrize("name", WRONG_PREFILL)
def test_wrong_arguments_leave_the_cache_untouched(pair: Pair, name: str) -> None:
    token_ids, lengths, message = WRONG_PREFILL[name]
    for runtime in pair:
        cache = runtime.new_cache(1)
        programs = runtime.bind(cache)
        programs.prefill(torch.tensor([[1, 2, 3]]), torch.tensor([3]))
        before = contents(cache)
        with pytest.raises(ValueError, match=message):
            programs.prefill(token_ids, lengths)
        assert unchanged(cache, before)


def test_caches_that_do_not_fit_are_refused(pair: Pair, short_chunk_onnx_bundle: Path, tiny_bundle: Path) -> None:
    for runtime in pair:
        config = runtime.config
        every_other_row = [t[::2] for t in runtime.new_cache(4).tensors()]
        others = [open_runtime("eager", f, bundle.read(f)) for f in (short_chunk_onnx_bundle, tiny_bundle)]
        foreign = next(other for other in others if other.config.chunk_size != config.chunk_size)
        wrong = {
            "bfloat16": MegalodonCache.allocate(config, 2, torch.bfloat16),
            "strides": MegalodonCache.from_tensors(config, every_other_row),
            r"\d+ tensors, expected \d+": foreign.new_cache(2),
        }
        for message, cache in wrong.items():
            with pytest.raises(ValueError, match=f"{message}.*use new_cache"):
                runtime.bind(cache)
    with pytest.raises(ValueError, match=r"batch of 9 is outside 1\.\.8"):
        pair[0].bind(MegalodonCache.allocate(pair[0].config, 9, torch.float32))


@pytest.mark.parametrize(
    "token_ids", [torch.tensor([[1]]), torch.tensor([1, 2]), torch.tensor([257]), torch.tensor([0.0]), torch.tensor(1)]
)
def test_wrong_decode_arguments_leave_the_cache_untouched(pair: Pair, token_ids: Tensor) -> None:
    for runtime in pair:
        cache = runtime.new_cache(1)
        before = contents(cache)
        with pytest.raises(ValueError, match="token"):
            runtime.bind(cache).decode(token_ids)
        assert unchanged(cache, before)
