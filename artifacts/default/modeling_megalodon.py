"""The classes of a saved Megalodon checkpoint, for `from_pretrained(folder, trust_remote_code=True)`.

transformers imports this file from the checkpoint's folder. The classes are those of the package megalodon-export.
"""

try:
    from megalodon_export.model import MegalodonConfig, MegalodonForCausalLM, MegalodonModel
except ModuleNotFoundError as error:
    if error.name != "megalodon_export":
        raise
    raise ImportError(
        "this checkpoint is a Megalodon model, whose code is in the package megalodon-export; "
        "install it first: pip install megalodon-export"
    ) from error

__all__ = ["MegalodonConfig", "MegalodonForCausalLM", "MegalodonModel"]
