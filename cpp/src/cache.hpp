// The state of streams: every tensor of the manifest's cache, a row for each stream.
#pragma once

#include <memory>
#include <vector>

#include "manifest.hpp"

namespace megalodon::impl {

// Memory for the states of `rows` streams. The rows of a tensor follow each other, so a range of rows is a batch.
class CacheBlock {
 public:
  CacheBlock(const std::vector<CacheTensor>& layout, std::int64_t rows);

  std::byte* row(std::size_t tensor, std::int64_t row) const;
  const std::vector<CacheTensor>& layout() const { return layout_; }
  std::int64_t rows() const { return rows_; }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  const std::vector<CacheTensor>& layout_;  // the engine's, which outlives its sessions
  std::int64_t rows_;
  std::vector<std::unique_ptr<std::byte, Free>> memory_;
};

// Some rows of a block, as the tensors of a batch.
class CacheView {
 public:
  CacheView(std::shared_ptr<CacheBlock> block, std::int64_t first, std::int64_t rows);

  const Tensor& tensor(std::size_t index) const { return tensors_[index]; }
  std::span<std::byte> bytes(std::size_t index) const;
  const std::shared_ptr<CacheBlock>& block() const { return block_; }
  std::int64_t first() const { return first_; }
  std::int64_t rows() const { return rows_; }

  void reset();                                  // fresh streams, position 0
  void copy_from(const CacheView& other) const;  // of as many rows

 private:
  std::shared_ptr<CacheBlock> block_;
  std::int64_t first_, rows_;
  std::vector<Tensor> tensors_;
};

}  // namespace megalodon::impl
