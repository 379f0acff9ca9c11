"""Registers the model with transformers' Auto classes, without importing transformers for it.

`install` registers at once if transformers' modules of Auto classes are there already. Otherwise it leaves a finder on
`sys.meta_path`, which registers right after Python has run such a module. So both orders of import work:

    import megalodon_export                                import transformers
    from transformers import AutoModelForCausalLM          import megalodon_export
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def install() -> None:
    """Register with every module of Auto classes, now or when it is imported."""
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register()
        elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(name, register))


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .model.transformers_api.config import MegalodonConfig

    AutoConfig.register("megalodon", MegalodonConfig, exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

    from .model.transformers_api.modeling import MegalodonConfig, MegalodonForCausalLM, MegalodonModel

    AutoModel.register(MegalodonConfig, MegalodonModel, exist_ok=True)
    AutoModelForCausalLM.register(MegalodonConfig, MegalodonForCausalLM, exist_ok=True)


_REGISTER = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


class _Finder(MetaPathFinder):
    """Finds one module as Python does, with a loader that calls `after` once the module has been run."""

    def __init__(self, name: str, after: Callable[[], None]) -> None:
        self.name, self._after = name, after

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, or None for another module."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # it has done its work, and must not find itself below
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._after)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, after: Callable[[], None]) -> None:
        self._loader, self._after = loader, after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._after()
