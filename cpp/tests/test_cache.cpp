// The rows of a block, as programs get them.
#include <gtest/gtest.h>

#include <array>
#include <cstring>

#include "runtime/cache.hpp"

namespace {

using namespace megalodon::impl;

std::vector<CacheTensor> layout() {
  const DType* words = dtype_by_name("int64");
  return {{.name = "ring", .row_shape = {4}, .dtype = words, .fill = 0.0, .ring = true, .row_bytes = 32},
          {.name = "position", .row_shape = {}, .dtype = words, .fill = 0.0, .ring = false, .row_bytes = 8},
          {.name = "state", .row_shape = {2}, .dtype = words, .fill = 0.0, .ring = false, .row_bytes = 16}};
}

std::int64_t* numbers(const Tensor& tensor, std::vector<std::int64_t> shape) {
  return static_cast<std::int64_t*>(const_cast<void*>(tensor.contiguous(*dtype_by_name("int64"), shape)));
}

TEST(Cache, ProgramsGetAlignedTensorsAndUpdateTheRows) {
  const auto device = open_device("cpu", "");
  const std::vector<CacheTensor> tensors = layout();
  const auto block = std::make_shared<CacheBlock>(tensors, *device, 4);
  CacheView(block, 0, 4).reset();
  for (std::int64_t first = 0; first < 4; ++first) {
    for (std::int64_t rows = 1; first + rows <= 4; ++rows) {
      const CacheView view(block, first, rows);
      view.copy_in(nullptr);
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        std::vector<std::int64_t> shape{rows};
        shape.insert(shape.end(), tensors[i].row_shape.begin(), tensors[i].row_shape.end());
        ASSERT_EQ(reinterpret_cast<std::uintptr_t>(numbers(view.tensor(i), shape)) % 16, 0U);
      }
      for (std::int64_t row = 0; row < rows; ++row) ++numbers(view.tensor(1), {rows})[row];
      view.copy_out(nullptr);
    }
  }
  std::array<std::int64_t, 4> counts{};
  std::memcpy(counts.data(), block->row(1, 0), sizeof counts);
  EXPECT_EQ(counts, (std::array<std::int64_t, 4>{4, 6, 6, 4}));  // the number of ranges that contain each row
}

TEST(Cache, TheStatesOfAWholeBlockAreOnePiece) {
  const auto device = open_device("cpu", "");
  const std::vector<CacheTensor> tensors = layout();
  const auto block = std::make_shared<CacheBlock>(tensors, *device, 2);
  const StepMemory whole = CacheView(block, 0, 2).memory(), part = CacheView(block, 1, 1).memory();
  ASSERT_EQ(whole.states.size(), 1U);
  for (const std::size_t i : {1U, 2U}) {
    EXPECT_GE(block->row(i, 0), whole.states[0].data());
    EXPECT_LE(block->row(i, 1) + tensors[i].row_bytes, whole.states[0].data() + whole.states[0].size());
  }
  EXPECT_EQ(part.states.size(), 2U);  // rows of others lie between them
  EXPECT_EQ(part.states[0].data(), block->row(1, 1));
  EXPECT_EQ(whole.rings.size(), 1U);
  EXPECT_EQ(part.rings.size(), 1U);
}

}  // namespace
