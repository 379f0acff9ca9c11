#include "request.hpp"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

namespace service {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 8;

Refused bad(const std::string& why) { return {400, why}; }

std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 77) + "...";
}

// The first byte of the character at which text that is UTF-8 before the byte number `at` ceases to be UTF-8.
std::size_t first_byte(std::string_view text, std::size_t at) {
  for (std::size_t back = 1; back <= std::min<std::size_t>(at, 3); ++back) {
    const auto byte = static_cast<unsigned char>(text[at - back]);
    const std::size_t length = byte < 0xC0 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
    if (length > back) return at - back;
    if (byte < 0x80 || byte >= 0xC0) break;
  }
  return at;
}

// Refuses two fields of one name: of two prompts, a reader may take either.
json parse_json(std::string_view body) {
  std::vector<std::set<std::string>> names;  // of the objects around the present value
  const auto check = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > kMaxDepth) throw bad("the body is nested too deep, expected a flat JSON object");
    if (event == json::parse_event_t::object_start) names.emplace_back();
    if (event == json::parse_event_t::object_end) names.pop_back();
    if (event == json::parse_event_t::key && !names.back().insert(value).second) {
      throw bad("the field " + shown(value) + " is there twice; send it once");
    }
    return true;
  };
  json parsed;
  try {
    parsed = json::parse(body, check);
  } catch (const json::parse_error& error) {
    std::string why = error.what();
    if (why.find("ill-formed UTF-8") != why.npos) {
      throw bad("the body is not UTF-8 at byte " + std::to_string(first_byte(body, error.byte - 1)));
    }
    std::ranges::replace_if(
        why, [](char c) { return c < ' ' || c > '~'; }, '?');  // the parser quotes the bytes that it cannot read
    throw bad("the body is not JSON: " + why.substr(0, 300));
  } catch (const json::exception& error) {
    throw bad(std::string("the body is not JSON: ") + error.what());  // a number that no double holds
  }
  if (!parsed.is_object()) throw bad("the body is " + std::string(parsed.type_name()) + ", expected a JSON object");
  return parsed;
}

// A whole number in low..high. JSON has unsigned numbers, signed ones and others, and only these comparisons keep their
// signs.
template <typename Whole>
Whole whole(const json& found, const std::string& name, Whole low, Whole high) {
  const auto is_within = [&](auto number) { return !std::cmp_less(number, low) && !std::cmp_greater(number, high); };
  const bool good = found.is_number_unsigned()  ? is_within(found.get<std::uint64_t>())
                    : found.is_number_integer() ? is_within(found.get<std::int64_t>())
                                                : false;
  if (good) return found.get<Whole>();
  throw bad(name + " is " + shown(found) + ", expected a whole number in " + std::to_string(low) + ".." +
            std::to_string(high));
}

// The fields of a body. A field that no call has looked for is unknown.
class Fields {
 public:
  explicit Fields(const json& body) : body_(body) {}

  const json* find(const std::string& name) {
    looked_for_.insert(name);
    const auto found = body_.find(name);
    return found == body_.end() || found->is_null() ? nullptr : &*found;
  }

  void read(const std::string& name, double& value) {
    read_if(name, "a number", value, [](const json& found) { return found.is_number(); });
  }
  void read(const std::string& name, bool& value) {
    read_if(name, "true or false", value, [](const json& found) { return found.is_boolean(); });
  }
  void read(const std::string& name, std::string& value) {
    read_if(name, "a string", value, [](const json& found) { return found.is_string(); });
  }
  template <typename Whole>
  void read(const std::string& name, Whole& value, Whole low, Whole high) {
    if (const json* found = find(name)) value = whole(*found, name, low, high);
  }

  // A field that the service does not support may be sent with the value that changes nothing.
  void require_neutral(const std::string& name, const json& neutral) {
    const json* found = find(name);
    if (found == nullptr || *found == neutral) return;
    throw bad(name + " is " + shown(*found) + ", which is not supported, expected " + shown(neutral) + " or none");
  }

  void require_no_others() const {
    for (const auto& [name, value] : body_.items()) {
      if (!looked_for_.contains(name)) throw bad("the field " + shown(name) + " is unknown; remove it");
    }
  }

 private:
  template <typename Value, typename Check>
  void read_if(const std::string& name, const std::string& expected, Value& value, Check check) {
    const json* found = find(name);
    if (found == nullptr) return;
    if (!check(*found)) throw bad(name + " is " + shown(*found) + ", expected " + expected);
    value = found->get<Value>();
  }

  const json& body_;
  std::set<std::string> looked_for_;
};

void read_prompt(Fields& fields, const Limits& limits, CompletionRequest& request) {
  const json* prompt = fields.find("prompt");
  if (prompt == nullptr) throw bad("there is no prompt, expected a string or a list of token ids");
  if (prompt->is_string()) {
    request.is_text = true;
    request.text = *prompt;
    return;
  }
  if (!prompt->is_array()) throw bad("prompt is " + shown(*prompt) + ", expected a string or a list of token ids");
  if (prompt->size() > limits.prompt_tokens) throw too_long(prompt->size(), limits.prompt_tokens);
  for (std::size_t i = 0; i < prompt->size(); ++i) {
    const std::string name = "prompt[" + std::to_string(i) + "]";
    request.token_ids.push_back(whole<std::int64_t>((*prompt)[i], name, 0, limits.vocab_size - 1));
  }
}

void read_stop(Fields& fields, const Limits& limits, CompletionRequest& request) {
  const json* stop = fields.find("stop");
  if (stop == nullptr) return;
  const json list = stop->is_array() ? *stop : json::array({*stop});
  if (list.size() > limits.stop_strings) {
    throw bad("there are " + std::to_string(list.size()) + " stop strings, expected at most " +
              std::to_string(limits.stop_strings));
  }
  for (const json& one : list) {
    const auto* text = one.get_ptr<const std::string*>();
    if (text == nullptr || text->empty() || text->size() > limits.stop_bytes || text->find('\0') != text->npos) {
      throw bad("stop has " + shown(one) + ", expected strings of 1.." + std::to_string(limits.stop_bytes) +
                " bytes without a zero");
    }
    request.stop.push_back(*text);
  }
}

}  // namespace

Refused too_long(std::size_t found, std::size_t most) {
  return {413, "the prompt has " + std::to_string(found) + " tokens, expected at most " + std::to_string(most)};
}

CompletionRequest parse_request(std::string_view body, const Limits& limits, std::uint64_t seed) {
  const json parsed = parse_json(body);
  Fields fields(parsed);
  CompletionRequest request;
  request.sampling.seed = seed;
  std::string user;
  fields.read("model", request.model);
  fields.read("user", user);  // accepted and ignored
  read_prompt(fields, limits, request);
  read_stop(fields, limits, request);
  fields.read<std::int64_t>("max_tokens", request.max_tokens, 1, limits.new_tokens);
  fields.read("temperature", request.sampling.temperature);
  fields.read("top_p", request.sampling.top_p);
  fields.read<std::int64_t>("top_k", request.sampling.top_k, 0, INT64_MAX);
  fields.read("min_p", request.sampling.min_p);
  fields.read<std::uint64_t>("seed", request.sampling.seed, 0, UINT64_MAX);
  fields.read("stream", request.stream);
  fields.read("ignore_eos", request.ignore_eos);
  const std::map<std::string, json> neutral{{"n", 1},
                                            {"best_of", 1},
                                            {"echo", false},
                                            {"suffix", ""},
                                            {"logprobs", nullptr},
                                            {"logit_bias", json::object()},
                                            {"stream_options", nullptr},
                                            {"presence_penalty", 0},
                                            {"frequency_penalty", 0}};
  for (const auto& [name, value] : neutral) fields.require_neutral(name, value);
  fields.require_no_others();
  try {
    megalodon::sample({0.0F}, request.sampling, 0);  // throws for values out of range
  } catch (const megalodon::Error& error) {
    throw bad(error.what());
  }
  return request;
}

}  // namespace service
