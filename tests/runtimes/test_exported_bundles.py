"""Real bundles: damaged ones are refused before their native code is loaded, wrong ones fail verification."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch._C._aoti
from safetensors.torch import load_file, save_file

import megalodon_export
from megalodon_export.bundles import bundle
from megalodon_export.bundles.bundle import BundleError
from megalodon_export.bundles.labels import GRAPHS, MARK
from megalodon_export.bundles.verify import VerificationError, verify
from megalodon_export.bundles.writing import seal, staged
from megalodon_export.cli import run
from megalodon_export.runtimes import RuntimeUnavailable
from support.damaged_bundles import (
    EXPORT_DAMAGE,
    OTHER_MACHINES,
    edit,
    edit_config,
    flip,
    relabel,
    relabel_graphs,
    truncate,
)
from support.manifest_lies import CONFIG_LIES, GRAPH_LIES, LABEL_LIES, LIES, ONNX_LIES
from support.slow import slow_except

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.fixture
def no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("native code was loaded")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", load)


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_native_code")
@pytest.mark.parametrize("name", EXPORT_DAMAGE)
def test_damage_is_refused_before_native_code_is_loaded(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, message = EXPORT_DAMAGE[name]
    before = (copy / "parity.json").read_bytes()
    damage(copy)
    for runtime in ("aoti", "eager"):
        with pytest.raises(BundleError, match=message):
            megalodon_export.load(copy, runtime=runtime)
    with pytest.raises(BundleError, match=message):
        verify(copy)
    for command in (["verify", str(copy)], ["inspect", str(copy)], ["generate", str(copy), "--prompt", "x"]):
        assert run(command) == 1
        output = capsys.readouterr()
        assert re.search(message, output.err)
        assert "Traceback" not in output.err
        assert output.out == ""
    assert (copy / "parity.json").read_bytes() == before


@pytest.mark.parametrize("name", OTHER_MACHINES)
def test_programs_for_another_machine_are_refused(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    change, message = OTHER_MACHINES[name]
    relabel(copy, change)
    text = "".join(megalodon_export.load(copy, runtime="eager").generate("x", 5))  # the weights run anywhere
    assert text
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda *_: pytest.fail("native code was loaded"))
        with pytest.raises(RuntimeUnavailable, match=message):
            megalodon_export.load(copy)
        assert run(["generate", str(copy), "--prompt", "x"]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_contents_are_trusted_on_request_but_sizes_are_not(copy: Path) -> None:
    flip(copy / "README.md")
    with pytest.raises(BundleError, match=r"README\.md: sha256"):
        megalodon_export.load(copy, runtime="eager")
    megalodon_export.load(copy, runtime="eager", check=False)
    truncate(copy / "README.md")
    with pytest.raises(BundleError, match=r"README.md: .* bytes expected"):
        megalodon_export.load(copy, runtime="eager", check=False)


def test_a_bundle_may_be_moved(copy: Path, tmp_path: Path) -> None:
    moved = copy.rename(tmp_path / "a name with spaces, é")
    assert "".join(megalodon_export.load(moved).generate("x", 5))


@pytest.mark.parametrize("command", ["inspect", "verify", "generate"])
def test_names_are_never_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    arguments = [command, str(tmp_path / "\x1b[2J\u202ename"), *(["--prompt", "x"] if command == "generate" else [])]
    assert run(arguments) == 1
    error = capsys.readouterr().err
    assert r"\x1b[2J\u202ename: a bundle folder expected, nothing found" in error
    assert "\x1b" not in error


def test_others_may_read_a_bundle(tiny_bundle: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o444 for path in tiny_bundle.rglob("*") if path.is_file()}
    assert set(modes.values()) == {modes["config.json"]}


# ---- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_native_code")
@pytest.mark.parametrize("name", LIES)
def test_manifests_that_make_no_sense_are_refused(copy: Path, name: str) -> None:
    change, message = LIES[name]
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        bundle.read(copy, "sizes")


@pytest.mark.usefixtures("no_native_code")
@pytest.mark.parametrize("name", LABEL_LIES)
def test_libraries_that_say_the_same_nonsense_are_refused(copy: Path, name: str) -> None:
    change, message = LABEL_LIES[name]
    relabel(copy, change)
    with pytest.raises(BundleError, match=message):
        bundle.read(copy, "sizes")


@pytest.mark.usefixtures("no_native_code")
@pytest.mark.parametrize("name", CONFIG_LIES)
def test_configs_that_make_no_sense_are_refused(copy: Path, name: str) -> None:
    values, message = CONFIG_LIES[name]
    edit_config(copy, values)
    with pytest.raises(BundleError, match=message):
        bundle.read(copy, "sizes")


@pytest.mark.parametrize("name", ["decode_end.so", "prefill_layer.so"])
def test_a_library_without_its_label_is_refused(copy: Path, name: str) -> None:
    manifest, path = bundle.read(copy), copy / "aoti" / name
    path.write_bytes(path.read_bytes()[:-1])
    seal(copy, manifest)
    with pytest.raises(BundleError, match=rf"{name}: a program with a label at its end expected, none found"):
        bundle.read(copy, "sizes")
    shutil.copyfile(copy / "aoti/decode_layer.so", path)
    seal(copy, manifest)
    with pytest.raises(BundleError, match=rf"{name}: it belongs to another bundle or another stage"):
        bundle.read(copy, "sizes")


def test_graphs_have_their_labels_in_their_metadata(both_bundle: Path) -> None:
    for name in GRAPHS:
        model = onnx.load(both_bundle / f"{name}.onnx", load_external_data=False)
        (entry,) = [one for one in model.metadata_props if one.key == "megalodon-export"]
        assert json.loads(entry.value[: -len(MARK) - 8])["file"] == f"{name}.onnx"
        onnx.checker.check_model(both_bundle / f"{name}.onnx")


@pytest.mark.parametrize("name", ONNX_LIES)
def test_onnx_programs_that_make_no_sense_are_refused(both_bundle: Path, tmp_path: Path, name: str) -> None:
    change, message = ONNX_LIES[name]
    copy = Path(shutil.copytree(both_bundle, tmp_path / "copy"))
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        bundle.read(copy, "sizes")


@pytest.mark.parametrize("name", GRAPH_LIES)
def test_graphs_of_another_bundle_are_refused(both_bundle: Path, tmp_path: Path, name: str) -> None:
    change, message = GRAPH_LIES[name]
    copy = Path(shutil.copytree(both_bundle, tmp_path / "copy"))
    relabel_graphs(copy, change)
    with pytest.raises(BundleError, match=message):
        bundle.read(copy, "sizes")


@pytest.mark.parametrize("name", ["prefill.onnx", "decode.onnx"])
def test_a_graph_without_its_label_is_refused(both_bundle: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(both_bundle, tmp_path / "copy"))
    manifest, path = bundle.read(copy), copy / name
    other = {"prefill.onnx": "decode.onnx", "decode.onnx": "prefill.onnx"}[name]
    shutil.copyfile(copy / other, path)
    seal(copy, manifest)
    with pytest.raises(BundleError, match=rf"{name}: it belongs to another bundle or another program"):
        bundle.read(copy, "sizes")
    path.write_bytes(path.read_bytes()[:-1])
    seal(copy, manifest)
    with pytest.raises(BundleError, match=rf"{name}: a program with a label at its end expected, none found"):
        bundle.read(copy, "sizes")


def test_the_manifest_is_what_the_file_says(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = bundle.read(copy)
    assert json.loads(json.dumps(manifest.to_json())) == json.loads(path.read_text())
    assert manifest.cache[0].row_shape == (2, manifest.config.chunk_size, 8)
    edit(copy, lambda m: m["dimensions"].update(C=32))
    with pytest.raises(BundleError) as caught:
        megalodon_export.load(copy)
    assert str(caught.value) == f"{path}: dimensions.C: 64 expected, 32 found. Export it again."


# ---- the form of prefill ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fft_bundle(
    checkpoints: dict[str, Path],
    command: Callable[..., subprocess.Popen[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The short-chunk checkpoint, whose config says "blocked", exported with the other form."""
    folder = tmp_path_factory.mktemp("fft") / "bundle"
    options = ("--out", folder, "--device", "cpu", "--max-batch", 2, "--ema-prefill", "fft")
    process = command("aoti", "--checkpoint", checkpoints["short-chunk"], *options)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder


# Slow: each form is compiled and held to the model elsewhere. These two export once more, for the option alone.
@pytest.mark.slow
def test_the_form_of_prefill_is_chosen_at_export(fft_bundle: Path, short_chunk_bundle: Path) -> None:
    assert [bundle.read(folder).config.ema_prefill for folder in (short_chunk_bundle, fft_bundle)] == ["blocked", "fft"]
    assert json.loads((fft_bundle / "config.json").read_text())["ema_prefill"] == "fft"
    assert {row["runtime"] for row in verify(fft_bundle)["results"]} == {"aoti"}
    prompt = "In the beginning, " * 8
    texts = ["".join(megalodon_export.load(folder).generate(prompt, 40)) for folder in (short_chunk_bundle, fft_bundle)]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_the_form_of_prefill_is_chosen_for_onnx(
    fft_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    options = ["--checkpoint", str(fft_bundle), "--out", str(made), "--max-batch", "2"]
    assert run(["onnx", *options, "--ema-prefill", "blocked"]) == 0
    assert bundle.read(made).config.ema_prefill == "blocked"
    assert {row["runtime"] for row in verify(made)["results"]} == {"onnx"}
    capsys.readouterr()
    assert run(["onnx", "--add", str(fft_bundle), "--ema-prefill", "blocked"]) == 1
    assert "the bundle's own weights and dtype; leave out --ema-prefill" in capsys.readouterr().err


# ---- verification ----------------------------------------------------------------------------------------------------


def spoil(folder: Path, factor: float) -> None:
    """Change the constants of the compiled programs; the eager model derives its own."""
    path, manifest = folder / "constants.safetensors", bundle.read(folder)
    tensors = load_file(path)
    save_file({name: t * factor if t.is_floating_point() else t for name, t in tensors.items()}, path)
    seal(folder, manifest)
    (folder / "parity.json").unlink()  # it was measured on another bundle


def test_a_sound_bundle_verifies(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "parity.json").unlink()
    parity = verify(copy)
    assert json.loads((copy / "parity.json").read_text()) == parity
    assert {row["runtime"] for row in parity["results"]} == {"aoti"}
    assert all(max(row["logits"], row["cache"]) <= row["bound"] == 1e-4 for row in parity["results"])
    assert run(["verify", str(copy)]) == 0
    assert "five rows, one empty" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.01, float("nan"), float("inf")])
def test_numbers_out_of_bounds_fail(copy: Path, capsys: pytest.CaptureFixture[str], factor: float) -> None:
    spoil(copy, factor)
    with pytest.raises(VerificationError, match=r"out of the bound of 1e-04 .* aoti, a chunk and one"):
        verify(copy)
    assert run(["verify", str(copy)]) == 1
    output = capsys.readouterr()
    assert "out of the bound" in output.err
    assert "Traceback" not in output.err
    results = json.loads((copy / "parity.json").read_text())["results"]
    assert any(max(row["logits"], row["cache"]) > row["bound"] for row in results)


# ---- ended exports ---------------------------------------------------------------------------------------------------


def processes_with(mark: str) -> set[int]:
    """Living processes that have `mark` in their environment: an export, its workers, their compilers."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def export(
    checkpoints: dict[str, Path], command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], Path, str]]:
    """An export whose workers have just started, its destination, and the mark of its processes."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc")
    destination, mark = tmp_path / "out" / "bundle", f"mark-{os.getpid()}-{time.monotonic_ns()}"
    arguments = ("aoti", "--checkpoint", checkpoints["tiny"], "--out", destination, "--device", "cpu")
    process = command(*arguments, env={"MARK": mark, "TMPDIR": str(tmp_path)})
    with process:
        try:
            assert wait_until(lambda: len(processes_with(mark)) >= 3, 120)
            yield process, destination, mark
        finally:
            process.kill()
            for pid in processes_with(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_a_killed_export_leaves_neither_bundle_nor_compilers(
    export: tuple[subprocess.Popen[str], Path, str],
) -> None:
    process, destination, mark = export
    process.kill()
    process.wait()
    assert not destination.exists()
    assert wait_until(lambda: not processes_with(mark), 90)
    with pytest.raises(RuntimeError), staged(destination):
        raise RuntimeError  # the next export finds the place free, and clears it
    assert not list(destination.parent.iterdir())


# One handler takes both signals.
@pytest.mark.parametrize("number", slow_except([signal.SIGTERM, signal.SIGINT], signal.SIGINT))
def test_an_interrupted_export_cleans_up(
    export: tuple[subprocess.Popen[str], Path, str], tmp_path: Path, number: signal.Signals
) -> None:
    process, destination, mark = export
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "interrupted"
    assert not list(destination.parent.glob("*"))  # nor the folder itself, which the export made
    assert not list(tmp_path.glob("megalodon-export-*"))
    assert wait_until(lambda: not processes_with(mark), 30)
