// The state of streams: every tensor of the manifest's cache, a row for each stream.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "bundle/manifest.hpp"
#include "runtime/device.hpp"

namespace megalodon::impl {

// Memory for the states of `rows` streams. The rows of a tensor follow each other, so a range of rows is a batch; all
// tensors but the rings lie in one piece, so that keeping them is one copy.
class CacheBlock {
 public:
  CacheBlock(const std::vector<CacheTensor>& layout, const Device& device, std::int64_t rows);

  std::byte* row(std::size_t tensor, std::int64_t row) const;
  const std::vector<CacheTensor>& layout() const { return layout_; }
  const Device& device() const { return device_; }
  std::int64_t rows() const { return rows_; }
  // All tensors but the rings, of all rows.
  std::span<std::byte> states() const;

  // Each row belongs to one stream at a time; whether it was free.
  bool take(std::int64_t row);
  void give_back(std::int64_t row);

  // Memory for a tensor's rows that begin where programs refuse to work: see CacheView.
  std::byte* aligned(std::size_t tensor, std::int64_t first, std::int64_t rows);

  // The step recorded over some rows; `make` records it the first time. It may be null.
  RecordedStep* step(std::int64_t first, std::int64_t rows, const std::function<std::unique_ptr<RecordedStep>()>& make);

 private:
  std::size_t bytes_of(const CacheTensor& tensor) const;

  const std::vector<CacheTensor>& layout_;  // the engine's, which outlives its sessions
  const Device& device_;                    // likewise
  std::int64_t rows_;
  std::vector<DeviceMemory> memory_;
  std::vector<std::byte*> starts_;  // of the tensors
  std::size_t states_ = 0;          // bytes of all but the rings
  std::mutex mutex_;
  std::vector<bool> taken_;
  std::map<std::tuple<std::size_t, std::int64_t, std::int64_t>, DeviceMemory> aligned_;
  std::map<std::pair<std::int64_t, std::int64_t>, std::unique_ptr<RecordedStep>> steps_;
};

// Some rows of a block, as the tensors of a batch. Programs want tensors that begin at multiples of 16 bytes; others
// they copy, and what they change in a copy is lost. The rows of a small tensor may begin anywhere, so programs work on
// memory beside them then, between `enter` and `leave`.
class CacheView {
 public:
  CacheView(std::shared_ptr<CacheBlock> block, std::int64_t first, std::int64_t rows);

  // For programs; by one thread at a time.
  const Tensor& tensor(std::size_t index) const;
  // Before and after a program runs on the tensors.
  void enter(void* stream) const;
  void leave(void* stream) const;
  // Where a tensor's rows are, in the device's memory.
  std::span<std::byte> memory(std::size_t index) const;
  // All of it: small states, in one piece if the rows are all of the block's, and rings.
  StepMemory memory() const;
  std::vector<std::byte> read(std::size_t index) const;
  void write(std::size_t index, std::span<const std::byte> bytes) const;
  const std::shared_ptr<CacheBlock>& block() const { return block_; }
  std::int64_t first() const { return first_; }
  std::int64_t rows() const { return rows_; }

  void reset() const;                            // fresh streams, position 0
  void copy_from(const CacheView& other) const;  // of as many rows

 private:
  std::shared_ptr<CacheBlock> block_;
  std::int64_t first_, rows_;
  std::map<std::size_t, std::byte*> beside_;  // by tensor, where its rows begin elsewhere
  mutable std::vector<Tensor> tensors_;       // made when they are asked for, which replaying a step does not
};

// The row of one stream, which no other takes while this lives.
class CacheRow {
 public:
  // Nothing if the row is taken.
  static std::optional<CacheRow> take(const std::shared_ptr<CacheBlock>& block, std::int64_t row);
  CacheRow(CacheRow&& other) noexcept = default;
  CacheRow& operator=(CacheRow&& other) noexcept {
    std::swap(view_, other.view_);
    return *this;
  }
  ~CacheRow() {
    if (view_.block()) view_.block()->give_back(view_.first());
  }
  const CacheView& view() const { return view_; }

 private:
  explicit CacheRow(CacheView view) : view_(std::move(view)) {}
  CacheView view_;
};

}  // namespace megalodon::impl
