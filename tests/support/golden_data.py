"""The golden data, and checkpoint folders written from it as the two implementations write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalodon_export.model import MegalodonConfig
from megalodon_export.model.conversion import convert_megalodon_hf, convert_upstream
from megalodon_export.model.plan import PrefillPlan

GOLDEN = Path(__file__).parents[1] / "golden"


def names(prefix: str) -> list[str]:
    """Names of the golden files that start with `prefix`."""
    return sorted(path.stem for path in GOLDEN.glob(f"{prefix}*.json"))


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A golden file: its description (config, cases) and its tensors."""
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude of what is expected."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def write_upstream(
    folder: Path, config: dict[str, Any], state: dict[str, Any], dtype: str = "fp32", parts: int = 1
) -> Path:
    """A consolidated checkpoint of the original, in one part or several."""
    folder.mkdir(parents=True)
    tokenizer = {"path": "/nowhere/tokenizer.model", "additional_vocab_size": 0, "data_tokenized": False}
    (folder / "config.json").write_text(json.dumps({"model": config, "tokenizer": tokenizer}))
    (folder / "consolidate_config.json").write_text(json.dumps({"model_parallel_size": parts, "dtype": dtype}))
    for i in range(parts):
        name = "consolidated.pth" if parts == 1 else f"consolidated.{i:02d}.pth"
        torch.save({key: part_of(key, t, i, parts) for key, t in state.items()}, folder / name)
    return folder


def part_of(name: str, tensor: Tensor, index: int, parts: int) -> Tensor:
    """What process `index` of the original's model parallelism holds of a tensor, see its modules' __init__."""
    module, kind = name.split(".")[-2:] if "." in name else ("", name)
    columns = {("mega", "gamma"), ("mega", "beta"), ("embed", "weight"), ("output", "weight")}
    columns |= {("wh2", "weight"), ("fc2", "weight")}
    whole = {"rope", "rmsnorm", "norm", "nffn"}
    if parts == 1 or module in whole or kind == "prior_count":
        return tensor
    return tensor.chunk(parts, 1 if (module, kind) in columns else 0)[index].clone()


def write_hf(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Path:
    """A checkpoint of megalodon-hf; as transformers saves it, without the tied head."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    kept = {key: t.contiguous() for key, t in state.items() if key != "lm_head.weight"}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_checkpoint(name: str, folder: Path) -> Path:
    """The checkpoint of a golden file, of the kind that its name says."""
    info, tensors = load(name)
    write = write_hf if name.startswith("hf_") else write_upstream
    return write(folder, info["config"], under(tensors, "state_dict."))


def convert(name: str) -> Callable[..., MegalodonConfig]:
    """The conversion for a golden file's kind of checkpoint."""
    return convert_megalodon_hf if name.startswith("hf_") else convert_upstream


def halves(dim: int) -> Tensor:
    """Order that turns interleaved rotary pairs of one head into halves."""
    return torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)])


def full(x: Tensor) -> Tensor:
    """The lengths of x (B, L, ...) without padding."""
    return torch.full((x.shape[0],), x.shape[1])


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that take gradients."""
    return {name: t.clone().requires_grad_() for name, t in tensors.items()}


def assert_gradients(inputs: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The gradients of `inputs`, each within `tolerance` of its maximum (or of 1)."""
    assert set(inputs) == set(expected)
    for name, tensor in inputs.items():
        actual = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        error = (actual - expected[name].view_as(actual)).abs().max()
        assert error <= tolerance * max(expected[name].abs().max().item(), 1.0), name


def plan_of(
    x: Tensor,
    lengths: Tensor | None = None,
    position: Tensor | None = None,
    bound: int = 0,
    chunk: int = 8,
    cached: bool = False,
) -> PrefillPlan:
    """The plan of a prefill of x (B, L, ...): all valid from position 0 unless told otherwise."""
    lengths = full(x) if lengths is None else lengths
    position = torch.zeros_like(lengths) if position is None else position
    return PrefillPlan.of(lengths, position, x.shape[1], chunk, max(bound, x.shape[1]), cached)
