// Decoding bytes to text, stop strings, and which tokenizers are refused.
#include <gtest/gtest.h>

#include <cstdlib>

#include "bundle/file.hpp"
#include "error.hpp"
#include "generation/text.hpp"
#include "python_format.hpp"

namespace megalodon::impl {
namespace {

nlohmann::json tokenizer_file() {
  return nlohmann::json::parse(
      read_file(std::filesystem::path(std::getenv("MEGALODON_TEST_BUNDLE")) / "tokenizer.json"));
}

std::string decode(const std::string& bytes, std::vector<std::string> stop = {}) {
  const Tokenizer tokenizer(tokenizer_file());
  TextStream stream(tokenizer, std::move(stop));
  std::string text;
  for (const char byte : bytes) text += stream.push(static_cast<unsigned char>(byte));
  return text + stream.flush();
}

TEST(Text, WholeCharactersPass) {
  const std::string text = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\xA6\x88z";
  EXPECT_EQ(decode(text), text);
}

TEST(Text, NoPieceEndsInsideACharacter) {
  const Tokenizer tokenizer(tokenizer_file());
  TextStream stream(tokenizer, {});
  EXPECT_EQ(stream.push(0xE2), "");
  EXPECT_EQ(stream.push(0x82), "");
  EXPECT_EQ(stream.push(0xAC), "\xE2\x82\xAC");
}

TEST(Text, BytesThatAreNotUtf8AreReplaced) {
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_EQ(decode("\xFF"), r);
  EXPECT_EQ(decode("a\xE2\x82"), "a" + r);  // incomplete at the end
  EXPECT_EQ(decode("\xE2\x82"
                   "b"),
            r + "b");                                    // incomplete before another character
  EXPECT_EQ(decode("\xC0\xAF"), r + r);                  // overlong
  EXPECT_EQ(decode("\xE0\x9F\x80"), r + r + r);          // overlong
  EXPECT_EQ(decode("\xED\xA0\x80"), r + r + r);          // a surrogate
  EXPECT_EQ(decode("\xF4\x90\x80\x80"), r + r + r + r);  // beyond Unicode
  EXPECT_EQ(decode("\xF0\x9F\xA6\xF0\x9F\xA6\x88"), r + "\xF0\x9F\xA6\x88");
}

TEST(Text, TheEarliestStopStringWins) {
  EXPECT_EQ(decode("abcdef", {"d"}), "abc");
  EXPECT_EQ(decode("abcdef", {"de", "bcde"}), "a");
  EXPECT_EQ(decode("aaab", {"aab"}), "a");
  EXPECT_EQ(decode("abcab", {"abx"}), "abcab");
  EXPECT_EQ(decode("ab\xE2\x82\xAC", {"\xE2\x82\xAC"}), "ab");
  EXPECT_THROW(decode("a", {""}), Error);
}

TEST(Text, SpecialTokensAreFoundAndHaveNoText) {
  const Tokenizer tokenizer(tokenizer_file());
  EXPECT_EQ(tokenizer.encode("a<|endoftext|>b"), (std::vector<std::int64_t>{97, 256, 98}));
  EXPECT_EQ(tokenizer.encode("<|endof"), tokenizer.encode("<|endof"));
  TextStream stream(tokenizer, {});
  EXPECT_EQ(stream.push(256) + stream.push(9999) + stream.push(97), "a");
  EXPECT_THROW(stream.push(-1), Error);
  stream.flush();
  EXPECT_THROW(stream.push(97), Error);
}

std::string refusal(const nlohmann::json& file) {
  try {
    Tokenizer{file};
  } catch (const Error& error) {
    EXPECT_EQ(error.code, MEGALODON_UNAVAILABLE);
    return error.what();
  }
  return "";
}

TEST(Text, OtherTokenizersAreRefusedByName) {
  const std::vector<std::pair<std::string, std::string>> changes{
      {R"({"model":{"type":"WordPiece"}})", "the model WordPiece"},
      {R"({"model":{"merges":[["a","b"]]}})", "a merge of a and b, no tokens"},
      {R"({"model":{"merges":["a b c"]}})", "the merge a b c"},
      {R"({"model":{"vocab":{"Q":"x"}}})", "the id of Q"},
      {R"({"model":{"vocab":{"Q":1,"q":1}}})", "two tokens of the id 1"},
      {R"({"model":{"dropout":0.1}})", "a BPE model with dropout, which is random"},
      {R"({"model":{"end_of_word_suffix":"</w>"}})", "a BPE model that marks parts of words"},
      {R"({"normalizer":{"type":"BertNormalizer"}})", "the normalizer BertNormalizer"},
      {R"({"normalizer":{"type":"Replace","pattern":{"Regex":"^a"},"content":""}})",
       "the expression ^a with a ^ in this place"},
      {R"({"pre_tokenizer":{"type":"BertPreTokenizer"}})", "the pre-tokenizer BertPreTokenizer"},
      {R"({"pre_tokenizer":{"type":"Split","pattern":{"Regex":"\\p{Greek}"},"behavior":"Isolated","invert":false}})",
       "the expression \\p{Greek} with the property Greek"},
      {R"j({"pre_tokenizer":{"type":"Split","pattern":{"Regex":"(?i:\\p{Lu})"},"behavior":"Isolated","invert":true}})j",
       "the expression (?i:\\p{Lu}) with the property Lu where the case is ignored"},
      {R"({"pre_tokenizer":{"type":"Split","pattern":{"Regex":"[a[b]]"},"behavior":"Isolated","invert":false}})",
       "the expression [a[b]] with a set inside a set"},
      {R"({"decoder":{"type":"WordPiece"}})", "the decoder WordPiece"},
      {R"({"decoder":{"type":"Sequence","decoders":[{"type":"Fuse"},{"type":"ByteFallback"}]}})",
       "the decoder ByteFallback behind one that joins tokens"},
      {R"({"post_processor":{"type":"Other"}})", "the post-processor Other"},
      {R"({"post_processor":{"type":"TemplateProcessing","special_tokens":{},"single":[]}})",
       "a template without the text"},
      {R"({"added_tokens":[{"id":256,"content":"x"}]})", "a field single_word that is missing or of another type"},
      {R"({"model":[]})", "no model"},
      {R"({"truncation":{"max_length":5}})", "truncation"}};
  for (const auto& [change, name] : changes) {
    nlohmann::json file = tokenizer_file();
    file.merge_patch(nlohmann::json::parse(change));
    EXPECT_EQ(refusal(file),
              "this library does not read the bundle's tokenizer.json, which has " + name + "; pass token ids")
        << change;
  }
}

TEST(Format, NumbersAsPythonWritesThem) {
  EXPECT_EQ(repr(1.0), "1.0");
  EXPECT_EQ(repr(-0.1), "-0.1");
  EXPECT_EQ(repr(1e-05), "1e-05");
  EXPECT_EQ(repr(1e16), "1e+16");
  EXPECT_EQ(repr(123456789012.0), "123456789012.0");
}

}  // namespace
}  // namespace megalodon::impl
