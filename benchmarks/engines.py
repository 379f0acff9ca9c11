"""The runtimes that the benchmarks time, by name. Their weights are a bundle's, or random ones drawn on the device."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from megalodon_export.bundles import bundle
from megalodon_export.bundles.manifest import DTYPES
from megalodon_export.export.aoti import export_aoti
from megalodon_export.export.onnx import add_onnx, export_onnx
from megalodon_export.exporters import aoti
from megalodon_export.exporters.manifest_types import AotiPrograms, StageInput, numbered
from megalodon_export.exporters.programs import Limits
from megalodon_export.exporters.torch_internals import sizes_from_one
from megalodon_export.model import (
    MegalodonCache,
    MegalodonConfig,
    MegalodonForCausalLM,
    QuantizedLinear,
    freeze_constants,
    use_kernels,
)
from megalodon_export.model.config import WeightFormat
from megalodon_export.model.ema import ComplexEMA
from megalodon_export.runtimes import RUNTIMES, BoundPrograms, Runtime, open_runtime
from megalodon_export.runtimes.aoti import AotiRuntime
from megalodon_export.runtimes.eager import BoundModelPrograms, ModelRuntime
from megalodon_export.runtimes.onnx import OnnxRuntime

PLAIN_GRAPHS = "onnx-plain"  # ONNX graphs of standard operations, where "onnx" on CUDA runs those with kernels


@dataclass(frozen=True)
class Subject:
    """The model that is measured.

    `folder` is its bundle; None means random weights without a bundle. `programs` is the folder of AOTInductor programs
    that belong to no bundle; None means the bundle's own.
    """

    config: MegalodonConfig
    device: str
    dtype: str
    max_batch: int
    programs: Path | None
    folder: Path | None = None
    weight_format: WeightFormat = "float"


def open_engine(name: str, subject: Subject) -> Runtime:
    """A runtime by name; ValueError for an unknown name, and for one that needs a bundle where there is none."""
    if name == "compile":
        return CompiledRuntime(loaded_model(subject))
    if name == "kernels":
        model = loaded_model(subject)
        use_kernels(model)
        return ModelRuntime(model)
    if name == "aoti" and subject.programs is not None:
        return compile_from_config(subject)
    if name == "eager" and subject.folder is None:
        return ModelRuntime(random_model(subject))
    if name == PLAIN_GRAPHS and subject.folder is not None:
        return OnnxRuntime(subject.folder, bundle.read(subject.folder, check="sizes"), subject.device, kernels=False)
    if name not in RUNTIMES or subject.folder is None:
        raise ValueError(f"no runtime {name!r} to measure; there are {', '.join([*RUNTIMES, 'compile', 'kernels'])}")
    return open_runtime(name, subject.folder, bundle.read(subject.folder, check="sizes"), subject.device)


def random_model(subject: Subject) -> MegalodonForCausalLM:
    """A model with random weights, drawn on the device in the model's dtype, so that no copy is made elsewhere."""
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
            module.float()  # a checkpoint's EMA is loaded in float32 too
        if isinstance(module, QuantizedLinear):
            bounds = (-127, 128) if module.weight.dtype == torch.int8 else (0, 256)
            module.weight.random_(*bounds)
            module.scale.fill_(module.in_features**-0.5 / (64 if module.weight.dtype == torch.int8 else 4))
    return model.eval().requires_grad_(False)


def loaded_model(subject: Subject) -> MegalodonForCausalLM:
    """The bundle's model, loaded into memory, or a random one where there is no bundle."""
    if subject.folder is None:
        return random_model(subject)
    runtime = open_engine("eager", subject)
    assert isinstance(runtime, ModelRuntime)
    return runtime.model


def make_bundle(subject: Subject, destination: Path, runtimes: Sequence[str]) -> None:
    """Export a random model to a bundle with the programs of the runtimes. Its checkpoint is removed afterwards."""
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        random_model(subject).save_pretrained(scratch)
        if "aoti" not in runtimes:
            export_onnx(Path(scratch), destination, subject.dtype, subject.max_batch, kernels=gpu_of(subject))
            return
        target = destination, subject.device, subject.dtype, subject.max_batch
        export_aoti(Path(scratch), *target, weight_format=subject.weight_format)
    if {"onnx", PLAIN_GRAPHS} & set(runtimes):
        add_onnx(destination, subject.max_batch, kernels=gpu_of(subject))


def gpu_of(subject: Subject) -> tuple[str, ...]:
    """The architecture for which ONNX graphs with kernels are made: this GPU's."""
    if not subject.device.startswith("cuda"):
        return ()
    return ("sm_{}{}".format(*torch.cuda.get_device_capability(subject.device)),)


class CompiledRuntime(ModelRuntime):
    """Both passes under torch.compile, compiled once for all sizes. On CUDA a decode step is a captured graph."""

    def __init__(self, model: MegalodonForCausalLM) -> None:
        super().__init__(model)
        self.compiled_prefill = torch.compile(model.prefill, fullgraph=True)
        self.compiled_decode = torch.compile(model.decode, fullgraph=True)

    def _bind(self, cache: MegalodonCache, capture: bool) -> BoundPrograms:
        return CompiledPrograms(self, cache, capture)


class CompiledPrograms(BoundModelPrograms):
    """The compiled passes, bound to one cache."""

    runtime: CompiledRuntime

    @torch.no_grad()
    def run_prefill(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits of a prefill; the first call compiles."""
        # A slice of one row has unusual strides, and torch.compile would specialise the graph to them.
        token_ids = token_ids.clone(memory_format=torch.contiguous_format)
        _mark_batch(token_ids, lengths, cache=self.cache)
        torch._dynamo.maybe_mark_dynamic(token_ids, 1)
        with sizes_from_one():  # keeps batch 1 and one block in the same graph as all other sizes
            return self.runtime.compiled_prefill(token_ids, lengths, self.cache, self.runtime.limits.max_length)

    @torch.no_grad()
    def run_decode(self, token_ids: Tensor) -> Tensor:
        """Logits of a decode step; the first call compiles."""
        _mark_batch(token_ids, cache=self.cache)
        with sizes_from_one():
            return self.runtime.compiled_decode(token_ids, self.cache)


def _mark_batch(*inputs: Tensor, cache: MegalodonCache) -> None:
    """Tell torch.compile that the first dimension, the batch, varies."""
    for tensor in (*inputs, *cache.tensors()):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


class InMemoryAotiRuntime(AotiRuntime):
    """AOTInductor programs bound to the tensors of a model in memory, without a weight file."""

    def __init__(self, model: MegalodonForCausalLM, entry: AotiPrograms, folder: Path) -> None:
        Runtime.__init__(self, model.config, model.dtype_of_weights, model.device, entry.limits, False, "")
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())

        def bind(inputs: tuple[StageInput, ...], layer: int) -> dict[str, Tensor]:
            names = [one.name for one in inputs if one.kind == "weight"]
            return {name: tensors[numbered(name, layer)] for name in names}

        self._load(folder, entry.stages, bind)


def compile_from_config(subject: Subject) -> Runtime:
    """AOTInductor programs of a random model, bound to its weights on the device.

    No copy of the weights is made on the host or on disk. The programs do not depend on the number of layers, so they
    are compiled from a checkpoint of one layer.
    """
    entry, _ = programs_of(subject)
    model = random_model(subject)
    freeze_constants(model)
    assert subject.programs is not None
    return InMemoryAotiRuntime(model, entry, subject.programs)


def programs_of(subject: Subject) -> tuple[AotiPrograms, float]:
    """Compile a config's programs into `subject.programs`, or take those that an earlier run left there.

    Returns the manifest's entry about them, and the seconds that compiling took. ValueError if the folder holds
    programs of another config, dtype, batch or torch.
    """
    config = MegalodonConfig(**{**subject.config.to_diff_dict(), "num_layers": 1})
    sizes = json.loads(json.dumps(config.to_diff_dict(), default=str))
    for name in ("architectures", "dtype"):  # present or not depending on how the config was loaded
        sizes.pop(name, None)
    made_of = {"config": sizes, "dtype": subject.dtype, "max_batch": subject.max_batch, "torch": torch.__version__}
    assert subject.programs is not None
    folder = subject.programs
    record = folder / "programs.json"
    if record.is_file():
        found = json.loads(record.read_text())
        if found["made_of"] != made_of:
            raise ValueError(f"{folder} has programs of {found['made_of']}, not of {made_of}; name another folder")
        return msgspec.convert(found["entry"], AotiPrograms), found["compile_seconds"]
    with tempfile.TemporaryDirectory() as checkpoint:
        random_model(replace(subject, config=config)).save_pretrained(checkpoint)
        limits, started = Limits.of(config, subject.max_batch), time.monotonic()
        note = partial(print, file=sys.stderr, flush=True)
        entry = aoti.build(Path(checkpoint), folder, subject.device, subject.dtype, limits, note)
    seconds = time.monotonic() - started
    record.write_text(json.dumps({"made_of": made_of, "compile_seconds": seconds, "entry": msgspec.to_builtins(entry)}))
    return entry, seconds
