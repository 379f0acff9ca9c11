// How a tokenizer is refused that this library cannot read exactly as Python does.
#pragma once

#include <stdexcept>
#include <string>

namespace megalodon::impl {

// What is not supported, by name, e.g. "the normalizer BertNormalizer".
class NotSupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace megalodon::impl
