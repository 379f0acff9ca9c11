#include "runtime/cache.hpp"

#include <cstring>

namespace megalodon::impl {
namespace {

constexpr std::uintptr_t kProgramAlignment = 16;  // bytes; compiled programs require it of tensors
constexpr std::size_t kTensorAlignment = 512;     // bytes; torch's CUDA allocator gives every tensor as much

// The memory of a tensor's rows as equal blocks. The first bytes of each are those of the slots that are filled.
struct Blocks {
  std::size_t count, stride, filled;  // bytes
};

Blocks blocks_of(const CacheTensor& tensor, std::int64_t rows, std::int64_t slots) {
  auto count = static_cast<std::size_t>(rows);
  const std::size_t size = tensor.row_bytes * count;
  if (!tensor.ring || slots == tensor.row_shape[tensor.slot_axis]) return {1, size, size};
  for (std::size_t axis = 0; axis < tensor.slot_axis; ++axis) count *= static_cast<std::size_t>(tensor.row_shape[axis]);
  const std::size_t stride = size / count;
  const std::size_t slot_bytes = stride / static_cast<std::size_t>(tensor.row_shape[tensor.slot_axis]);
  return {count, stride, slot_bytes * static_cast<std::size_t>(slots)};
}

template <typename T>
void fill(std::span<std::byte> bytes, T value) {
  for (std::size_t at = 0; at < bytes.size(); at += sizeof value) std::memcpy(bytes.data() + at, &value, sizeof value);
}

}  // namespace

CacheBlock::CacheBlock(const std::vector<CacheTensor>& layout, const Device& device, std::int64_t rows)
    : layout_(layout), device_(device), rows_(rows), acquired_(static_cast<std::size_t>(rows)) {
  std::vector<std::size_t> offsets;  // of each tensor, in the piece of the states
  std::size_t size = 0;
  for (const CacheTensor& tensor : layout) {
    offsets.push_back(size);
    if (!tensor.ring) size += (bytes_of(tensor) + kTensorAlignment - 1) / kTensorAlignment * kTensorAlignment;
  }
  memory_.emplace_back(device, size);
  states_bytes_ = size;
  for (std::size_t i = 0; i < layout.size(); ++i) {
    if (layout[i].ring) memory_.emplace_back(device, bytes_of(layout[i]));
    starts_.push_back(layout[i].ring ? memory_.back().data() : memory_.front().data() + offsets[i]);
  }
}

std::size_t CacheBlock::bytes_of(const CacheTensor& tensor) const {
  return tensor.row_bytes * static_cast<std::size_t>(rows_);
}

std::span<std::byte> CacheBlock::states() const { return {memory_.front().data(), states_bytes_}; }

std::byte* CacheBlock::row(std::size_t tensor, std::int64_t row) const {
  return starts_[tensor] + layout_[tensor].row_bytes * static_cast<std::size_t>(row);
}

bool CacheBlock::acquire(std::int64_t row) {
  const std::lock_guard lock(mutex_);
  const auto index = static_cast<std::size_t>(row);
  if (acquired_[index]) return false;
  acquired_[index] = true;
  return true;
}

void CacheBlock::release(std::int64_t row) {
  const std::lock_guard lock(mutex_);
  acquired_[static_cast<std::size_t>(row)] = false;
}

CapturedStep* CacheBlock::captured_step(std::int64_t first, std::int64_t rows,
                                        const std::function<std::unique_ptr<CapturedStep>()>& capture) {
  const std::lock_guard lock(mutex_);
  const std::pair key(first, rows);
  auto found = captured_steps_.find(key);
  if (found == captured_steps_.end()) found = captured_steps_.emplace(key, capture()).first;
  return found->second.get();
}

std::byte* CacheBlock::aligned_copy(std::size_t tensor, std::int64_t first, std::int64_t rows) {
  const std::lock_guard lock(mutex_);
  const std::tuple key(tensor, first, rows);
  auto found = aligned_copies_.find(key);
  if (found == aligned_copies_.end()) {
    const std::size_t size = layout_[tensor].row_bytes * static_cast<std::size_t>(rows);
    found = aligned_copies_.emplace(key, DeviceMemory(device_, size)).first;
  }
  return found->second.data();
}

CacheView::CacheView(std::shared_ptr<CacheBlock> block, std::int64_t first, std::int64_t rows)
    : block_(std::move(block)), first_(first), rows_(rows) {
  for (std::size_t i = 0; i < block_->layout().size(); ++i) {
    const auto address = reinterpret_cast<std::uintptr_t>(block_->row(i, first_));
    if (address % kProgramAlignment != 0) aligned_copies_[i] = block_->aligned_copy(i, first_, rows_);
  }
}

void CacheView::copy_in(void* cuda_stream) const {
  for (const auto& [index, copy] : aligned_copies_) {
    block_->device().copy_async(cuda_stream, copy, memory(index).data(), memory(index).size());
  }
}

void CacheView::copy_out(void* cuda_stream) const {
  for (const auto& [index, copy] : aligned_copies_) {
    block_->device().copy_async(cuda_stream, memory(index).data(), copy, memory(index).size());
  }
}

const Tensor& CacheView::tensor(std::size_t index) const {
  for (std::size_t i = tensors_.size(); i < block_->layout().size(); ++i) {
    const CacheTensor& tensor = block_->layout()[i];
    std::vector<std::int64_t> shape{rows_};
    shape.insert(shape.end(), tensor.row_shape.begin(), tensor.row_shape.end());
    const auto copy = aligned_copies_.find(i);
    std::byte* data = copy == aligned_copies_.end() ? block_->row(i, first_) : copy->second;
    tensors_.push_back(block_->device().tensor_over(data, shape, *tensor.dtype));
  }
  return tensors_[index];
}

std::span<std::byte> CacheView::memory(std::size_t index) const {
  return {block_->row(index, first_), block_->layout()[index].row_bytes * static_cast<std::size_t>(rows_)};
}

StepMemory CacheView::memory() const {
  const bool whole = rows_ == block_->rows();
  StepMemory all;
  if (whole) all.states.push_back(block_->states());
  for (std::size_t i = 0; i < block_->layout().size(); ++i) {
    if (block_->layout()[i].ring) {
      all.rings.push_back(memory(i));
    } else if (!whole) {
      all.states.push_back(memory(i));
    }
  }
  return all;
}

std::vector<std::byte> CacheView::read(std::size_t index, std::int64_t slots) const {
  const Blocks blocks = blocks_of(block_->layout()[index], rows_, slots);
  std::vector<std::byte> bytes(blocks.count * blocks.filled);
  for (std::size_t i = 0; i < blocks.count && blocks.filled > 0; ++i) {
    block_->device().copy(bytes.data() + i * blocks.filled, memory(index).data() + i * blocks.stride, blocks.filled);
  }
  return bytes;
}

void CacheView::write(std::size_t index, std::int64_t slots, std::span<const std::byte> bytes) const {
  const Blocks blocks = blocks_of(block_->layout()[index], rows_, slots);
  if (blocks.filled < blocks.stride) reset(index);
  for (std::size_t i = 0; i < blocks.count && blocks.filled > 0; ++i) {
    block_->device().copy(memory(index).data() + i * blocks.stride, bytes.data() + i * blocks.filled, blocks.filled);
  }
}

void CacheView::reset() const {
  for (std::size_t i = 0; i < block_->layout().size(); ++i) reset(i);
}

void CacheView::reset(std::size_t index) const {
  const CacheTensor& tensor = block_->layout()[index];
  const std::span<std::byte> there = memory(index);
  if (tensor.fill == 0.0) return block_->device().zero(there.data(), there.size());
  std::vector<std::byte> bytes(there.size());
  if (tensor.dtype->name == "int64") {
    fill(bytes, static_cast<std::int64_t>(tensor.fill));
  } else {  // `read_manifest` refuses other fill values unless the dtype is float32
    fill(bytes, static_cast<float>(tensor.fill));
  }
  block_->device().copy(there.data(), bytes.data(), bytes.size());
}

void CacheView::copy_from(const CacheView& other, std::int64_t slots) const {
  for (std::size_t index = 0; index < block_->layout().size(); ++index) {
    const Blocks blocks = blocks_of(block_->layout()[index], rows_, slots);
    for (std::size_t i = 0; i < blocks.count && blocks.filled > 0; ++i) {
      const std::size_t at = i * blocks.stride;
      block_->device().copy(memory(index).data() + at, other.memory(index).data() + at, blocks.filled);
    }
  }
}

std::optional<CacheRow> CacheRow::acquire(const std::shared_ptr<CacheBlock>& block, std::int64_t row) {
  if (!block->acquire(row)) return std::nullopt;
  try {
    return CacheRow(CacheView(block, row, 1));
  } catch (...) {
    block->release(row);
    throw;
  }
}

}  // namespace megalodon::impl
