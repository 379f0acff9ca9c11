"""Private interfaces of torch, Inductor and Triton: every one that the exporters and runtimes use, in one module.

Each function says what breaks without it. `tests/exporters/test_torch_internals.py` tests each against the installed
torch, and fails where a new version has changed one. Importing this module imports neither Inductor nor Dynamo.

Six places cannot import this module, and have theirs under the same kind of comment: `model/blocking.py` (`known`),
`model/compiled.py` (sizes that vary), `model/compile_time.py`, `model/transformers_api/compiling.py`,
`model/kernels/launch.py` (Triton's settings), and `doctor/probes.py`, which has to run where the package cannot be
imported. Structures of the CUDA driver are in
`runtimes/cuda_driver.py`.
Names that torch documents in spite of their underscore, such as `torch._check`, may be used anywhere.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt, Tensor

# The pytree functions of torch.export: an exported program's structure of outputs is one of their TreeSpecs.
from torch.utils._pytree import tree_any, tree_map, tree_unflatten

from ..model.compile_time import INDEX_FUNCTIONS, quick_compilation
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


# ---- Triton ----------------------------------------------------------------------------------------------------------


def triton_version() -> str:
    """The version of the installed Triton."""
    import triton

    return str(triton.__version__)


def compile_triton(
    function: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Sequence[str],
    capability: int,
    options: Mapping[str, Any],
) -> tuple[Any, bytes, str]:
    """Compile a @triton.jit function for a GPU that need not be here: metadata, machine code and PTX.

    `types` of all parameters, "constexpr" for those in `constants`; `aligned` are multiples of 16; `capability` is 90
    for sm_90. Triton's own launcher compiles for the GPU that is there alone.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    place = {name: (index,) for index, name in enumerate(types)}
    source = ASTSource(
        function,
        dict(types),
        {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    return compiled.metadata, compiled.asm["cubin"], compiled.asm["ptx"]


# ---- operators -------------------------------------------------------------------------------------------------------


def operator_function(target: Any) -> Callable[..., Any]:
    """The Python function behind an operator made by `torch.library.triton_op`.

    Without it, the launches of an operator could not be recorded: calling the operator itself hands its function other
    tensor objects than the caller's.
    """
    from torch._library.custom_ops import OPDEFS

    function: Callable[..., Any] = OPDEFS[target._schema.name]._init_fn
    return function


def operators(namespace: str) -> list[Any]:
    """The operators of a namespace that are made by `torch.library.triton_op` or `custom_op`, as graphs call them."""
    from torch._library.custom_ops import OPDEFS

    return [one._opoverload for name, one in sorted(OPDEFS.items()) if name.startswith(f"{namespace}::")]


def argument_names(target: Any) -> list[str]:
    """The names of an operator's arguments, in order."""
    return [one.name for one in target._schema.arguments]


def written_arguments(target: Any) -> set[str]:
    """The names of an operator's arguments that it changes in place."""
    return {one.name for one in target._schema.arguments if one.alias_info is not None and one.alias_info.is_write}


# ---- Inductor --------------------------------------------------------------------------------------------------------


def compile_graph(graph: fx.GraphModule, examples: tuple[Tensor, ...], options: dict[str, Any]) -> list[str]:
    """Compile a graph with AOTInductor; the paths of the files that it made.

    `torch._inductor.aoti_compile_and_package`, the public function, takes exported programs alone, and puts each into a
    package of its own.
    """
    from torch._inductor import aot_compile

    widen_inductor_caches()
    with torch.no_grad(), sizes_from_one(), quick_compilation(), pdl_understood():
        files = aot_compile(graph, examples, options=options)
    return [str(file) for file in files]  # type: ignore[union-attr]


# INDEX_FUNCTIONS are in torch._inductor.sizevars from torch 2.12 on, and remember their last 128 results.


def widen_inductor_caches() -> None:
    """Let Inductor remember every simplified index and stride, where it has caches of them (torch 2.11 has none).

    By itself it remembers 128. A prefill has hundreds, so that each is forgotten before it is needed again, and
    compilation takes several times as long.
    """
    import torch._inductor.sizevars as sizevars

    for name in INDEX_FUNCTIONS:
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


# ---- Compiled programs -----------------------------------------------------------------------------------------------

Program = Callable[[list[Tensor]], list[Tensor]]


def load_library(path: Path, device: torch.device) -> Program:
    """One compiled program, loaded from its library, as a function of its inputs. On CUDA it can be captured.

    `torch._inductor.aoti_load_package`, the public function, copies a package's libraries to the temporary folder for
    as long as they are used, and flattens and checks the arguments in Python at every call.
    No two calls of a program may run at a time. None do: both kinds of program keep Python's global lock.
    """
    if device.type != "cpu":
        return CapturableProgram(path, device)
    from torch._C._aoti import AOTIModelContainerRunnerCpu

    run: Program = AOTIModelContainerRunnerCpu(spelled_for_loader(path), 1).run  # type: ignore[arg-type]
    return run


def spelled_for_loader(path: Path) -> bytes:
    """A path of the same library that contains the number of its file: "/." for every binary 1, "/" for every 0.

    glibc takes a library for loaded if it has loaded one of that name, even where another file is now. It never unloads
    the first library that defines a "unique" symbol, and those of Inductor define some. A process that opened a bundle,
    and opens it again after an export has replaced it, would therefore run old programs on new weights.
    """
    number = f"{os.stat(path).st_ino:b}".replace("0", "/").replace("1", "/.")
    return os.fsencode(f"{path.parent}{number}/{path.name}")


class CapturableProgram:
    """A compiled program, called through AOTInductor's C functions as the C++ library calls it.

    `AOTIModelContainerRunnerCuda`, torch's class, queries a CUDA event before a call, which is an error while a CUDA
    graph is captured. Its argument against that is not among those that Python can give.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        from torch._C import _aoti

        self._path, self._device, self._aoti = path, device, _aoti
        # PyDLL keeps Python's global lock during a call.
        self._library = ctypes.PyDLL(spelled_for_loader(path))  # type: ignore[arg-type]
        self._container = ctypes.c_void_p()
        name = device.type if device.index is None else f"{device.type}:{device.index}"
        cubins = os.fsencode(path.parent)
        create = self._library.AOTInductorModelContainerCreateWithDevice
        self._require(create(ctypes.byref(self._container), ctypes.c_size_t(1), name.encode(), cubins))
        weakref.finalize(self, _close, self._library, self._container)
        counts = {}
        for what in ("Inputs", "Outputs"):
            counts[what] = ctypes.c_size_t()
            count = getattr(self._library, f"AOTInductorModelContainerGetNum{what}")
            self._require(count(self._container, ctypes.byref(counts[what])))
        self._inputs, self._outputs = counts["Inputs"].value, counts["Outputs"].value

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run on the current CUDA stream."""
        if len(inputs) != self._inputs:
            raise ValueError(f"{self._path} takes {self._inputs} tensors, {len(inputs)} given")
        # The program takes over the handles of its inputs, and gives away those of its outputs.
        capsules = self._aoti.unsafe_alloc_void_ptrs_from_tensors(inputs)
        handles = (ctypes.c_void_p * self._inputs)(*(_capsule_pointer(capsule, None) for capsule in capsules))
        results = (ctypes.c_void_p * self._outputs)()
        stream = None
        if self._device.type == "cuda":
            stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        sizes = ctypes.c_size_t(self._inputs), ctypes.c_size_t(self._outputs)
        run = self._library.AOTInductorModelContainerRunSingleThreaded
        self._require(run(self._container, handles, sizes[0], results, sizes[1], stream, None))
        return self._aoti.alloc_tensors_by_stealing_from_void_ptrs(
            [_capsule_of(handle, None, None) for handle in results]
        )

    def _require(self, status: int) -> None:
        """RuntimeError with AOTInductor's words, where this torch has them, unless the status is that of success."""
        if status == 0:
            return
        words = ctypes.c_char_p()
        if hasattr(self._library, "AOTInductorGetLastError"):
            self._library.AOTInductorGetLastError(ctypes.byref(words))
        raise RuntimeError(f"{self._path} failed: {(words.value or b'see the lines above').decode(errors='replace')}")


def _close(library: ctypes.CDLL, container: ctypes.c_void_p) -> None:
    library.AOTInductorModelContainerDelete(container)
    _ctypes.dlclose(library._handle)  # ctypes does not unload what it has loaded


_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule_of = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
