// Programmatic dependent launch in captured CUDA graphs.
#pragma once

#include <cuda.h>

namespace megalodon::impl {

// Lets a kernel begin while the one before it still runs, in a graph that is not instantiated yet, as
// megalodon_export/runtimes/programmatic.py does and says why. Leaves it as it is where the driver or the GPU has no
// such edges.
void overlap_kernels(CUgraph graph);

}  // namespace megalodon::impl
