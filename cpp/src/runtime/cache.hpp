// The states of streams: every tensor of the manifest's cache, with one row for each stream.
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

// Memory for the states of `rows` streams. The rows of a tensor are contiguous, so any range of rows is a batch. All
// tensors but the rings lie in one piece of memory, so that a checkpoint of them is one copy.
class CacheBlock {
 public:
  CacheBlock(const std::vector<CacheTensor>& layout, const Device& device, std::int64_t rows);

  std::byte* row(std::size_t tensor, std::int64_t row) const;
  const std::vector<CacheTensor>& layout() const { return layout_; }
  const Device& device() const { return device_; }
  std::int64_t rows() const { return rows_; }
  // The piece of memory that holds all rows of all tensors but the rings.
  std::span<std::byte> states() const;

  // Each row belongs to one stream at a time. `acquire` returns whether the row was free.
  bool acquire(std::int64_t row);
  void release(std::int64_t row);

  // Aligned memory for a copy of some rows of a tensor: see CacheView.
  std::byte* aligned_copy(std::size_t tensor, std::int64_t first, std::int64_t rows);

  // The step captured over some rows, which may be null. `capture` makes it the first time.
  CapturedStep* captured_step(std::int64_t first, std::int64_t rows,
                              const std::function<std::unique_ptr<CapturedStep>()>& capture);

 private:
  std::size_t bytes_of(const CacheTensor& tensor) const;

  const std::vector<CacheTensor>& layout_;  // the engine's; an engine outlives its sessions
  const Device& device_;                    // likewise
  std::int64_t rows_;
  std::vector<DeviceMemory> memory_;  // first the states of all tensors but the rings, then each ring
  std::vector<std::byte*> starts_;    // of each tensor
  std::size_t states_bytes_ = 0;
  std::mutex mutex_;
  std::vector<bool> acquired_;
  std::map<std::tuple<std::size_t, std::int64_t, std::int64_t>, DeviceMemory> aligned_copies_;
  std::map<std::pair<std::int64_t, std::int64_t>, std::unique_ptr<CapturedStep>> captured_steps_;
};

// Some rows of a block, as the tensors of a batch.
//
// Programs update in place only tensors that begin at a multiple of 16 bytes. They copy others, and what they write to
// such a copy is lost. Row 1 of a tensor with 8 bytes per row begins at byte 8, for example. Programs then work on an
// aligned copy of the rows: `copy_in` fills it before a program runs, and `copy_out` reads it back.
class CacheView {
 public:
  CacheView(std::shared_ptr<CacheBlock> block, std::int64_t first, std::int64_t rows);

  // The tensor that programs get. One thread at a time may ask for it.
  const Tensor& tensor(std::size_t index) const;
  void copy_in(void* cuda_stream) const;
  void copy_out(void* cuda_stream) const;
  // The memory of a tensor's rows on the device.
  std::span<std::byte> memory(std::size_t index) const;
  // The memory of all tensors. If the rows are all of the block's, the states are one piece.
  StepMemory memory() const;
  // Both work on the first `slots` slots of each row of a ring, without gaps, and on other tensors as a whole. `write`
  // gives a ring's other slots their initial value.
  std::vector<std::byte> read(std::size_t index, std::int64_t slots) const;
  void write(std::size_t index, std::int64_t slots, std::span<const std::byte> bytes) const;
  const std::shared_ptr<CacheBlock>& block() const { return block_; }
  std::int64_t first() const { return first_; }
  std::int64_t rows() const { return rows_; }

  void reset() const;  // makes fresh streams, at position 0
  // Takes over the first `slots` slots of each ring and all else. `other` has as many rows.
  void copy_from(const CacheView& other, std::int64_t slots) const;

 private:
  std::shared_ptr<CacheBlock> block_;
  std::int64_t first_, rows_;
  std::map<std::size_t, std::byte*> aligned_copies_;  // by tensor, for those whose rows are not aligned
  void reset(std::size_t index) const;

  mutable std::vector<Tensor> tensors_;               // made on first use: replaying a captured step needs none
};

// The row of one stream. No other stream gets it while this object lives.
class CacheRow {
 public:
  // Nothing if another stream has the row.
  static std::optional<CacheRow> acquire(const std::shared_ptr<CacheBlock>& block, std::int64_t row);
  CacheRow(CacheRow&& other) noexcept = default;
  CacheRow& operator=(CacheRow&& other) noexcept {
    std::swap(view_, other.view_);
    return *this;
  }
  ~CacheRow() {
    if (view_.block()) view_.block()->release(view_.first());
  }
  const CacheView& view() const { return view_; }

 private:
  explicit CacheRow(CacheView view) : view_(std::move(view)) {}
  CacheView view_;
};

}  // namespace megalodon::impl
