// The tokens of short words that came lately.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "text/flat_map.hpp"

namespace megalodon::impl {

// A table of constant size. A word takes the place of another whose hash is the same.
class WordCache {
 public:
  static constexpr std::size_t kLongest = 32, kMostTokens = 7;

  struct Key {
    std::array<std::uint64_t, 4> bytes{};  // the word, then zeros
    std::uint32_t size = 0;
    bool operator==(const Key&) const = default;
  };
  struct Entry {
    Key key;
    std::uint32_t count = 0;
    std::array<std::uint32_t, kMostTokens> ids{};
  };

  WordCache() : entries_(kEntries) {}

  static Key key_of(std::string_view word) {
    Key key;
    key.size = static_cast<std::uint32_t>(word.size());
    std::memcpy(key.bytes.data(), word.data(), word.size());
    return key;
  }
  // The place of a word. The word is there if the key is equal.
  Entry& entry(const Key& key) {
    std::uint64_t hash = key.size;
    for (const std::uint64_t part : key.bytes) hash = mix(hash ^ part);
    return entries_[(hash >> 24) & (kEntries - 1)];
  }
  template <class Ids>
  static void store(Entry& entry, const Key& key, const Ids& ids) {
    if (ids.size() > kMostTokens) return;
    entry.key = key;
    entry.count = static_cast<std::uint32_t>(ids.size());
    std::ranges::copy(ids, entry.ids.begin());
  }

 private:
  static constexpr std::size_t kEntries = std::size_t{1} << 15;
  std::vector<Entry> entries_;
};

}  // namespace megalodon::impl
