"""A saved folder carries what transformers needs to load it where nobody has imported this package.

    config.json              "auto_map": {"AutoConfig": "modeling_megalodon.MegalodonConfig", ...}
    modeling_megalodon.py    imports these classes from the package

With `trust_remote_code=True`, the Auto classes of transformers import the file that `auto_map` names.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("modeling_megalodon.py")
_PACKAGE = __name__.split(".")[0]
AUTO_MAP = {
    "AutoConfig": f"{_FILE.stem}.MegalodonConfig",
    "AutoModel": f"{_FILE.stem}.MegalodonModel",
    "AutoModelForCausalLM": f"{_FILE.stem}.MegalodonForCausalLM",
}


def with_own_classes(auto_map: Mapping[str, str] | None) -> dict[str, str]:
    """A config's `auto_map` with this package's classes where it names no others.

    transformers writes the repository that a config came from before a name, as in "owner/name--module.Class". A folder
    has the file itself, so that this is taken away from names of this package.
    """
    given = dict(auto_map or {})
    others = {key: name for key, name in given.items() if name.split("--")[-1] != AUTO_MAP.get(key)}
    return {**AUTO_MAP, **others}


def write_file(folder: Path) -> None:
    """Write the file that AUTO_MAP names into a folder, which is made if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_FILE, folder / _FILE.name)


class RegisteredClass:
    """A class that transformers need not copy the source of when it saves an instance."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Register a class of another package, as upstream. Those of this package are in every `auto_map` already.

        transformers calls this for a class that it loaded by `auto_map`. It would then save the module of the class,
        which is a part of this package and runs nowhere else.
        """
        if cls.__module__.split(".")[0] != _PACKAGE:
            super().register_for_auto_class(auto_class)  # type: ignore[misc]
