#include "cache.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace megalodon::impl {
namespace {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector

template <typename T>
void fill(std::span<std::byte> bytes, T value) {
  for (std::size_t at = 0; at < bytes.size(); at += sizeof value) std::memcpy(bytes.data() + at, &value, sizeof value);
}

}  // namespace

CacheBlock::CacheBlock(const std::vector<CacheTensor>& layout, std::int64_t rows) : layout_(layout), rows_(rows) {
  for (const CacheTensor& tensor : layout) {
    const std::size_t size = tensor.row_bytes * static_cast<std::size_t>(rows);
    const std::size_t rounded = (std::max<std::size_t>(size, 1) + kAlignment - 1) / kAlignment * kAlignment;
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
    if (memory == nullptr) throw std::bad_alloc();
    memory_.emplace_back(memory);
  }
}

void CacheBlock::Free::operator()(std::byte* memory) const { std::free(memory); }

std::byte* CacheBlock::row(std::size_t tensor, std::int64_t row) const {
  return memory_[tensor].get() + layout_[tensor].row_bytes * static_cast<std::size_t>(row);
}

CacheView::CacheView(std::shared_ptr<CacheBlock> block, std::int64_t first, std::int64_t rows)
    : block_(std::move(block)), first_(first), rows_(rows) {
  for (std::size_t i = 0; i < block_->layout().size(); ++i) {
    const CacheTensor& tensor = block_->layout()[i];
    std::vector<std::int64_t> shape{rows};
    shape.insert(shape.end(), tensor.row_shape.begin(), tensor.row_shape.end());
    tensors_.push_back(Tensor::over(block_->row(i, first), shape, *tensor.dtype));
  }
}

std::span<std::byte> CacheView::bytes(std::size_t index) const {
  return {block_->row(index, first_), block_->layout()[index].row_bytes * static_cast<std::size_t>(rows_)};
}

void CacheView::reset() {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const CacheTensor& tensor = block_->layout()[i];
    if (tensor.fill == 0.0) {
      std::ranges::fill(bytes(i), std::byte{0});
    } else if (tensor.dtype->name == "int64") {
      fill(bytes(i), static_cast<std::int64_t>(tensor.fill));
    } else {  // the manifest was refused unless it is float32
      fill(bytes(i), static_cast<float>(tensor.fill));
    }
  }
}

void CacheView::copy_from(const CacheView& other) const {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    if (!bytes(i).empty()) std::memcpy(bytes(i).data(), other.bytes(i).data(), bytes(i).size());
  }
}

}  // namespace megalodon::impl
