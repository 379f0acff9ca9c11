"""A recorded operation as the text that its node carries, which the operator library reads (cpp/operators/program.hpp).

An input that the operation changes in place is an input and an output of the node. The kernels get the output. Where a
caller gives both one buffer, it changes in place; else the library copies it first. Scratch tensors are outputs that no
other node reads, so that ONNX Runtime allocates them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence
from typing import Any

import sympy
from torch import Tensor

from ..programs import dtype_name
from .expressions import to_text
from .recording import Argument, Copy, Launch, Operation

Size = Callable[[Any], sympy.Expr]
_LETTERS = {"i32": "n", "i64": "l"}


class OperationText:
    """How an operation's tensors become the inputs and outputs of a node, and the node's program."""

    def __init__(self, operation: Operation, blank: Collection[int], size: Size, divisors: dict[sympy.Symbol, int]):
        """`blank` inputs have no contents yet: they are outputs alone. `divisors`: sizes count so many of a symbol."""
        self.operation, self.size, self.divisors = operation, size, divisors
        self.inputs = [place for place in range(operation.inputs) if place not in blank]
        results = [place for place in operation.results if place not in operation.written]
        made = [p for p in range(operation.inputs, len(operation.tensors)) if p not in results]
        self.outputs = [*operation.written, *results, *made]

    def shape(self, tensor: Tensor) -> list[sympy.Expr]:
        """The sizes of a tensor in terms of the graph's symbols."""
        return [sympy.sympify(self.size(one)) for one in tensor.shape]

    def program(self, barrier: bool) -> str:
        """The text. `barrier`: the first kernel starts when everything before the run's first node has ended."""
        lines = [f"operation {self.operation.name}", *["barrier"] * barrier, *self._symbols()]
        for place in self.inputs:
            lines.append(f"input {self._tensor(place)}")
        for place in self.outputs:
            begins = f" = {self.inputs.index(place)}" if place in self.inputs else ""
            lines.append(f"output {self._tensor(place)}{begins}")
        return "\n".join([*lines, *map(self._step, self.operation.steps)])

    def _symbols(self) -> list[str]:
        """Where the library finds the value of every symbol: a dimension of an input."""
        found: dict[sympy.Symbol, str] = {}
        for index, place in enumerate(self.inputs):
            for axis, size in enumerate(self.shape(self.operation.tensors[place])):
                for symbol in size.free_symbols - found.keys():
                    factor = self.divisors.get(symbol, 1)
                    if size == factor * symbol:
                        found[symbol] = f"size {symbol} {index} {axis} {factor}"
        return list(found.values())

    def _tensor(self, place: int) -> str:
        tensor, operation = self.operation.tensors[place], self.operation
        name = operation.names[place] if place < operation.inputs else f"made_{place - operation.inputs}"
        return " ".join([name, dtype_name(tensor.dtype), *map(to_text, self.shape(tensor))])

    def _place(self, place: int) -> str:
        return f"o{self.outputs.index(place)}" if place in self.outputs else f"i{self.inputs.index(place)}"

    def _step(self, step: Copy | Launch) -> str:
        if isinstance(step, Copy):
            return f"copy {self._place(step.source)} {self._place(step.destination)}"
        words: Sequence[str] = [*map(to_text, step.grid), *map(self._argument, step.arguments)]
        return " ".join(["launch", step.kernel.name, *words])

    def _argument(self, argument: Argument) -> str:
        if argument.kind == "tensor":
            return self._place(argument.value)
        if argument.kind == "fp32":
            return f"f:{struct.pack('>f', argument.value).hex()}"
        return f"{_LETTERS[argument.kind]}:{to_text(argument.value)}"
