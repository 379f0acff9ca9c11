"""Private interfaces of torch: each does what `torch_internals.py` says, so that a changed torch fails here, loudly."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.export import Dim, export

import megalodon_export
import megalodon_export.model.kernels as kernels
from megalodon_export.exporters import torch_internals
from megalodon_export.exporters.torch_internals import TorchChangedError
from megalodon_export.model.compile_time import INDEX_FUNCTIONS

ROOT = Path(__file__).parents[2]

# ---- kernels of this package -----------------------------------------------------------------------------------------

KERNEL = f"""
import triton
import triton.language as tl

@triton.jit
def {kernels.KERNEL_PREFIX}{{name}}(out_ptr, weight_ptr, N: tl.constexpr, {{pdl}}: tl.constexpr):
    at = tl.arange(0, N)
    weight = tl.load(weight_ptr + at)
    if {{pdl}}:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store({{target}}_ptr + at, 2 * weight)
"""


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the machine's GPU for an H100, whether or not there is one."""
    driver = pytest.importorskip("triton").runtime.driver
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

    monkeypatch.setattr(driver, "_active", Driver())


def doubling(folder: Path, name: str, pdl: str = kernels.PDL_CONSTEXPR, target: str = "out") -> Callable[..., Tensor]:
    """An operator of one kernel, which reads a weight and writes its double."""
    (folder / f"{name}.py").write_text(KERNEL.format(name=name, pdl=pdl, target=target))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")  # Triton reads a kernel's file
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    launcher = torch.library.wrap_triton(getattr(module, kernels.KERNEL_PREFIX + name))

    def run(weight: Tensor) -> Tensor:
        out = torch.empty_like(weight)
        launcher[(1,)](out, weight, N=64, **{pdl: True})
        return out

    run.__annotations__ = {"weight": Tensor, "return": Tensor}
    return torch.library.triton_op(f"megalodon_test::{name}", run, mutates_args=())


def copied(run: Callable[..., Tensor], *inputs: Tensor) -> list[str]:
    """The tensors of its kernels that are copied before a launch where a program becomes functional for Inductor."""
    from torch._functorch.aot_autograd import aot_export_module

    class Program(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor]:
            return (run(*inputs),)

    with torch.no_grad():
        module = export(Program(), inputs, strict=False).module(check_guards=False)
        values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
        graph: fx.Graph = aot_export_module(module, values, trace_joint=False)[0].graph
    launches = [node for node in graph.nodes if "tensors_to_clone" in node.kwargs]
    assert launches
    return [name for node in launches for name in node.kwargs["tensors_to_clone"]]


@pytest.mark.usefixtures("h100")
def test_weights_are_copied_unless_the_kernel_is_shown_without_pdl(tmp_path: Path) -> None:
    run, weight = doubling(tmp_path, "double"), torch.ones(64)
    assert sorted(copied(run, weight)) == ["out_ptr", "weight_ptr"]  # else `pdl_understood` is needed no more
    with torch_internals.pdl_understood():
        assert copied(run, weight) == ["out_ptr"]
    assert sorted(copied(run, weight)) == ["out_ptr", "weight_ptr"]


@pytest.mark.usefixtures("h100")
def test_a_renamed_constant_is_an_error(tmp_path: Path) -> None:
    run = doubling(tmp_path, "renamed", "OTHER")
    with (
        torch_internals.pdl_understood(),
        pytest.raises(TorchChangedError, match="megalodon_renamed has no constant PDL"),
    ):
        copied(run, torch.ones(64))


@pytest.mark.usefixtures("h100")
def test_a_kernel_that_torch_does_not_understand_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = doubling(tmp_path, "obscure")
    import torch._higher_order_ops.triton_kernel_wrap as wrap

    def unknown(*_: Any) -> None:
        raise RuntimeError("an unknown operation")

    monkeypatch.setattr(wrap, "ttir_to_functions", unknown)
    with (
        torch_internals.pdl_understood(),
        pytest.raises(TorchChangedError, match=r"all tensors of the kernel .*obscure"),
    ):
        copied(run, torch.ones(64))


def test_a_torch_without_the_function_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_internals, "_WRITES", ("renamed",))
    with pytest.raises(TorchChangedError, match="has none of renamed"), torch_internals.pdl_understood():
        pass


def test_every_kernel_has_the_constant() -> None:
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    found = []
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.startswith(kernels.KERNEL_PREFIX) and isinstance(value, JITFunction):
                constants = [parameter.name for parameter in value.params if parameter.is_constexpr]
                found.append((name, kernels.PDL_CONSTEXPR in constants))
    assert len(found) > 20
    assert [name for name, there in found if not there] == []


# ---- torch.export and Inductor ---------------------------------------------------------------------------------------


class Twice(torch.nn.Module):
    """x (B, 2) + x."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x


def sizes_of(run: torch.nn.Module, *inputs: Tensor, **dims: Any) -> torch.Size:
    """The traced shape of an exported program's first input."""
    program = export(run, inputs, strict=False, **dims)
    return program.graph.find_nodes(op="placeholder")[0].meta["val"].shape


def test_symbolic_sizes_begin_at_one() -> None:
    batch = {"dynamic_shapes": ({0: Dim("B", min=1, max=8)},)}
    with torch_internals.symbolic_sizes():
        size, _ = sizes_of(Twice(), torch.ones(1, 2), **batch)
    assert isinstance(size, torch.SymInt)
    assert torch_internals.symbol_bounds(size) == (1, 8)
    assert torch_internals.size_expression(size) == torch_internals.size_symbol(size)
    assert not torch_internals.is_found_in_values(size)
    with pytest.raises(Exception, match="specialized"):  # else the setting is needed no more
        sizes_of(Twice(), torch.ones(1, 2), **batch)


def test_sizes_found_in_values_are_known() -> None:
    class Ones(torch.nn.Module):
        def forward(self, count: Tensor) -> Tensor:
            n = count.item()
            torch._check(n >= 3)
            torch._check(n <= 9)
            return torch.ones(n)

    with torch_internals.symbolic_sizes():
        program = export(Ones(), (torch.tensor(4),), strict=False)
    (size,) = program.graph.output_node().args[0][0].meta["val"].shape  # type: ignore[index,union-attr]
    assert torch_internals.is_found_in_values(size)
    assert torch_internals.symbol_bounds(size) == (3, 9)


needs_index_caches = pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="Inductor of torch 2.11 does not remember indices"
)


@needs_index_caches
def test_inductor_forgets_indices_unless_its_caches_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.sizevars as sizevars

    names = INDEX_FUNCTIONS
    for name in names:
        original = getattr(sizevars, name).__wrapped__
        monkeypatch.setattr(sizevars, name, functools.lru_cache(original))
    assert getattr(sizevars, names[0]).cache_info().maxsize == 128
    torch_internals.widen_inductor_caches()
    widened = [getattr(sizevars, name) for name in names]
    assert [cached.cache_info().maxsize for cached in widened] == [None, None]
    torch_internals.widen_inductor_caches()
    assert [getattr(sizevars, name) for name in names] == widened  # with what they remember


@needs_index_caches
def test_inductor_remembers_128_by_itself() -> None:
    """Else `widen_inductor_caches` is needed no more."""
    check = (
        "import torch._inductor.sizevars as s; "
        "assert s.stride_at.cache_info().maxsize == s.simplify_index_in_vec_range.cache_info().maxsize == 128"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a compiled program, twice.so, and the package of it, model.pt2."""
    folder = tmp_path_factory.mktemp("compiled")
    batch = Dim("B", min=1, max=8)
    with torch_internals.symbolic_sizes():
        module = export(Twice(), (torch.ones(3, 2),), dynamic_shapes=({0: batch},), strict=False).module()
    options = {"aot_inductor.package": True, "aot_inductor.output_path": str(folder / "out")}
    files = torch_internals.compile_graph(module, (torch.ones(3, 2),), options)
    kept = [file for file in files if not file.endswith((".cpp", ".h", ".hpp"))]
    stand_ins = torch_internals.stand_in_sources(files)
    assert all("compiled" in Path(path).read_text() for path in stand_ins)
    torch_internals.package_programs(folder / "model.pt2", {"twice": kept + stand_ins})
    (library,) = [file for file in files if file.endswith(".so")]
    shutil.copyfile(library, folder / "twice.so")
    return folder


def packaged(folder: Path) -> Callable[..., Any]:
    """The program of the package, as a user may load it."""
    from torch._inductor.package import load_package

    run = load_package(str(folder / "model.pt2"), "twice")
    return lambda inputs: [run(*inputs)]


CPU = torch.device("cpu")
LOADERS = {
    "library": lambda folder: torch_internals.load_library(folder / "twice.so", CPU),
    "C functions": lambda folder: torch_internals.CapturableProgram(folder / "twice.so", CPU),
    "package": packaged,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_compiled_program_is_loaded_and_run(compiled: Path, loader: str) -> None:
    run = LOADERS[loader](compiled)
    for rows in (1, 3):
        (result,) = run([torch.ones(rows, 2)])
        assert torch.equal(result, torch.full((rows, 2), 2.0))


@pytest.mark.parametrize("kind", ["library", "C functions"])
def test_a_new_library_under_an_old_name_is_loaded(compiled: Path, tmp_path: Path, kind: str) -> None:
    """Else a process that opens a bundle again after an export has replaced it runs the old programs."""
    folder = tmp_path / "bundle"
    for name in ("first", "second"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copyfile(compiled / "twice.so", folder / "twice.so")
        LOADERS[kind](folder)
        mapped = [line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
        assert str((folder / "twice.so").stat().st_ino) in mapped, name


def test_a_program_refuses_what_it_does_not_take(compiled: Path, tmp_path: Path) -> None:
    run = torch_internals.CapturableProgram(compiled / "twice.so", CPU)
    with pytest.raises(ValueError, match=r"twice\.so takes 1 tensors, 2 given"):
        run([torch.ones(1, 2)] * 2)
    (tmp_path / "no.so").write_bytes(b"no library")
    with pytest.raises(OSError, match=r"too short|invalid ELF"):
        torch_internals.CapturableProgram(tmp_path / "no.so", CPU)


def test_capture_needs_the_c_functions() -> None:
    """Else torch's own class for CUDA can be used in the place of `CapturableProgram`."""
    stub = Path(torch._C.__file__).parent / "_C" / "_aoti.pyi"
    cuda = stub.read_text().split("class AOTIModelContainerRunnerCuda")[1].split("class ")[0]
    assert "cubin_dir" in cuda
    assert "single_threaded" not in cuda


def test_the_doctor_finds_inductors_compiler() -> None:
    """`doctor/probes.py` cannot import the package's modules."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    assert get_cpp_compiler()


# ---- one place -------------------------------------------------------------------------------------------------------

DOCUMENTED = re.compile(
    r"torch\.(_check|_foreach_\w+|__version__)|torch\._inductor\.(aoti_compile_and_package|aoti_load_package)"
    r"|torch\._dynamo\.(mark_dynamic|maybe_mark_dynamic)"
)
PRIVATE = re.compile(
    r"(torch|triton)(\.\w+)*\._\w+|torch\.fx\.experimental\b.*|triton\.(knobs|runtime|compiler|backends)\b.*"
)
ELSEWHERE = {
    "exporters/torch_internals.py",
    "model/blocking.py",
    "model/compile_time.py",
    "model/kernels/launch.py",
    "model/transformers_api/compiling.py",
    "megalodon_export/doctor/probes.py",
}


def dotted(node: ast.AST) -> str:
    """`torch._inductor.config` of such an expression; empty for others."""
    if isinstance(node, ast.Attribute):
        return f"{inner}.{node.attr}" if (inner := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def private_names(source: str) -> set[str]:
    names: set[str] = set()
    tree = ast.parse(source)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{one.name}" for one in node.names}
        elif id(node) not in inner:  # of a.b.c the whole
            names.add(dotted(node))
    return {name for name in names if PRIVATE.fullmatch(name) and not DOCUMENTED.fullmatch(name)}


def test_private_interfaces_are_used_in_one_module() -> None:
    found = {}
    for folder in ("model", "exporters", "megalodon_export", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if names := private_names(path.read_text()):
                found[path.relative_to(ROOT).as_posix()] = sorted(names)
    assert {path: names for path, names in found.items() if path not in ELSEWHERE} == {}


def test_the_module_imports_neither_inductor_nor_dynamo() -> None:
    name = torch_internals.__name__
    check = (
        f"import sys, torch; before = set(sys.modules); import {name}; "
        "print([m for m in ('torch._inductor', 'torch._dynamo') if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"import {megalodon_export.__name__}: {done.stdout}"
