# Defines LibTorch::LibTorch, the libraries of a libtorch, and LibTorch::CUDA, its libraries for GPUs, if it has them.
#
# It searches LibTorch_ROOT, CMAKE_PREFIX_PATH (as for find_package(Torch)), and then the torch of the Python in PATH.
# torch's own TorchConfig.cmake would demand a CUDA toolkit if torch was built with CUDA. This library needs none to run
# CPU programs.
set(_hints)
foreach(_prefix IN LISTS CMAKE_PREFIX_PATH)
  if(_prefix MATCHES "^(.*)/share/cmake/?$") # torch.utils.cmake_prefix_path
    list(APPEND _hints ${CMAKE_MATCH_1})
  endif()
endforeach()
if(NOT _hints AND NOT LibTorch_ROOT AND NOT LibTorch_INCLUDE_DIR)
  find_program(LibTorch_PYTHON NAMES python3 python)
  if(LibTorch_PYTHON)
    execute_process(
      COMMAND ${LibTorch_PYTHON} -c
        "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)"
      OUTPUT_VARIABLE _found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    list(APPEND _hints ${_found})
  endif()
endif()

find_path(LibTorch_INCLUDE_DIR torch/csrc/inductor/aoti_torch/c/shim.h HINTS ${_hints} PATH_SUFFIXES include)
find_library(LibTorch_CPU_LIBRARY torch_cpu HINTS ${_hints} PATH_SUFFIXES lib)
get_filename_component(_beside "${LibTorch_CPU_LIBRARY}" DIRECTORY)
find_library(LibTorch_TORCH_LIBRARY torch HINTS ${_beside})
find_library(LibTorch_C10_LIBRARY c10 HINTS ${_beside})
find_library(LibTorch_TORCH_CUDA_LIBRARY torch_cuda HINTS ${_beside})
find_library(LibTorch_C10_CUDA_LIBRARY c10_cuda HINTS ${_beside})
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_CPU_LIBRARY LibTorch_TORCH_LIBRARY LibTorch_C10_LIBRARY LibTorch_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "Install torch for the Python in PATH, or set LibTorch_ROOT to a libtorch.")
mark_as_advanced(LibTorch_INCLUDE_DIR LibTorch_TORCH_LIBRARY LibTorch_CPU_LIBRARY LibTorch_C10_LIBRARY LibTorch_PYTHON
  LibTorch_TORCH_CUDA_LIBRARY LibTorch_C10_CUDA_LIBRARY)

if(LibTorch_FOUND AND NOT TARGET LibTorch::LibTorch)
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  target_include_directories(LibTorch::LibTorch SYSTEM INTERFACE ${LibTorch_INCLUDE_DIR})
  # The library uses nothing of libtorch.so. Compiled programs may need it and have no path to it, so it must be loaded.
  target_link_libraries(LibTorch::LibTorch INTERFACE ${LibTorch_CPU_LIBRARY} ${LibTorch_C10_LIBRARY}
    "-Wl,--push-state,--no-as-needed,${LibTorch_TORCH_LIBRARY},--pop-state")
endif()
if(LibTorch_TORCH_CUDA_LIBRARY AND LibTorch_C10_CUDA_LIBRARY AND NOT TARGET LibTorch::CUDA)
  add_library(LibTorch::CUDA INTERFACE IMPORTED)
  target_link_libraries(LibTorch::CUDA
    INTERFACE ${LibTorch_TORCH_CUDA_LIBRARY} ${LibTorch_C10_CUDA_LIBRARY} LibTorch::LibTorch)
endif()
