// Programmatic dependent launch (PDL) in captured CUDA graphs: a kernel may start while the one before it still runs.
#pragma once

#include <cuda.h>

namespace megalodon::impl {

// Replaces plain edges between two kernels by programmatic ones, in a graph that is not instantiated yet.
//
// The model's own kernels, by their names `megalodon_*`, load their weights first and then execute
// `griddepcontrol.wait` before they read what the kernel before them wrote. An edge into such a kernel may therefore
// be programmatic. Compiled programs do not launch them that way, and edges into all other kernels must stay plain.
// Changes nothing on GPUs before Hopper (sm_90) and with drivers that have no such edges.
void enable_pdl(CUgraph graph);

}  // namespace megalodon::impl
