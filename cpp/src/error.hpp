// Errors inside the library; the C ABI turns them into codes and messages.
#pragma once

#include <stdexcept>
#include <string>

#include "megalodon.h"

namespace megalodon::impl {

// What was wrong, what was expected and what to do, with the code that a C caller gets.
class Error : public std::runtime_error {
 public:
  Error(megalodon_status code, const std::string& message) : std::runtime_error(message), code(code) {}
  const megalodon_status code;
};

inline Error invalid(const std::string& message) { return {MEGALODON_INVALID_ARGUMENT, message}; }
inline Error bad_bundle(const std::string& message) { return {MEGALODON_BAD_BUNDLE, message}; }
// Files of a bundle that disagree.
inline Error inconsistent(const std::string& message) { return bad_bundle(message + "; export the bundle again"); }
inline Error unavailable(const std::string& message) { return {MEGALODON_UNAVAILABLE, message}; }
inline Error io_error(const std::string& message) { return {MEGALODON_IO, message}; }

// One that Python raises as a ValueError: refused before anything ran, the session is as it was.
inline void require(bool condition, const std::string& message) {
  if (!condition) throw invalid(message);
}

}  // namespace megalodon::impl
