// How a tokenizer is refused that this library cannot read exactly as Python does.
#pragma once

#include <stdexcept>
#include <string>

namespace megalodon::impl {

// A part of a tokenizer that is not supported. The message is its name, e.g. "the normalizer BertNormalizer".
class NotSupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace megalodon::impl
