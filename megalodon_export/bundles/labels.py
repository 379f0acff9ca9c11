"""Labels of programs: what a manifest says about a library or a graph, at the end of the program's own file.

A library cannot be asked what it takes before it is loaded, and then its code runs. So the export appends a label,
which the system's loader ignores: JSON, its length in 8 bytes (little-endian), and 16 bytes that mark it.

    aoti/decode_end.so = compiled code + {"origin": {...}, "stage": {"name": "decode_end", ...}} + length + MARK

An ONNX graph has a label of the same form. It is the value of an entry of the model's `metadata_props`, whose bytes are
the last ones of the file:

    decode.onnx = graph + head of an entry + {"file": "decode.onnx", "config": {...}, ...} + length + MARK

The C++ library reads labels too (cpp/src/bundle/label.cpp).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from ..exporters.manifest_types import (
    PACKAGE,
    AotiPrograms,
    CompiledProgram,
    CompiledStage,
    OnnxPrograms,
    Record,
    Target,
)
from ..exporters.programs import DECODE, DECODE_ONE, PREFILL, Limits, ProgramName
from .files import BundleError
from .strict_json import parse_json

MARK = b"megalodon-export"
GRAPHS: tuple[ProgramName, ...] = (PREFILL, DECODE)
_METADATA_PROPS, _KEY, _VALUE = b"\x72", b"\x0a", b"\x12"  # fields of protobuf: 14 of ModelProto, 1 and 2 of an entry
_PADDED_TO = 256  # bytes of a graph's JSON
_PROGRAMS: tuple[ProgramName, ...] = (PREFILL, DECODE, DECODE_ONE)
_STAGES = CompiledProgram.__struct_fields__
_EXPORT_AGAIN = "Export the bundle again."


class Origin(Record, frozen=True):
    """Facts that all libraries of a bundle share: the compiler, the machine, and the form of the programs."""

    torch: str
    target: Target
    limits: Limits
    all_logits: bool


class Label(Record, frozen=True):
    """The label of one library."""

    origin: Origin
    stage: CompiledStage


class GraphLabel(Record, frozen=True):
    """The label of one graph: its file, the model that it was made for, and the facts that the manifest lists."""

    file: str
    config: dict[str, Any]
    dtype: str
    limits: Limits
    opset: int
    all_logits: bool
    versions: dict[str, str]


AnyLabel = TypeVar("AnyLabel", Label, GraphLabel)


def library_names() -> list[str]:
    """The libraries of a bundle with AOTInductor programs, in its folder `aoti`."""
    return [f"{program}_{stage}.so" for program in _PROGRAMS for stage in _STAGES]


def write_labels(folder: Path, programs: AotiPrograms, torch: str) -> None:
    """Append a label to every library of a bundle; `torch` is the version that compiled them."""
    origin = Origin(torch, programs.target, programs.limits, programs.all_logits)
    for program in programs.stages.values():
        for stage in program.stages:
            data = json.dumps(msgspec.to_builtins(Label(origin, stage))).encode()
            with (folder / "aoti" / stage.library).open("ab") as file:
                file.write(data + len(data).to_bytes(8, "little") + MARK)


def read_labels(folder: Path) -> tuple[AotiPrograms, str]:
    """The programs of a bundle as the labels of its libraries describe them, and the torch that compiled them.

    BundleError names a library that has no label, or that of another bundle.
    """
    first: Origin | None = None
    stages: dict[ProgramName, CompiledProgram] = {}
    for program in _PROGRAMS:
        found = {}
        for stage in _STAGES:
            path = folder / "aoti" / f"{program}_{stage}.so"
            label = _read_label(path, Label)
            first = first or label.origin
            if label.origin != first or (label.stage.name, label.stage.library) != (path.stem, path.name):
                raise BundleError(f"{path}: it belongs to another bundle or another stage. {_EXPORT_AGAIN}")
            found[stage] = label.stage
        stages[program] = CompiledProgram(**found)
    assert first is not None
    return AotiPrograms(first.target, first.limits, PACKAGE, first.all_logits, stages), first.torch


def write_graph_labels(folder: Path, config: dict[str, Any], dtype: str, programs: OnnxPrograms) -> None:
    """Append a label to both graphs of a bundle. `config` is the manifest's."""
    for name in GRAPHS:
        path = folder / f"{name}.onnx"
        facts = programs.limits, programs.opset, programs.all_logits, programs.versions
        append_graph_label(path, msgspec.to_builtins(GraphLabel(path.name, config, dtype, *facts)))


def append_graph_label(path: Path, label: dict[str, Any]) -> None:
    """Append a label to a graph, as an entry of its metadata."""
    data = json.dumps(label).encode()
    # ONNX's strings are UTF-8. The bytes of a length that is a multiple of 256, below 2^15, are ASCII.
    data += b" " * (-len(data) % _PADDED_TO)
    assert len(data) < 2**15
    entry = _KEY + _sized(MARK) + _VALUE + _sized(data + len(data).to_bytes(8, "little") + MARK)
    with path.open("ab") as file:
        file.write(_METADATA_PROPS + _sized(entry))


def _sized(data: bytes) -> bytes:
    """Bytes after their number, as protobuf writes it: 7 bits a byte, the lowest first."""
    rest, head = len(data), bytearray()
    while rest >= 128:
        head.append(rest % 128 | 128)
        rest //= 128
    return bytes([*head, rest]) + data


def read_graph_labels(folder: Path) -> GraphLabel:
    """The label of a bundle's graphs, which differ in the name of their file alone.

    BundleError names a graph that has no label, or that of another bundle.
    """
    first: GraphLabel | None = None
    for name in GRAPHS:
        path = folder / f"{name}.onnx"
        label = _read_label(path, GraphLabel)
        first = first or label
        if label != replace(first, file=path.name):
            raise BundleError(f"{path}: it belongs to another bundle or another program. {_EXPORT_AGAIN}")
    assert first is not None
    return first


def _read_label(path: Path, kind: type[AnyLabel]) -> AnyLabel:
    tail = len(MARK) + 8
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - tail, 0))
            end = file.read()
            length = int.from_bytes(end[:8], "little")
            if end[8:] != MARK or length > size - tail:
                raise BundleError(f"{path}: a program with a label at its end expected, none found. {_EXPORT_AGAIN}")
            file.seek(size - tail - length)
            return msgspec.convert(parse_json(file.read(length)), kind)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: its label cannot be read ({error}). {_EXPORT_AGAIN}") from error
