// Options of a command line that are numbers within a range. For megalodon-cli and megalodon-service.
#pragma once

#include <CLI/CLI.hpp>
#include <charconv>
#include <iostream>
#include <optional>
#include <string>

namespace cli {

template <typename Number>
std::string shown(Number value) {
  char buffer[64];
  return {buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr};
}

// Refuses what is no number in low..high, e.g. "--port is 70000, expected 0..65535". NaN is in no range. `range`
// replaces "low..high" in messages.
template <typename Number>
CLI::Validator within(const std::string& option, Number low, Number high, std::string range = "") {
  if (range.empty()) range = shown(low) + ".." + shown(high);
  const auto check = [=](const std::string& text) {
    Number found{};
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, found);
    const bool good = error == std::errc() && stop == end && low <= found && found <= high;
    return good ? "" : option + " is " + text + ", expected " + range;
  };
  return {check, range};
}

template <typename Number>
CLI::Option* add_number(CLI::App& app, const std::string& names, Number& value, Number low, Number high,
                        const std::string& description, const std::string& range = "") {
  const auto validator = within(names.substr(0, names.find(',')), low, high, range);
  return app.add_option(names, value, description)->check(validator)->capture_default_str();
}

// Parses the arguments. Returns the exit status if the program ends there: 2 for a mistake in them.
inline std::optional<int> parse(CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
    return std::nullopt;
  } catch (const CLI::ValidationError& error) {
    const std::string message = error.what();  // "--port: --port is ..."
    std::cerr << message.substr(message.find(": ") + 2) << '\n';
    return 2;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
}

}  // namespace cli
