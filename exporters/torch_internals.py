"""Private interfaces of torch, Inductor and Triton: every one that the exporters and runtimes use, in one module.

Each function says what breaks without it. `tests/exporters/test_torch_internals.py` tests each against the installed
torch, and fails where a new version has changed one. Importing this module imports neither Inductor nor Dynamo.

Three places cannot import this module, and have theirs under the same kind of comment: `model/blocking.py`
(`known`), `model/kernels/launch.py` (Triton's settings), and `doctor/probes.py`, which has to run where the
package cannot be imported. Structures of the CUDA driver are in `runtimes/cuda_driver.py`.
Names that torch documents in spite of their underscore, such as `torch._check`, may be used anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt, Tensor

# The pytree functions of torch.export: an exported program's structure of outputs is one of their TreeSpecs.
from torch.utils._pytree import tree_any, tree_map, tree_unflatten

from ..model.kernels import KERNEL_PREFIX, PDL_CONSTEXPR

if TYPE_CHECKING:  # sympy takes a third of a second to import, which whoever opens a bundle would wait for
    import sympy
    from torch import fx

__all__ = ["tree_any", "tree_map", "tree_unflatten"]


class TorchChangedError(RuntimeError):
    """A private interface of torch is not what this package was written for. The message names it."""


# ---- torch.export ----------------------------------------------------------------------------------------------------


def sizes_from_one() -> AbstractContextManager[None]:
    """Trace with a batch of 1 and a length of one block in range.

    Without it, torch takes sizes of 0 and 1 for constants (0/1 specialisation), and a program refuses a batch of 1.
    """
    import torch.fx.experimental._config as fx_config

    patch: AbstractContextManager[None] = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patch


@contextmanager
def symbolic_sizes() -> Iterator[None]:
    """Export and compile with `sizes_from_one`, and without torch's cache of fake tensors.

    With that cache, export takes longer: where sizes are symbols, computing its keys costs more than it saves.
    """
    import torch._dynamo.config as dynamo_config

    with sizes_from_one(), dynamo_config.patch(fake_tensor_cache_enabled=False):  # type: ignore[attr-defined]
        yield


def size_expression(size: SymInt) -> sympy.Expr:
    """A traced size in terms of the sizes that torch does not know. Without it, a stage's sizes cannot be declared."""
    return size.node.expr


def size_symbol(size: SymInt) -> sympy.Symbol:
    """The one symbol of a traced size; ValueError if it has several."""
    (symbol,) = size_expression(size).free_symbols
    return symbol


def symbol_bounds(size: SymInt) -> tuple[int, int]:
    """The least and the largest value of a traced size's symbol. Without it, a table of such a size has no length."""
    bounds = size.node.shape_env.bound_sympy(size_symbol(size))
    return int(bounds.lower), int(bounds.upper)


def is_found_in_values(size: SymInt) -> bool:
    """Whether a program reads the size from a tensor's values ("unbacked"), so that no input has it as a dimension."""
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

    return bool(has_free_unbacked_symbols(size))


# ---- Inductor --------------------------------------------------------------------------------------------------------


def compile_graph(graph: fx.GraphModule, examples: tuple[Tensor, ...], options: dict[str, Any]) -> list[str]:
    """Compile a graph with AOTInductor; the paths of the files that it made.

    `torch._inductor.aoti_compile_and_package`, the public function, takes exported programs alone, and puts each into a
    package of its own.
    """
    from torch._inductor import aot_compile

    widen_inductor_caches()
    with torch.no_grad(), symbolic_sizes(), pdl_understood():
        files = aot_compile(graph, examples, options=options)
    return [str(file) for file in files]  # type: ignore[union-attr]


# Functions of torch._inductor.sizevars that remember their last 128 results, from torch 2.12 on.
INDEX_CACHES = ("stride_at", "simplify_index_in_vec_range")


def widen_inductor_caches() -> None:
    """Let Inductor remember every simplified index and stride, where it has caches of them (torch 2.11 has none).

    By itself it remembers 128. A prefill has hundreds, so that each is forgotten before it is needed again, and
    compilation takes several times as long.
    """
    import torch._inductor.sizevars as sizevars

    for name in INDEX_CACHES:
        cached = getattr(sizevars, name, None)
        if cached is not None and cached.cache_info().maxsize is not None:
            setattr(sizevars, name, functools.cache(cached.__wrapped__))


# The function that finds the tensors a kernel writes: in torch 2.11, and later.
_WRITES = ("identify_mutated_tensors", "identify_accessed_tensors")


@contextmanager
def pdl_understood() -> Iterator[None]:
    """Let torch see which tensors this package's kernels write.

    torch reads a kernel's code for that, and gives up at the instructions of programmatic dependent launch (PDL), which
    are inline assembly in the Triton that torch 2.11 comes with. It then takes all of the kernel's tensors as written,
    and Inductor copies each of them before the kernel: every weight at every step. The kernel without PDL writes the
    same tensors, so torch is shown that one.

    TorchChangedError if torch has no such function, if a kernel has no constant of that name, or if torch still takes
    all tensors of a kernel as written.
    """
    import torch._higher_order_ops.triton_kernel_wrap as wrap

    originals = {name: getattr(wrap, name) for name in _WRITES if hasattr(wrap, name)}
    if not originals:
        raise TorchChangedError(f"{wrap.__name__} has none of {', '.join(_WRITES)}: Inductor would copy every weight")
    for name, original in originals.items():
        setattr(wrap, name, functools.partial(_writes_without_pdl, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(wrap, name, original)


def _writes_without_pdl(original: Callable[..., Any], kernel: Any, kwargs: dict[str, Any], *others: Any) -> Any:
    """The result of `original` for the kernel without PDL."""
    name = kernel_name(kernel)
    if not name.startswith(KERNEL_PREFIX):
        return original(kernel, kwargs, *others)
    if PDL_CONSTEXPR not in kwargs:
        raise TorchChangedError(
            f"the kernel {name} has no constant {PDL_CONSTEXPR}, so torch cannot be shown its code without PDL"
        )
    found = original(kernel, {**kwargs, PDL_CONSTEXPR: False}, *others)
    tensors = {argument for argument, value in kwargs.items() if _is_tensor(value)}
    if len(tensors) > 1 and tensors <= set(written_tensors(found)):
        raise TorchChangedError(
            f"torch takes all tensors of the kernel {name} as written ({', '.join(sorted(tensors))}): Inductor would "
            "copy them at every call. The warning above says why it did not understand the kernel"
        )
    return found


def kernel_name(kernel: Any) -> str:
    """The name of a Triton function, autotuned or not."""
    while not hasattr(kernel, "__name__"):
        kernel = kernel.fn
    return str(kernel.__name__)


def written_tensors(found: Any) -> list[str]:
    """The names in a result of one of the functions _WRITES."""
    return list(found) if isinstance(found, list) else [one.name for one in found.read_writes.writes]


def _is_tensor(value: Any) -> bool:
    """Tensors when a graph is made functional, TensorBoxes when Inductor lowers it."""
    return isinstance(value, Tensor) or type(value).__name__ == "TensorBox"


def stand_in_sources(files: Sequence[str]) -> list[str]:
    """Write an empty file in the place of each program's C++ source; their paths.

    Sources name paths of the build machine, so that they are left out of a package. torch 2.11 finds a program's
    metadata by the name of its source, although it compiles nothing: without the file, the package does not load.
    """
    suffix = "_metadata.json"
    sources = [Path(file.removesuffix(suffix) + ".cpp") for file in files if file.endswith(suffix)]
    for source in sources:
        source.write_text("// compiled: the library is beside this file\n")
    return [str(source) for source in sources]


def package_programs(path: Path, files: Mapping[str, Sequence[str]]) -> None:
    """Write one .pt2 of several compiled programs, by name. The public function packs one exported program alone."""
    from torch.export.pt2_archive._package import package_pt2

    package_pt2(str(path), aoti_files={name: list(paths) for name, paths in files.items()})


def load_program(path: Path, name: str, device_index: int = -1) -> Callable[[list[Tensor]], list[Tensor]]:
    """One program of a package, as a function of its inputs. `device_index` -1: the current device.

    `torch._inductor.aoti_load_package`, the public function, flattens and checks its arguments in Python at every call.
    Single-threaded, which capture in a CUDA graph requires: no two calls may run at a time.
    """
    from torch._C._aoti import AOTIModelPackageLoader

    run: Callable[[list[Tensor]], list[Tensor]] = AOTIModelPackageLoader(str(path), name, True, 1, device_index).run
    return run
