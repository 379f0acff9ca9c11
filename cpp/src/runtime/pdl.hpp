// Programmatic dependent launch (PDL) in captured CUDA graphs: a kernel may start while the one before it still runs.
#pragma once

#include <cuda.h>

namespace megalodon::impl {

// Replaces plain edges between two kernels by programmatic ones, in a graph that is not instantiated yet.
//
// A captured graph of AOTInductor programs has plain edges only: a kernel starts when the one before it has ended. The
// model's own kernels, whose names begin with `megalodon_`, load their weights first. They execute
// `griddepcontrol.wait` before they read what the kernel before them wrote, so an edge into such a kernel may be
// programmatic. Other kernels do not wait, and edges into them stay plain. Changes nothing on GPUs before Hopper
// (sm_90), and nothing with drivers that lack programmatic edges.
void enable_pdl(CUgraph graph);

}  // namespace megalodon::impl
