"""Registers the model with transformers' Auto classes when they are imported, and not before.

Importing transformers takes seconds, and a bundle runs without it, so `import megalodon_export` does not import it.
`AutoModelForCausalLM.from_pretrained` has to know the model all the same, in either order of the imports:

    import megalodon_export                        import transformers.models.auto.modeling_auto
    from transformers import AutoModelForCausalLM  import megalodon_export

On the left, `install` installs an import hook. It registers the model after transformers has imported
the modules that define the Auto classes. On the right, they are there, and the model is registered at once.

This module needs the standard library only.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_FOLLOWED = ("transformers", f"{__package__}.model")


def _register_config() -> None:
    from transformers import AutoConfig

    from .model import MegalodonConfig

    AutoConfig.register("megalodon", MegalodonConfig, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from .model import MegalodonConfig, MegalodonForCausalLM, MegalodonModel

    AutoModel.register(MegalodonConfig, MegalodonModel, exist_ok=True)
    AutoModelForCausalLM.register(MegalodonConfig, MegalodonForCausalLM, exist_ok=True)
    _name_in_transformers(MegalodonForCausalLM, MegalodonModel)


def _name_in_transformers(*classes: type) -> None:
    """Let `getattr(transformers, config.architectures[0])` find the classes: `transformers serve` loads a model so.

    `transformers.processing_utils` runs the package's __init__ a second time as it is imported. This makes a second
    module, which replaces the first in sys.modules. Modules that imported transformers before hold the first.
    """
    import transformers.processing_utils  # noqa: F401

    held = [vars(one).get("transformers") for one in list(sys.modules.values()) if isinstance(one, ModuleType)]
    for module in [sys.modules["transformers"], *held]:
        for one in classes:
            if getattr(module, "__name__", None) == "transformers" and not hasattr(module, one.__name__):
                setattr(module, one.__name__, one)


# To be called after each of the modules that define Auto classes.
_REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


def install() -> None:
    """Register with the Auto classes that are imported already, and with the others when they are."""
    hook = _RegistrationHook()
    sys.meta_path.insert(0, hook)
    hook.register()


class _RegistrationHook(MetaPathFinder):
    """Runs _REGISTRATIONS, each after its module was imported, and then leaves `sys.meta_path`.

    Registering imports this package's classes, and these import modules of transformers. None of all these may be half
    imported then. The hook therefore follows every import of a module of transformers and of the model, and registers
    when the outermost one has ended.
    """

    def __init__(self) -> None:
        self._waiting = dict(_REGISTRATIONS)
        self._importing: list[str] = []  # modules that are being imported now

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the other finders find a module, and follow its import."""
        if not any(fullname == name or fullname.startswith(f"{name}.") for name in _FOLLOWED):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader.exec_module = self._followed(spec.loader.exec_module)  # type: ignore[method-assign,union-attr]
        return spec

    def _followed(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_and_register(module: ModuleType) -> None:
            with self._import_of(module.__name__):
                execute(module)
            self.register()

        return execute_and_register

    @contextmanager
    def _import_of(self, name: str) -> Iterator[None]:
        self._importing.append(name)
        try:
            yield
        finally:
            self._importing.remove(name)

    def register(self) -> None:
        """Register with what is imported, unless something is half imported."""
        if self._importing:
            return
        for name in [name for name in self._waiting if name in sys.modules]:
            registration = self._waiting.pop(name)
            try:
                with self._import_of(name):
                    registration()
            except (ImportError, OSError) as error:  # e.g. of a broken torch, which must not break transformers' import
                warnings.warn(f"transformers' Auto classes do not know Megalodon: {error}", stacklevel=2)
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
