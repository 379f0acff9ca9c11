#include "program.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "refusal.hpp"

namespace megalodon {
namespace {

struct Dtype {
  const char* name;
  int onnx;
  size_t bytes;
};
constexpr Dtype kDtypes[] = {{"float32", 1, 4}, {"uint8", 2, 1},    {"int8", 3, 1},     {"int32", 6, 4},
                             {"int64", 7, 8},   {"bool", 9, 1},     {"float16", 10, 2}, {"float64", 11, 8},
                             {"bfloat16", 16, 2}};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> words;
  std::istringstream stream(text);
  for (std::string word; std::getline(stream, word, separator);) {
    if (!word.empty()) words.push_back(word);
  }
  return words;
}

[[noreturn]] void refuse(const std::string& what) {
  throw Refusal("a node's program is none that this library reads: " + what + "; export the bundle again");
}

int64_t whole(const std::string& text) {
  char* end = nullptr;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0') refuse("'" + text + "' is no whole number");
  return value;
}

size_t index_of(const std::string& text) {
  const int64_t value = whole(text);
  if (value < 0) refuse("'" + text + "' is negative");
  return static_cast<size_t>(value);
}

int64_t floor_divide(int64_t a, int64_t b) {
  if (b == 0) refuse("a size is divided by 0");
  const int64_t quotient = a / b;
  return (a % b != 0 && (a < 0) != (b < 0)) ? quotient - 1 : quotient;
}

}  // namespace

Size::Size(const std::string& text, const std::vector<std::string>& symbols) {
  size_t depth = 0;
  for (const std::string& word : split(text, ',')) {
    const auto symbol = std::find(symbols.begin(), symbols.end(), word);
    Token token{Token::kNumber, 0};
    if (symbol != symbols.end()) {
      token = {Token::kSymbol, symbol - symbols.begin()};
    } else if (word == "+") {
      token.kind = Token::kAdd;
    } else if (word == "*") {
      token.kind = Token::kMultiply;
    } else if (word == "//") {
      token.kind = Token::kDivide;
    } else if (word == "%") {
      token.kind = Token::kRemainder;
    } else if (word == "min") {
      token.kind = Token::kLess;
    } else if (word == "max") {
      token.kind = Token::kGreater;
    } else {
      token.number = whole(word);
    }
    const bool is_operator = token.kind != Token::kNumber && token.kind != Token::kSymbol;
    if (is_operator && depth < 2) refuse("the size " + text);
    depth = is_operator ? depth - 1 : depth + 1;
    tokens_.push_back(token);
  }
  if (depth != 1) refuse("the size " + text);
}

int64_t Size::value(const std::vector<int64_t>& symbols) const {
  if (tokens_.size() == 1) {
    return tokens_[0].kind == Token::kSymbol ? symbols[static_cast<size_t>(tokens_[0].number)] : tokens_[0].number;
  }
  std::vector<int64_t> stack;
  for (const Token& token : tokens_) {
    if (token.kind == Token::kNumber || token.kind == Token::kSymbol) {
      stack.push_back(token.kind == Token::kNumber ? token.number : symbols[static_cast<size_t>(token.number)]);
      continue;
    }
    const int64_t b = stack.back();
    stack.pop_back();
    int64_t& a = stack.back();
    switch (token.kind) {
      case Token::kAdd: a += b; break;
      case Token::kMultiply: a *= b; break;
      case Token::kDivide: a = floor_divide(a, b); break;
      case Token::kRemainder: a -= floor_divide(a, b) * b; break;
      case Token::kLess: a = std::min(a, b); break;
      default: a = std::max(a, b);
    }
  }
  return stack.back();
}

Program::Program(const std::string& text) {
  for (const std::string& line : split(text, '\n')) read_line(line);
  if (name.empty()) refuse("it has no name");
  for (const Symbol& one : symbols) {
    if (one.input >= inputs.size() || one.axis >= inputs[one.input].shape.size() || one.divisor < 1) {
      refuse("a size is of no input");
    }
  }
}

void Program::read_line(const std::string& line) {
  const std::vector<std::string> words = split(line, ' ');
  const std::string kind = words.empty() ? "" : words[0];
  if (kind == "operation" && words.size() == 2) {
    name = words[1];
  } else if (kind == "barrier" && words.size() == 1) {
    barrier = true;
  } else if (kind == "size" && words.size() == 5) {
    symbol_names.push_back(words[1]);
    symbols.push_back({index_of(words[2]), index_of(words[3]), whole(words[4])});
  } else if (kind == "input" && words.size() >= 3) {
    inputs.push_back(read_tensor(words));
  } else if (kind == "output" && words.size() >= 3) {
    outputs.push_back(read_tensor(words));
  } else if (kind == "copy" && words.size() == 3) {
    steps.push_back({true, read_place(words[1]), read_place(words[2]), "", {}, {}});
  } else if (kind == "launch" && words.size() >= 5) {
    Step step{false, {}, {}, words[1], {}, {}};
    for (size_t i = 2; i < 5; ++i) step.grid.emplace_back(words[i], symbol_names);
    for (size_t i = 5; i < words.size(); ++i) step.arguments.push_back(read_argument(words[i]));
    steps.push_back(step);
  } else {
    refuse(line);
  }
}

Tensor Program::read_tensor(const std::vector<std::string>& words) const {
  Tensor tensor;
  tensor.name = words[1];
  for (const Dtype& one : kDtypes) {
    if (words[2] == one.name) tensor.dtype = one.onnx, tensor.bytes = one.bytes;
  }
  if (tensor.dtype == 0) refuse("the dtype " + words[2]);
  size_t end = words.size();
  if (end > 4 && words[end - 2] == "=") {
    const size_t input = index_of(words[end - 1]);
    if (input >= inputs.size()) refuse("output " + tensor.name + " begins as no input");
    tensor.begins_as = static_cast<int>(input);
    end -= 2;
  }
  for (size_t i = 3; i < end; ++i) tensor.shape.emplace_back(words[i], symbol_names);
  return tensor;
}

TensorPlace Program::read_place(const std::string& word) const {
  if (word.size() < 2 || (word[0] != 'i' && word[0] != 'o')) refuse("the tensor " + word);
  const TensorPlace place{word[0] == 'o', index_of(word.substr(1))};
  if (place.index >= (place.output ? outputs : inputs).size()) refuse("the tensor " + word);
  return place;
}

Argument Program::read_argument(const std::string& word) const {
  Argument argument;
  const std::string rest = word.size() > 2 ? word.substr(2) : "";
  if (word.rfind("n:", 0) == 0 || word.rfind("l:", 0) == 0) {
    argument.kind = word[0] == 'n' ? Argument::kInt32 : Argument::kInt64;
    argument.integer.emplace_back(rest, symbol_names);
  } else if (word.rfind("f:", 0) == 0) {
    char* end = nullptr;
    argument.kind = Argument::kFloat;
    const auto bits = static_cast<uint32_t>(std::strtoul(rest.c_str(), &end, 16));
    if (rest.size() != 8 || *end != '\0') refuse("the number " + rest);
    std::memcpy(&argument.number, &bits, sizeof bits);
  } else {
    argument.tensor = read_place(word);
  }
  return argument;
}

}  // namespace megalodon
