"""A program in three stages, so that its size does not depend on the number of layers: begin, layer, end.

    prefill   begin(token_ids, lengths, cache) -> x, plan, rotary   layer(x, plan, rotary, cache) -> x   end -> logits
    decode    begin(token_ids, cache) -> x, rotary                  layer(x, rotary, cache) -> x         end -> logits

On a GPU, decode's end also writes the most probable tokens into its argument `next_tokens`
(`model/kernels/decode/argmax.py`). They are the next step's token ids, without a copy to the host.

Layers differ in their weights alone. Weights are inputs like any other, so one compiled layer serves all layers.
Every stage takes and returns a flat list of tensors, named by the structures that hold them (the plan, the cache, the
model's parameters). Tensors that a stage does not use are not among its inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from transformers.utils import logging

from ..model import MegalodonConfig, MegalodonForCausalLM, freeze_constants
from ..model.cache import FinalCache, LayerCache
from ..model.config import BLOCK
from ..model.modeling import last_valid
from .manifest_types import InputKind, StageInput
from .programs import BEGIN, DECODE_ONE, END, LAYER, LAYER_INDEX, NEXT_TOKENS, PREFILL, Limits, dtype_name
from .structures import dimension, flatten_all, rebuild, root_of, unbacked
from .torch_internals import symbolic_sizes, tree_unflatten

Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A stage ready to be compiled: a graph over flat lists of inputs and named outputs, and example inputs."""

    name: str
    graph: fx.GraphModule
    examples: tuple[Tensor, ...]
    inputs: tuple[StageInput, ...]
    outputs: tuple[str, ...]


def prefill_stages(model: MegalodonForCausalLM, max_length: int, all_logits: bool) -> dict[str, Run]:
    """The stages of prefill; arguments and results by name."""
    body = model.model

    def begin(token_ids: Tensor, lengths: Tensor, final: FinalCache) -> dict[str, Any]:
        torch._check(token_ids.shape[1] % BLOCK == 0)  # known to the tracer, it keeps padding out of every shape
        x, plan, rotary = body.begin_prefill(token_ids, lengths, final.position, max_length=max_length)
        return {"x": x, "plan": plan, "rotary": rotary}

    def layer(x: Tensor, plan: Any, rotary: Any, layers: list[LayerCache]) -> dict[str, Any]:
        torch._check(x.shape[1] % BLOCK == 0)
        return {"x": body.backend.prefill_layer(body.layers[0], x, plan, rotary, layers[0])}

    def end(x: Tensor, plan: Any, final: FinalCache) -> dict[str, Any]:
        torch._check(x.shape[1] % BLOCK == 0)
        hidden = body.end_prefill(x, plan, final)
        return {"logits": model.logits(hidden if all_logits else last_valid(hidden, plan.tokens.lengths))}

    return {BEGIN: begin, LAYER: layer, END: end}


def decode_stages(model: MegalodonForCausalLM) -> dict[str, Run]:
    """The stages of decode; arguments and results by name."""
    body = model.model

    def begin(token_ids: Tensor, final: FinalCache) -> dict[str, Any]:
        x, rotary = body.begin_decode(token_ids, final.position)
        return {"x": x, "rotary": rotary}

    def layer(x: Tensor, rotary: Any, layers: list[LayerCache], final: FinalCache) -> dict[str, Any]:
        return {"x": body.backend.step_layer(body.layers[0], x, final.position, rotary, layers[0])}

    def end(x: Tensor, final: FinalCache) -> dict[str, Any]:
        return {"logits": model.logits(body.end_decode(x, final))}

    def end_and_choose(x: Tensor, final: FinalCache, next_tokens: Tensor) -> dict[str, Any]:
        logits = model.logits(body.end_decode(x, final))
        body.backend.write_next_tokens(logits, next_tokens)
        return {"logits": logits}

    return {BEGIN: begin, LAYER: layer, END: end_and_choose if body.backend.writes_next_tokens else end}


def one_layer_model(checkpoint: str | Path, device: str, dtype: str) -> MegalodonForCausalLM:
    """The checkpoint's first layer, embedding and head, frozen: all that a program's stages can depend on."""
    config = MegalodonConfig.from_pretrained(checkpoint)
    config.num_layers = 1
    logging.set_verbosity_error()  # it would list the weights of all other layers
    model = MegalodonForCausalLM.from_pretrained(checkpoint, config=config, dtype=getattr(torch, dtype))
    model = model.eval().requires_grad_(False).to(device)
    freeze_constants(model)
    return model


def export_stages(model: MegalodonForCausalLM, name: str, limits: Limits, all_logits: bool = False) -> dict[str, Stage]:
    """torch.export of the stages of a program (PREFILL, DECODE, DECODE_ONE), batch and length dynamic within `limits`.

    `model` is frozen and has one layer, which stands for all; its weights are examples.
    """
    if len(model.model.layers) != 1:
        raise ValueError(f"stages are exported from a model of one layer, not of {len(model.model.layers)}")
    if name == DECODE_ONE:
        limits = replace(limits, max_batch=1)
    tracer = _Tracer(model, *_examples(model, name, limits))
    runs = prefill_stages(model, limits.max_length, all_logits) if name == PREFILL else decode_stages(model)
    begin = tracer.trace(runs[BEGIN])
    tracer.bind_outputs(begin, runs[BEGIN])
    traced = {LAYER: tracer.trace(runs[LAYER]), END: tracer.trace(runs[END])}
    later = {stage: tracer.to_stage(f"{name}_{stage}", one, set(one.outputs)) for stage, one in traced.items()}
    wanted = {one.name for stage in later.values() for one in stage.inputs}
    return {BEGIN: tracer.to_stage(f"{name}_{BEGIN}", begin, wanted), **later}


def _examples(
    model: MegalodonForCausalLM, name: str, limits: Limits
) -> tuple[dict[str, Any], dict[str, dict[int, Any]]]:
    """Example arguments of a program, and the dynamic dimensions of their tensors."""
    device, vocabulary = model.device, model.config.vocab_size
    # Under `sizes_from_one` torch traces as if every dynamic size were at least 2. A range of 1..2 would then be the
    # constant 2, so ranges end at 3 at least.
    batch_size = min(3, limits.max_batch)
    batch = Dim("B", min=1, max=max(limits.max_batch, 3)) if limits.max_batch > 1 else Dim.STATIC
    cache = model.new_cache(batch_size)
    blocks = limits.max_length // limits.length_multiple
    # The example's length is one multiple below the largest, which may equal another size, such as the chunk's. Up to
    # three multiples it is the largest: with one less, the number of blocks before the last could be 1.
    example = limits.length_multiple * (blocks - 1 if blocks > 3 else blocks)
    shape = (batch_size,) if name != PREFILL else (batch_size, example)
    values = {
        "token_ids": torch.randint(vocabulary, shape, device=device),
        "lengths": torch.full((batch_size,), example - 1, device=device),
        NEXT_TOKENS: torch.zeros(2, batch_size, dtype=torch.int64, device=device),
        "layers": cache.layers,
        "final": cache.final,
    }
    dims: dict[str, dict[int, Any]] = {name: {0: batch} for name in flatten_all(values)}
    dims[NEXT_TOKENS] = {1: batch}
    if name == PREFILL and blocks > 1:
        dims["token_ids"][1] = limits.length_multiple * Dim("blocks", min=1, max=max(blocks, 3))
    return values, dims


@dataclass(frozen=True)
class _Traced:
    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass
class _Tracer:
    """Exports stages in order: results of one are arguments of those that follow."""

    model: MegalodonForCausalLM
    values: dict[str, Any]  # example arguments
    dims: dict[str, dict[int, Any]]  # the dynamic dimensions of their tensors, by name
    aliases: dict[str, str] = field(default_factory=dict)  # results that are inputs, unchanged: result -> input

    def __post_init__(self) -> None:
        self.weights = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.kinds: dict[str, InputKind] = {
            name: "cache" if "." in name else "argument" for name in flatten_all(self.values)
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Example tensors by name, weights included."""
        return flatten_all(self.values) | self.weights

    def trace(self, run: Run) -> _Traced:
        """Export a stage, with every tensor that it might use as an input."""
        values = {key: self.values[key] for key in inspect.signature(run).parameters}
        given = {self.aliases.get(n, n): t for n, t in flatten_all(values).items()}
        tensors = given | self.weights
        module = _StageModule(self, run, values, tuple(tensors))
        dims = [self.dims.get(name) for name in tensors]
        with torch.no_grad(), symbolic_sizes():
            program = export(module, (list(tensors.values()),), dynamic_shapes=(dims,), strict=False)
        count = len(program.graph_signature.user_outputs)
        outputs = tree_unflatten(range(count), program.call_spec.out_spec)
        return _Traced(program, tuple(tensors), tuple(outputs))

    def bind_outputs(self, traced: _Traced, run: Run) -> None:
        """Make a stage's results known to later stages: example values, dynamic dimensions, aliases of inputs."""
        with torch.no_grad():
            results = run(**{key: self.values[key] for key in inspect.signature(run).parameters})
        nodes = dict(zip(traced.program.graph.find_nodes(op="placeholder"), traced.inputs, strict=True))
        roots: dict[Any, Any] = {}
        for node, name in nodes.items():
            for axis, dim in self.dims.get(name, {}).items():
                roots |= root_of(node.meta["val"].shape[axis], dim)
        for node, name in zip(traced.program.graph.output_node().args[0], traced.outputs, strict=True):  # type: ignore
            if node in nodes:
                self.aliases[name] = nodes[node]
                continue
            for size in node.meta["val"].shape:
                roots = unbacked(size) | roots
            self.dims[name] = {axis: dimension(size, roots) for axis, size in enumerate(node.meta["val"].shape)}
        self.values |= results

    def to_stage(self, name: str, traced: _Traced, wanted: set[str]) -> Stage:
        """The stage without results that no later stage wants, and without inputs that nothing uses."""
        module = traced.program.module(check_guards=False)
        graph = module.graph
        assert isinstance(graph, fx.Graph)
        graph.set_codegen(fx.graph.CodeGen())  # flat lists of tensors
        output = graph.output_node()
        results = dict(zip(traced.outputs, output.args[0], strict=True))  # type: ignore[arg-type]
        output.args = (tuple(node for result, node in results.items() if result in wanted),)
        graph.eliminate_dead_code()
        inputs = []
        for node, tensor in zip(graph.find_nodes(op="placeholder"), traced.inputs, strict=True):
            if node.users:
                inputs.append(tensor)
            else:
                graph.erase_node(node)
        return Stage(
            name,
            fx.GraphModule(module, graph),
            tuple(self.tensors[tensor] for tensor in inputs),
            tuple(self._describe(tensor) for tensor in inputs),
            tuple(result for result in traced.outputs if result in wanted),
        )

    def _describe(self, name: str) -> StageInput:
        tensor, any_layer = self.tensors[name], name.replace("layers.0.", f"layers.{LAYER_INDEX}.")
        dtype = dtype_name(tensor.dtype)
        if name in self.weights:
            return StageInput("weight", any_layer, dtype, tuple(tensor.shape))
        return StageInput(self.kinds.get(name, "stage"), any_layer, dtype)


class _StageModule(nn.Module):
    """A stage as a function of one list of tensors. The model is hidden from torch.export: it brings no weights."""

    def __init__(self, tracer: _Tracer, run: Run, values: dict[str, Any], names: tuple[str, ...]) -> None:
        super().__init__()
        self.hidden = (_Caller(tracer.model), run, values, tracer.aliases)
        self.names, self.weights = names, frozenset(tracer.weights)

    def forward(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """Run the stage with the given tensors in place of the example's, weights included."""
        caller, run, values, aliases = self.hidden
        named = dict(zip(self.names, tensors, strict=True))
        arguments = {key: rebuild(value, key, lambda n: named[aliases.get(n, n)]) for key, value in values.items()}
        weights = {f"model.{name}": tensor for name, tensor in named.items() if name in self.weights}
        results = torch.func.functional_call(caller, weights, (run, arguments))
        return flatten_all(results)


class _Caller(nn.Module):
    """Makes any function of a model's methods a `forward`, the only method that functional_call can call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Run, arguments: dict[str, Any]) -> dict[str, Any]:
        """run(**arguments)."""
        return run(**arguments)
