#include "bundle/json.hpp"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <vector>

#include "error.hpp"
#include "python_format.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxDepth = 100;

struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Goes over a text and throws where nlohmann's parser is more lenient than Python's `parse_json`.
class StrictRules : public nlohmann::json_sax<json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t value) override {
    if (value > INT64_MAX) throw Refused("a whole number beyond 64 bits");
    return true;
  }
  bool number_float(number_float_t, const string_t& digits) override {
    if (digits.find_first_of(".eE") == std::string::npos) throw Refused("a whole number beyond 64 bits");
    return true;
  }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return open(); }
  bool key(string_t& name) override {
    if (!keys_.back().insert(name).second) throw Refused("a key that an object has twice");
    return true;
  }
  bool end_object() override { return close(); }
  bool start_array(std::size_t) override { return open(); }
  bool end_array() override { return close(); }
  bool parse_error(std::size_t, const std::string&, const json::exception& error) override {
    throw Refused(error.what());
  }

 private:
  bool open() {
    keys_.emplace_back();
    if (keys_.size() > kMaxDepth) throw Refused("nested deeper than " + std::to_string(kMaxDepth));
    return true;
  }
  bool close() {
    keys_.pop_back();
    return true;
  }

  std::vector<std::set<std::string>> keys_;  // of every object around the current value
};

}  // namespace

json parse_json(std::string_view text, const std::filesystem::path& path, const char* advice) {
  try {
    if (text.starts_with("\xEF\xBB\xBF")) throw Refused("a byte order mark at its beginning");
    if (text.find('\0') != std::string_view::npos) throw Refused("a zero byte");  // where nlohmann's parser ends
    StrictRules rules;
    json::sax_parse(text, &rules);
    return json::parse(text);
  } catch (const std::runtime_error& error) {
    throw bad_bundle(path.string() + ": a JSON object expected, found something unreadable (" + error.what() + "). " +
                     advice);
  }
}

bool has_control_characters(const json& value) {
  if (value.is_string()) return has_control_characters(value.get_ref<const std::string&>());
  if (!value.is_structured()) return false;
  return std::ranges::any_of(value.items(), [&](const auto& item) {
    return (value.is_object() && has_control_characters(item.key())) || has_control_characters(item.value());
  });
}

}  // namespace megalodon::impl
