"""Wrong arguments of `load`, `Session` and the exports: one sentence each, before anything is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megalodon_export
from megalodon_export import Session
from megalodon_export.export.aoti import add_aoti, export_aoti
from megalodon_export.measure.evaluation import Target
from megalodon_export.runtimes import RuntimeUnavailable

pytestmark = pytest.mark.usefixtures("one_thread")

OPENING = [73, 110, 32]


@pytest.fixture(params=["eager", "aoti", "onnx"])
def session(request: pytest.FixtureRequest, opened: dict[str, Session]) -> Session:
    """A fresh session; the runtime is shared."""
    return Session(opened[request.param].runtime, opened[request.param].tokenizer)


NO_DEVICE: dict[str, Any] = {
    **{repr(one): one for one in ("", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:300", "cpu:0", "meta", "mps")},
    **{repr(one): one for one in (0, 1.5, True, b"cpu", ["cpu"], torch.device("meta"))},
}


def refused_at_once(message: str, *calls: Callable[[], object]) -> None:
    for call in calls:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NO_DEVICE)
def test_devices_that_there_are_not(tiny_bundle: Path, checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Refused by every function that takes one, before it opens or writes anything."""
    value, made = NO_DEVICE[name], tmp_path / "made"
    refused_at_once(
        r'^device is .*, expected "cpu", "cuda", or one GPU of several: "cuda:1"$',
        *(lambda r=r: megalodon_export.load(tiny_bundle, r, value) for r in ("aoti", "eager", "onnx", None)),
        lambda: megalodon_export.load(tmp_path / "absent", device=value),
        lambda: Target.open(tiny_bundle, device=value),
        lambda: Target.open(checkpoints["tiny"], device=value),
        lambda: export_aoti(checkpoints["tiny"], made, value),
        lambda: add_aoti(made, value),
    )
    assert not list(tmp_path.iterdir())


def test_devices_of_torch(tiny_bundle: Path) -> None:
    assert megalodon_export.load(tiny_bundle, "eager", torch.device("cpu")).runtime.device == torch.device("cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "count", "message"),
    [
        ("cuda", 0, r"^cuda needs a GPU and a torch with CUDA, and there is none here; use the CPU$"),
        ("cuda:1", 0, r"^cuda:1 needs a GPU and a torch with CUDA"),
        ("cuda:2", 2, r"^there is no cuda:2: the GPUs here are 0\.\.1$"),
    ],
)
def test_gpus_that_are_not_there(
    tiny_bundle: Path,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    count: int,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    calls: list[Callable[[], object]] = [
        lambda: megalodon_export.load(tiny_bundle, "eager", device),
        lambda: Target.open(checkpoints["tiny"], device=device),
        lambda: export_aoti(checkpoints["tiny"], tmp_path / "made", device),
    ]
    for call in calls:
        with pytest.raises(RuntimeUnavailable, match=message):
            call()
    assert not list(tmp_path.iterdir())


NO_RUNTIME: list[Any] = ["", "jax", "AOTI", 0, True, b"aoti", ["aoti"], {}, 1.0]


@pytest.mark.parametrize("value", NO_RUNTIME, ids=repr)
def test_runtimes_that_there_are_not(tiny_bundle: Path, checkpoints: dict[str, Path], value: Any) -> None:
    refused_at_once(
        "^no runtime .*; there are eager, aoti, onnx$",
        lambda: megalodon_export.load(tiny_bundle, value),
        lambda: Target.open(tiny_bundle, value),
        lambda: Target.open(checkpoints["tiny"], value),
    )


@pytest.mark.parametrize("value", [None, 3, b"bundle", ["bundle"], 1.5, True], ids=repr)
def test_bundles_that_are_no_paths(value: Any) -> None:
    refused_at_once(
        rf"^the bundle is .* of type {type(value).__name__}, expected a path: a str or a Path$",
        lambda: megalodon_export.load(value),
    )


@pytest.mark.parametrize("value", [None, 0, 1, "sizes", "", []], ids=repr)
def test_checks_that_are_no_switches(tiny_bundle: Path, value: Any) -> None:
    refused_at_once("^check is .*, expected True or False$", lambda: megalodon_export.load(tiny_bundle, check=value))


NO_LOOKAHEAD: dict[str, tuple[Any, str]] = {
    **{repr(one): (one, rf"{one}, expected at least 0") for one in (-1, -(2**63), np.int64(-2))},
    **{repr(one): (one, f"{one}, expected at most 256") for one in (257, 2**63)},
    **{repr(one): (one, ".*, expected an integer") for one in (1.0, "2", True, [2], np.float32(2), float("nan"))},
}


@pytest.mark.parametrize("name", NO_LOOKAHEAD)
def test_lookaheads(session: Session, name: str) -> None:
    value, message = NO_LOOKAHEAD[name]
    refused_at_once(f"^lookahead is {message}$", lambda: Session(session.runtime, lookahead=value))


def test_lookaheads_of_numpy_and_torch(session: Session) -> None:
    expected = list(Session(session.runtime, lookahead=2).generate_ids(OPENING, 5, eos_token_id=-1))
    for value in (np.int64(2), np.array(2), torch.tensor(2)):
        one = Session(session.runtime, lookahead=value)  # type: ignore[arg-type]
        assert list(one.generate_ids(OPENING, 5, eos_token_id=-1)) == expected


@pytest.mark.parametrize("value", [None, "bundle", 3, {}], ids=repr)
def test_sessions_of_no_runtime(session: Session, value: Any) -> None:
    refused_at_once("^runtime is of type .*, expected a Runtime", lambda: Session(value), lambda: Session(session))
    if value is not None:
        refused_at_once("^tokenizer is of type .*, expected a Token", lambda: Session(session.runtime, value))


@pytest.mark.parametrize("value", [None, "2", 1.0, True, [1]], ids=repr)
def test_sizes_of_batches_that_are_no_integers(session: Session, value: Any) -> None:
    refused_at_once("^a batch of .* is none, expected an integer in 1", lambda: session.runtime.new_cache(value))
