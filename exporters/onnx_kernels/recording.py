"""Records the launches of an operation of `model/kernels` by running its own launch code on fake tensors.

    record(torch.ops.megalodon.ema_step.default, fake arguments, translator.size)
    -> Operation: its inputs, the tensors that it makes, and its steps: copies and launches, in order

Nothing here knows a kernel's grid, constants or tile sizes: a changed kernel changes what is recorded. The launch code
may make tensors (`empty`, `clone`) and launch kernels. Anything else that it computes is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...model.kernels.launch import recorded_launches
from ..torch_internals import argument_names, operator_function, written_arguments
from .expressions import is_multiple_of_16, is_number

aten = torch.ops.aten
Size = Callable[[Any], sympy.Expr]  # of a traced size: in terms of the graph's symbols
POINTERS = {
    **{torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"},
    **{torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1"},
}
_MAKES = (aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default)
_ABOUT_SIZES = (aten.sym_size.int, aten.sym_stride.int)


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is compiled: its function, the types of its parameters, constants and compiler options."""

    function: Any
    types: tuple[tuple[str, str], ...]  # of every parameter: "*bf16", "i32", "fp32", "constexpr"
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # parameters that are multiples of 16
    options: tuple[tuple[str, Any], ...]  # num_warps, num_stages

    @property
    def name(self) -> str:
        """The function's name, and a fingerprint of everything that the machine code depends on."""
        facts = self.function.cache_key, self.types, self.constants, self.aligned, self.options
        return f"{self.function.__name__}.{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Argument:
    """One argument of a launch: a tensor by its place in `Operation.tensors`, or a number."""

    kind: str  # "tensor", "i32", "i64", "fp32"
    value: Any


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid of three sizes, and its arguments without the constants."""

    kernel: Kernel
    grid: tuple[sympy.Expr, ...]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Copy:
    """A tensor that begins as a copy of another, both by their places in `Operation.tensors`."""

    source: int
    destination: int


@dataclass
class Operation:
    """A recorded operation. `tensors` has its inputs first, then those that it makes."""

    name: str
    inputs: int
    written: list[int] = field(default_factory=list)  # inputs that change in place
    results: list[int] = field(default_factory=list)  # what the operation returns
    tensors: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the inputs
    steps: list[Copy | Launch] = field(default_factory=list)

    def place(self, tensor: Tensor) -> int:
        """Where a tensor is in `tensors`; ValueError for one of other origin."""
        for place, one in enumerate(self.tensors):
            if one is tensor:
                return place
        raise ValueError(
            f"{self.name} launches a kernel on a tensor {tuple(tensor.shape)}, which it neither got nor made by empty "
            "or clone"
        )


def record(target: Any, arguments: Sequence[Any], size: Size) -> Operation:
    """The operation that a call of `target`, an operator of `model/kernels`, with these fake tensors would run."""
    function = operator_function(target)
    names = argument_names(target)
    operation = Operation(target.__name__.split(".")[0], 0)
    for name, argument in zip(names, arguments, strict=True):
        if isinstance(argument, Tensor) and not any(argument is one for one in operation.tensors):
            operation.tensors.append(argument)
            operation.names.append(name)
    operation.inputs = len(operation.tensors)
    written = written_arguments(target)
    operation.written = [operation.place(a) for name, a in zip(names, arguments, strict=True) if name in written]

    def launch(kernel: Any, grid: tuple[Any, ...], tensors: tuple[Any, ...], sizes: dict[str, Any]) -> None:
        operation.steps.append(_launch(operation, kernel, grid, tensors, sizes, size))

    with recorded_launches(launch), _Tensors(operation):
        returned = function(*arguments)
    returned = () if returned is None else returned if isinstance(returned, tuple | list) else (returned,)
    operation.results = [operation.place(tensor) for tensor in returned]
    return operation


class _Tensors(TorchDispatchMode):
    """Notes the tensors that an operation makes, and refuses everything else that it might compute."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _MAKES or func is aten.clone.default:
            self.operation.tensors.append(result)
            if func is aten.clone.default:
                source = self.operation.place(args[0])
                self.operation.steps.append(Copy(source, len(self.operation.tensors) - 1))
        elif func is aten.detach.default:  # by autograd, from tensors that were just made
            self.operation.tensors[self.operation.place(args[0])] = result
        elif func not in _ABOUT_SIZES:
            raise NotImplementedError(
                f"{self.operation.name} computes {func} beside its kernels, which cannot be recorded for ONNX; "
                f"move it into a kernel, or add it to {__name__}"
            )
        return result


def _launch(
    operation: Operation,
    function: Any,
    grid: tuple[Any, ...],
    given: tuple[Any, ...],
    sizes: dict[str, Any],
    size: Size,
) -> Launch:
    values = dict(zip(function.arg_names, given, strict=False)) | {
        n: sizes[n] for n in function.arg_names if n in sizes
    }
    types, constants, aligned, arguments = [], [], [], []
    for parameter in function.params:
        name, value = parameter.name, values[parameter.name]
        kind, argument, is_aligned = _argument(operation, value, size)
        if parameter.is_constexpr or value is None or (kind == "i32" and is_number(argument.value, 1)):
            types.append((name, "constexpr"))
            constants.append((name, 1 if kind == "i32" and not parameter.is_constexpr else value))
            continue
        types.append((name, kind))
        arguments.append(argument)
        if is_aligned:
            aligned.append(name)
    options = tuple(sorted((name, value) for name, value in sizes.items() if name not in function.arg_names))
    kernel = Kernel(function, tuple(types), tuple(constants), tuple(aligned), options)
    whole = tuple(sympy.sympify(size(one)) for one in (*grid, 1, 1)[:3])
    return Launch(kernel, whole, tuple(arguments))


def _argument(operation: Operation, value: Any, size: Size) -> tuple[str, Argument, bool]:
    """The type of a parameter, its argument, and whether it is a multiple of 16. Tensors begin at such addresses."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype], Argument("tensor", operation.place(value)), True
    if isinstance(value, float):
        return "fp32", Argument("fp32", value), False
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        number = sympy.sympify(size(value))
        kind = "i64" if number.is_Integer and not -(2**31) <= int(number) < 2**31 else "i32"
        return kind, Argument(kind, number), is_multiple_of_16(number)
    return "constexpr", Argument("constexpr", value), False


def with_case(general: Operation, special: Operation, symbol: sympy.Symbol) -> Operation:
    """An operation that launches the kernels of `special` where a symbol is 1, and those of `general` elsewhere.

    Both are recordings of one call, `special` with 1 for the symbol. A kernel whose parameters are constants is faster.
    The grid of a launch that does not apply is empty.
    """
    steps: list[Copy | Launch] = []
    for one, other in zip(general.steps, special.steps, strict=True):
        if (
            isinstance(one, Copy)
            or isinstance(other, Copy)
            or one.kernel.name == other.kernel.name
            or any(is_number(size, 0) for size in other.grid)
        ):
            steps.append(one)
        else:
            steps.append(_guarded(other, sympy.Max(0, 2 - symbol)))
            steps.append(_guarded(one, sympy.Min(1, symbol - 1)))
    return replace(general, steps=steps)


def _guarded(launch: Launch, applies: sympy.Expr) -> Launch:
    """A launch whose grid is multiplied by 1 or 0."""
    first, *rest = launch.grid
    return replace(launch, grid=(sympy.Mul(first, applies, evaluate=False), *rest))
