// Errors inside the library. The C ABI turns them into status codes and messages.
#pragma once

#include <stdexcept>
#include <string>

#include "megalodon.h"

namespace megalodon::impl {

// A text whose control characters are escaped, but for ends of lines; see `shown` in python_format.hpp.
std::string shown_lines(const std::string& text);

// The message says what was wrong, what was expected and what to do. A C caller gets `code` as the status.
// It may hold names of files and texts of a caller, so control characters, which a terminal would obey, are escaped.
class Error : public std::runtime_error {
 public:
  Error(megalodon_status code, const std::string& message) : std::runtime_error(shown_lines(message)), code(code) {}
  const megalodon_status code;
};

inline Error invalid(const std::string& message) { return {MEGALODON_INVALID_ARGUMENT, message}; }
inline Error bad_bundle(const std::string& message) { return {MEGALODON_BAD_BUNDLE, message}; }
// Two files of a bundle contradict each other.
inline Error inconsistent(const std::string& message) { return bad_bundle(message + "; export the bundle again"); }
inline Error unavailable(const std::string& message) { return {MEGALODON_UNAVAILABLE, message}; }
inline Error io_error(const std::string& message) { return {MEGALODON_IO, message}; }

// The end of messages about programs that were compiled for another machine.
inline constexpr const char* kExportAgain = "; export it again on this machine: megalodon-export aoti";

// Throws MEGALODON_INVALID_ARGUMENT unless `condition` holds. Callers check before they change anything, so the session
// stays as it was. Python raises ValueError for the same mistakes.
inline void require(bool condition, const std::string& message) {
  if (!condition) throw invalid(message);
}

}  // namespace megalodon::impl
