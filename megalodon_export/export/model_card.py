"""The README.md of a bundle: the checkpoint's own model card, then what the bundle holds and how exact it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bundles.manifest import Manifest

_SECTION = "## This bundle"


def model_card(manifest: Manifest, checkpoint: Path, parity: dict[str, Any]) -> str:
    """The text of the card. `checkpoint` may be a bundle; the section about it is then replaced by a new one."""
    card = checkpoint / "README.md"
    own = card.read_text() if card.is_file() else f"# {checkpoint.name}\n\nNo model card came with the weights."
    own = own.split(_SECTION)[0].rstrip()
    targets = {name: entry.target for name, entry in manifest.programs.by_runtime().items()}
    programs = ", ".join(f"{name} for {t.device} ({t.architecture})" for name, t in targets.items())
    rows = "\n".join(
        f"| {row['runtime']} | {row['case']} | {row['logits']:.1e} | {row['cache']:.1e} | {row['bound']:.0e} |"
        for row in parity["results"]
    )
    return f"""{own}

{_SECTION}

Exported with megalodon-export {manifest.versions["megalodon-export"]} and torch {manifest.versions["torch"]}:
{programs}; {manifest.dtype}{_quantized_weights(manifest)}.
Run it with `megalodon-export generate BUNDLE --prompt TEXT`.
It holds native code: load bundles only from those you trust. Largest differences from the eager model at export:

| runtime | case | logits | cache (relative) | bound |
|---|---|---|---|---|
{rows}
"""


def _quantized_weights(manifest: Manifest) -> str:
    """The card's sentence on quantised weights, and how transformers reads them; empty for float weights."""
    if manifest.weight_format == "float":
        return ""
    words = f", linear layers in {manifest.weight_format}"
    return f"{words}.\ntransformers loads this folder too, quantised as it is, after `import megalodon_export`"
