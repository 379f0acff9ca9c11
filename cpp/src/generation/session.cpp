#include "generation/session.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "error.hpp"

namespace megalodon::impl {

void Session::require_usable() const {
  if (poisoned_) {
    throw Error(MEGALODON_POISONED,
                "an earlier call failed half-way, so the stream's state is unknown; call reset or restore");
  }
}

std::int64_t Session::tokens_fed() const {
  const auto& layout = engine_->manifest().cache;
  const auto index = std::ranges::find(layout, kPosition, &CacheTensor::name) - layout.begin();
  const std::vector<std::byte> bytes = row_.view().read(static_cast<std::size_t>(index), 0);
  std::int64_t position = 0;
  std::memcpy(&position, bytes.data(), sizeof position);
  return position;
}

void Session::reset() {
  const ExclusiveUse use(*this);
  row_.view().reset();
  pending_.reset();
  poisoned_ = false;
}

std::unique_ptr<Session> Session::fork() {
  const ExclusiveUse use(*this);
  require_usable();
  auto other = std::make_unique<Session>(engine_);
  other->row_.view().copy_from(row_.view(), tokens_fed() % engine_->manifest().chunk);
  other->pending_ = pending_;
  return other;
}

std::int64_t Session::position() {
  const ExclusiveUse use(*this);
  require_usable();
  return tokens_fed();
}

Snapshot Session::snapshot() {
  const ExclusiveUse use(*this);
  require_usable();
  return Snapshot::of(engine_->manifest(), row_.view(), tokens_fed(), pending_);
}

void Session::restore(const Snapshot& snapshot) {
  const ExclusiveUse use(*this);
  snapshot.check(engine_->manifest());
  poisoned_ = true;
  snapshot.copy_to(engine_->manifest(), row_.view());
  pending_ = snapshot.pending();
  poisoned_ = false;
}

void Session::prefill(std::span<const std::int64_t> token_ids, std::span<float> logits) {
  const ExclusiveUse use(*this);
  feed(token_ids, logits);
}

void Session::decode(std::int64_t token_id, std::span<float> logits) {
  const ExclusiveUse use(*this);
  require_usable();
  const std::span<const std::int64_t> ids(&token_id, 1);
  if (pending_) return feed(ids, logits);
  poison_on_failure([&] { engine_->decode(ids, row_.view(), logits); });
}

void Session::feed(std::span<const std::int64_t> token_ids, std::span<float> logits) {
  require_usable();
  const std::vector<std::int64_t> fed = with_pending(token_ids);
  poison_on_failure([&] { engine_->prefill(std::array{std::span(fed)}, row_.view(), logits); });
  pending_.reset();
}

std::vector<std::int64_t> Session::with_pending(std::span<const std::int64_t> token_ids) const {
  std::vector<std::int64_t> fed;
  if (pending_) fed.push_back(*pending_);
  fed.insert(fed.end(), token_ids.begin(), token_ids.end());
  return fed;
}

}  // namespace megalodon::impl
