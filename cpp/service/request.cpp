#include "request.hpp"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

namespace service {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 8;

Refused bad(const std::string& why) { return {400, why}; }

std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 77) + "...";
}

json parse_json(std::string_view body) {
  const auto check_depth = [](int depth, json::parse_event_t, json&) {
    if (depth > kMaxDepth) throw bad("the body is nested too deep, expected a flat JSON object");
    return true;
  };
  json parsed;
  try {
    parsed = json::parse(body, check_depth);
  } catch (const json::exception& error) {
    std::string why = error.what();
    std::ranges::replace_if(
        why, [](char c) { return c < ' ' || c > '~'; }, '?');  // the parser quotes the bytes that it cannot read
    throw bad("the body is not JSON: " + why.substr(0, 300));
  }
  if (!parsed.is_object()) throw bad("the body is " + std::string(parsed.type_name()) + ", expected a JSON object");
  return parsed;
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
  void read(const std::string& name, std::uint64_t& value) {
    read_if(name, "a whole number in 0..2^64-1", value, [](const json& found) { return found.is_number_unsigned(); });
  }
  void read(const std::string& name, std::int64_t& value) {
    read_if(name, "a whole number", value, [](const json& found) {
      return found.is_number_integer() && (!found.is_number_unsigned() || found <= INT64_MAX);
    });
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
  for (const json& id : *prompt) {
    if (!id.is_number_unsigned() || id > INT64_MAX) {
      throw bad("the prompt has " + shown(id) + " among its token ids, expected whole numbers");
    }
    request.token_ids.push_back(id);
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
  fields.read("max_tokens", request.max_tokens);
  fields.read("temperature", request.sampling.temperature);
  fields.read("top_p", request.sampling.top_p);
  fields.read("top_k", request.sampling.top_k);
  fields.read("min_p", request.sampling.min_p);
  fields.read("seed", request.sampling.seed);
  fields.read("stream", request.stream);
  fields.read("ignore_eos", request.ignore_eos);
  const std::map<std::string, json> neutral{{"n", 1},
                                            {"best_of", 1},
                                            {"echo", false},
                                            {"suffix", ""},
                                            {"logprobs", nullptr},
                                            {"logit_bias", json::object()},
                                            {"presence_penalty", 0},
                                            {"frequency_penalty", 0}};
  for (const auto& [name, value] : neutral) fields.require_neutral(name, value);
  fields.require_no_others();
  if (request.max_tokens < 1 || request.max_tokens > limits.new_tokens) {
    throw bad("max_tokens is " + std::to_string(request.max_tokens) + ", expected 1.." +
              std::to_string(limits.new_tokens));
  }
  try {
    megalodon::sample({0.0F}, request.sampling, 0);  // throws for values out of range
  } catch (const megalodon::Error& error) {
    throw bad(error.what());
  }
  return request;
}

}  // namespace service
