#include "metrics.hpp"

#include <unistd.h>

#include <fstream>
#include <sstream>

namespace service {
namespace {

void describe(std::ostream& out, const char* name, const char* type, const char* help) {
  out << "# HELP " << name << ' ' << help << "\n# TYPE " << name << ' ' << type << '\n';
}

template <typename Value>
void write(std::ostream& out, const char* name, const char* type, const char* help, Value value) {
  describe(out, name, type, help);
  out << name << ' ' << value << '\n';
}

std::uint64_t resident_bytes() {
  std::uint64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

std::string Metrics::text() const {
  std::ostringstream out;
  describe(out, "megalodon_requests_total", "counter", "Requests answered, by outcome.");
  for (std::size_t i = 0; i < kOutcomes.size(); ++i) {
    out << "megalodon_requests_total{outcome=\"" << kOutcomes[i] << "\"} " << requests[i] << '\n';
  }
  write(out, "megalodon_sessions", "gauge", "Sessions that exist.", sessions.load());
  write(out, "megalodon_queued_requests", "gauge", "Requests that wait for a session.", queued.load());
  write(out, "megalodon_prompt_tokens_total", "counter", "Tokens of prompts fed.", prompt_tokens.load());
  write(out, "megalodon_generated_tokens_total", "counter", "Tokens generated.", generated_tokens.load());
  write(out, "megalodon_decode_steps_total", "counter", "Decode steps, each for all streams.", decode_steps.load());
  describe(out, "megalodon_first_token_seconds", "summary", "From a request to its first token.");
  out << "megalodon_first_token_seconds_sum " << static_cast<double>(first_token_microseconds) / 1e6 << '\n';
  out << "megalodon_first_token_seconds_count " << first_tokens << '\n';
  write(out, "process_resident_memory_bytes", "gauge", "Resident memory.", resident_bytes());
  return out.str();
}

}  // namespace service
