// Why an operation cannot run, in one sentence. ONNX Runtime shows it as the error of the session or of the run.
#pragma once

#include <stdexcept>

namespace megalodon {

struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace megalodon
