#include "bundle/json.hpp"

#include <algorithm>

#include "error.hpp"

namespace megalodon::impl {

namespace {

constexpr int kMaxDepth = 900;

}  // namespace

using nlohmann::json;

json parse_json(std::string_view text, const std::filesystem::path& path) {
  const auto unreadable = [&](std::string why) {
    // The parser quotes the bytes that it cannot read, and a message must be text.
    std::ranges::replace_if(why, [](char c) { return c < ' ' || c > '~'; }, '?');
    return bad_bundle(path.string() + ": a JSON object expected, found something unreadable (" + why + "). " +
                      kCopyAgain);
  };
  const json::parser_callback_t check_depth = [&](int depth, json::parse_event_t, json&) {
    if (depth > kMaxDepth) throw unreadable("nested too deep");
    return true;
  };
  try {
    return json::parse(text, check_depth);
  } catch (const json::exception& error) {
    throw unreadable(error.what());
  }
}

}  // namespace megalodon::impl
