"""Records about compiled programs. Exporters make them; `bundles/manifest.py` puts them into a bundle's manifest.json.

They are msgspec Structs, so reading a manifest checks the type of every field. Importing this module is cheap: a
runtime that opens a bundle needs these records, but no compiler.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .programs import LAYER_INDEX, DtypeName, Limits, ProgramName

PACKAGE = "model.pt2"  # in a bundle's folder `aoti`: every stage once more, as torch loads them

InputKind = Literal["argument", "cache", "stage", "weight"]


def numbered(name: str, layer: int) -> str:
    """The name of one layer's tensor, from the name that stands for every layer's."""
    return name.replace(LAYER_INDEX, str(layer))


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An immutable part of a manifest. A JSON object with other keys is refused."""


class Target(Record, frozen=True, omit_defaults=True):
    """The machine that programs run on.

    `device` "cpu", "cuda" or "cpu or cuda"; `architecture` of the CPU ("x86_64") or the GPU ("sm_90"), or "any".
    `cpu_features`: instruction sets that the programs use, as /proc/cpuinfo names them; None for a GPU.
    """

    device: str
    architecture: str
    cpu_features: tuple[str, ...] | None = None


class StageInput(Record, frozen=True, omit_defaults=True):
    """One input of a stage. `{layer}` in a name stands for the number of the layer.

    kind: "argument" or "cache" of the program, "stage" (result of another stage) or "weight".
    Weights alone have a `shape`, and once a bundle's files are known a `file` and the name of the `tensor` in it.
    """

    kind: InputKind
    name: str
    dtype: DtypeName
    shape: tuple[int, ...] | None = None
    file: str | None = None
    tensor: str | None = None

    def __post_init__(self) -> None:
        if (self.shape is not None) != (self.kind == "weight"):
            raise ValueError(f"{self.kind} {self.name} has the shape {self.shape}; weights have one, others none")
        if any(size < 0 for size in self.shape or ()):
            raise ValueError(f"{self.name} has the shape {list(self.shape or ())}, with a negative size")


class CompiledStage(Record, frozen=True):
    """One compiled library of the bundle's folder `aoti`: its name in the package, its file, inputs and outputs."""

    name: str
    library: str
    inputs: tuple[StageInput, ...]
    outputs: tuple[str, ...]

    @property
    def weights(self) -> tuple[StageInput, ...]:
        """Those of the inputs that are weights."""
        return tuple(one for one in self.inputs if one.kind == "weight")


class CompiledProgram(Record, frozen=True):
    """The stages of a program: what comes before the layers, one layer for all of them, and what comes after."""

    begin: CompiledStage
    layer: CompiledStage
    end: CompiledStage

    @property
    def stages(self) -> tuple[CompiledStage, ...]:
        """All three, in the order in which they run."""
        return self.begin, self.layer, self.end


class AotiPrograms(Record, frozen=True):
    """AOTInductor's programs. `package` holds every stage once more, as torch loads them.

    `all_logits`: prefill returns the logits of every token, not of the last alone.
    """

    target: Target
    limits: Limits
    package: str
    all_logits: bool
    stages: dict[ProgramName, CompiledProgram]


class GraphTensor(Record, frozen=True):
    """An input or output of an ONNX graph: its name there, and the name that the rest of the manifest uses."""

    name: str
    tensor: str
    dims: tuple[str, ...]
    dtype: DtypeName


class Graph(Record, frozen=True):
    """One ONNX graph: its file, and its inputs and outputs in order."""

    file: str
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]


class OnnxPrograms(Record, frozen=True):
    """The ONNX graphs. `files` lists every file that they need but the bundle's weights; `versions` made them."""

    target: Target
    limits: Limits
    opset: int
    all_logits: bool
    files: tuple[str, ...]
    graphs: dict[ProgramName, Graph]
    versions: dict[str, str] = msgspec.field(default_factory=dict)


class Programs(Record, frozen=True, omit_defaults=True):
    """A bundle's programs by the runtime that they are for; a bundle may have one kind, or both."""

    aoti: AotiPrograms | None = None
    onnx: OnnxPrograms | None = None

    def by_runtime(self) -> dict[str, AotiPrograms | OnnxPrograms]:
        """Those that there are."""
        kinds: dict[str, AotiPrograms | OnnxPrograms | None] = {"aoti": self.aoti, "onnx": self.onnx}
        return {name: programs for name, programs in kinds.items() if programs is not None}

    def including(self, name: str, programs: AotiPrograms | OnnxPrograms) -> Programs:
        """These and others, or others in the place of those of the same runtime."""
        return msgspec.structs.replace(self, **{name: programs})

    @property
    def all_logits(self) -> bool:
        """Whether any prefill returns the logits of every token."""
        return any(programs.all_logits for programs in self.by_runtime().values())
