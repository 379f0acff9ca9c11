// A hash table from 64-bit keys to small values, for tables that are built once and read often.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace megalodon::impl {

inline std::uint64_t mix(std::uint64_t key) {
  key *= 0x9E3779B97F4A7C15ULL;
  return key ^ (key >> 29);
}

// The key ~0 is taken: it marks an empty place.
template <class Value>
class FlatMap {
 public:
  explicit FlatMap(std::size_t count = 0) { resize(count); }

  // Puts a value in place of the one that the key had.
  void put(std::uint64_t key, const Value& value) {
    if (2 * (count_ + 1) > places_.size()) {
      std::vector<Place> old;
      old.swap(places_);
      resize(old.size());
      for (const Place& one : old) {
        if (one.key != kEmpty) put(one.key, one.value);
      }
    }
    Place& place = places_[place_of(key)];
    if (place.key == kEmpty) ++count_;
    place = {key, value};
  }

  const Value* find(std::uint64_t key) const {
    const Place& place = places_[place_of(key)];
    return place.key == kEmpty ? nullptr : &place.value;
  }

 private:
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};
  struct Place {
    std::uint64_t key = kEmpty;
    Value value{};
  };

  void resize(std::size_t count) {
    places_.assign(std::bit_ceil(2 * count + 16), {});
    count_ = 0;
  }
  std::size_t place_of(std::uint64_t key) const {
    std::size_t at = mix(key) & (places_.size() - 1);
    while (places_[at].key != key && places_[at].key != kEmpty) at = (at + 1) & (places_.size() - 1);
    return at;
  }

  std::vector<Place> places_;
  std::size_t count_ = 0;
};

}  // namespace megalodon::impl
