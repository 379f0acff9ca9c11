"""AOTInductor as a back end of transformers' own exporters, named "aoti". Importing this module registers it.

    exported = AutoHfExporter.from_config({"export_format": "aoti"}).export(model, inputs, AotiConfig())
    exported.save_pretrained(FOLDER)

The back end compiles the forward of any transformers model, this package's included, to one graph that holds its
weights. To ship a model, make a bundle (`megalodon_export.export.aoti`): its programs take every length, and share one
file of weights.
The cache is registered with torch's pytrees, too: without that, no saved export that takes a cache can be loaded.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

try:
    from transformers.exporters import DynamoConfig, DynamoExporter, ExportMetadata, HfExporter, ModelRunner
    from transformers.exporters.auto import register_backend
    from transformers.exporters.exporter_dynamo import register_pytree_node
except ImportError as error:
    raise ImportError(
        "this transformers has no exporters that back ends can be registered with; install transformers>=5.24"
    ) from error

from ..model import MegalodonCache

NAME = "aoti"


@dataclass
class AotiConfig(DynamoConfig):
    """The fields of transformers' DynamoConfig."""

    export_format: str = NAME  # type: ignore[assignment]  # a field of an enum there, which others may not extend


class AotiPackage:
    """A compiled package on disk: at `path`, or in a temporary folder that is deleted with this object."""

    def __init__(self, path: Path | None = None) -> None:
        self._folder = None if path is not None else tempfile.TemporaryDirectory()
        self.path = path if path is not None else Path(self._folder.name, "model.pt2")  # type: ignore[union-attr]


class AotiExporter(HfExporter):
    """Compiles the program that transformers' DynamoExporter traces."""

    export_format = NAME
    config_class = AotiConfig
    program_suffix = ".pt2"
    requires_trust_remote_code = True  # a package is native code

    def export_program(
        self, model: Any, sample_inputs: MutableMapping[str, Any], config: Any
    ) -> tuple[AotiPackage, ExportMetadata]:
        """Trace, then compile for this machine."""
        program, metadata = DynamoExporter().export_program(model, sample_inputs, config)
        package = AotiPackage()
        torch._inductor.aoti_compile_and_package(program, package_path=str(package.path))
        return package, metadata

    @classmethod
    def save_program(cls, program: AotiPackage, path: str | Path) -> None:
        """Copy the package."""
        shutil.copyfile(program.path, path)

    @classmethod
    def load_program(cls, path: str | Path) -> AotiPackage:
        """The package at `path`, without a copy."""
        return AotiPackage(Path(path))


class AotiModelRunner(ModelRunner):
    """Runs a package on the device that it was compiled for."""

    def __init__(self, program: AotiPackage, metadata: ExportMetadata) -> None:
        super().__init__(metadata)
        self._program = program  # its folder must outlive the library that is loaded from it
        self._run = torch._inductor.aoti_load_package(str(program.path))

    @property
    def device(self) -> torch.device:
        """The device that was exported for."""
        return torch.device(self.metadata.export_device or "cpu")

    @classmethod
    def from_program(cls, program: AotiPackage, metadata: ExportMetadata, device: Any = None) -> AotiModelRunner:
        """A runner of a package. ValueError for another kind of device than the package's."""
        runner = cls(program, metadata)
        if device is not None and torch.device(device).type != runner.device.type:
            raise ValueError(f"the package is compiled for {runner.device}, not {device}; export it there")
        return runner

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: Any) -> Any:
        """Run the traced forward; a cache among the inputs is updated in place."""
        with torch.no_grad():
            return self._run(**{**self.metadata.in_constants, **kwargs})


register_backend(AotiExporter, AotiModelRunner)
register_pytree_node(MegalodonCache)
