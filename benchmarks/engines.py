"""What the harness times: a name -> a Runtime, on a bundle's weights or on random ones made on the device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes

from megalodon_export import bundle
from megalodon_export.checkpoints import DTYPES
from megalodon_export.export import export_aoti
from megalodon_export.exporters import aoti, programs
from megalodon_export.model import MegalodonCache, MegalodonConfig, MegalodonForCausalLM
from megalodon_export.model.ema import ComplexEMA
from megalodon_export.runtimes import RUNTIMES, Runtime, open_runtime
from megalodon_export.runtimes.eager import ModelRuntime


@dataclass(frozen=True)
class Subject:
    """The model that is measured; `folder` is a bundle of it, or None where there are only random weights."""

    config: MegalodonConfig
    device: str
    dtype: str
    max_batch: int
    folder: Path | None = None


def open_engine(name: str, subject: Subject) -> Runtime:
    """A runtime by name; ValueError for one that the subject cannot have."""
    if name == "compile":
        return CompiledRuntime(loaded_model(subject))
    if name == "aoti" and subject.folder is None:
        return compile_from_config(subject)
    if name == "eager" and subject.folder is None:
        return ModelRuntime(random_model(subject))
    if name not in RUNTIMES or subject.folder is None:
        raise ValueError(f"no runtime {name!r} to measure; there are {', '.join([*RUNTIMES, 'compile'])}")
    return open_runtime(name, subject.folder, bundle.read(subject.folder, check="sizes"), subject.device)


def random_model(subject: Subject) -> MegalodonForCausalLM:
    """Random weights by the model's own initialisation, drawn on the device in the model's dtype: no copy elsewhere."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(DTYPES[subject.dtype])
        with torch.device(subject.device):
            model = MegalodonForCausalLM(subject.config)
    finally:
        torch.set_default_dtype(before)
    for module in model.modules():
        if isinstance(module, ComplexEMA) and subject.dtype == "bfloat16":
            module.float()  # as it is loaded from a checkpoint
    return model.eval().requires_grad_(False)


def loaded_model(subject: Subject) -> MegalodonForCausalLM:
    """The bundle's model in memory, or a random one."""
    if subject.folder is None:
        return random_model(subject)
    runtime = open_engine("eager", subject)
    assert isinstance(runtime, ModelRuntime)
    return runtime.model


def make_bundle(subject: Subject, destination: Path) -> None:
    """Export a random model to a bundle, by way of a checkpoint that is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        random_model(subject).save_pretrained(scratch)
        export_aoti(Path(scratch), destination, subject.device, subject.dtype, subject.max_batch)


class CompiledRuntime(ModelRuntime):
    """torch.compile of both passes, once for all sizes; decode is captured by `decoder` as for every runtime."""

    def __init__(self, model: MegalodonForCausalLM) -> None:
        super().__init__(model)
        self._prefill = torch.compile(model.prefill, fullgraph=True)
        self._decode = torch.compile(model.decode, fullgraph=True)

    @torch.no_grad()
    def run_prefill(self, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache) -> Tensor:
        """Compiled on the first call."""
        # One row of a slice has strides of its own, to which a graph would be specialised.
        token_ids = token_ids.clone(memory_format=torch.contiguous_format)
        _vary(token_ids, lengths, cache=cache)
        torch._dynamo.maybe_mark_dynamic(token_ids, 1)
        with symbolic_shapes.patch(backed_size_oblivious=True):  # batch 1 and one block are sizes like any
            return self._prefill(token_ids, lengths, cache, self.limits.max_length)

    @torch.no_grad()
    def run_decode(self, token_ids: Tensor, cache: MegalodonCache) -> Tensor:
        """Compiled on the first call."""
        _vary(token_ids, cache=cache)
        with symbolic_shapes.patch(backed_size_oblivious=True):
            return self._decode(token_ids, cache)


def _vary(*inputs: Tensor, cache: MegalodonCache) -> None:
    """The batch is any."""
    for tensor in (*inputs, *cache.tensors()):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


class BoundPrograms(Runtime):
    """AOTInductor programs bound to a model's weights where they are, without a file of them."""

    def __init__(self, model: MegalodonForCausalLM, limits: programs.Limits, package: Path) -> None:
        super().__init__(model.config, model.dtype_of_weights, model.device, limits, False)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        if model.config.share_emb:
            tensors["lm_head.weight"] = tensors["model.embed.weight"]
        self._run: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {}
        self._kept = tensors  # the programs point into them
        for name in (programs.PREFILL, programs.DECODE):
            loader = torch._C._aoti.AOTIModelPackageLoader(str(package), name, True, 1, -1)
            bound = {fqn: tensors[fqn.removeprefix("model.")] for fqn in loader.get_constant_fqns()}
            loader.load_constants(bound, use_inactive=False, check_full_update=True, user_managed=True)
            self._run[name] = loader.run

    def run_prefill(self, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache) -> Tensor:
        """One call of the compiled prefill."""
        return self._run[programs.PREFILL]([token_ids, lengths, *cache.tensors()])[0]

    def run_decode(self, token_ids: Tensor, cache: MegalodonCache) -> Tensor:
        """One call of the compiled decode."""
        return self._run[programs.DECODE]([token_ids, *cache.tensors()])[0]


def compile_from_config(subject: Subject) -> Runtime:
    """AOTInductor programs of a random model on the device, compiled in this process: no weights on host or disk.

    The one place here that knows how `exporters.aoti` compiles; a bundle's way is `export_aoti`.
    """
    from torch.export.pt2_archive._package import package_pt2

    from megalodon_export.model import freeze_constants

    model = random_model(subject)
    freeze_constants(model)
    limits = programs.Limits.of(subject.config, subject.max_batch)
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for name in (programs.PREFILL, programs.DECODE):
            exported = programs.export_program(model, name, limits)
            request = aoti.Request("", name, subject.device, subject.dtype, limits, False, False, scratch)
            with torch.no_grad(), programs.sizes_of_one_are_not_special():
                files[name] = torch._inductor.aot_compile(
                    exported.module(), *exported.example_inputs, options=aoti.inductor_options(request)
                )
        package = Path(scratch, "model.pt2")
        package_pt2(str(package), aoti_files={name: [str(file) for file in paths] for name, paths in files.items()})
        return BoundPrograms(model, limits, package)
