#include "runtime/engine.hpp"

#include <algorithm>
#include <array>
#include <set>
#include <thread>

#include "bundle/file.hpp"
#include "bundle/folder.hpp"
#include "error.hpp"
#include "generation/sampling.hpp"

namespace megalodon::impl {
namespace {

constexpr const char* kTokenizer = "tokenizer.json";

}  // namespace

Engine::Engine(const std::filesystem::path& folder, bool check_hashes, int concurrency) {
  require(concurrency >= 0, "concurrency is " + std::to_string(concurrency) + ", expected 1 or more, or 0");
  manifest_ = read_manifest(folder, read_bundle(folder, check_hashes));
  if (manifest_.files.contains(kTokenizer)) {
    try {
      tokenizer_.emplace(parse_json(read_file(folder / kTokenizer), folder / kTokenizer));
    } catch (const Error& error) {
      no_tokenizer_ = error.what();
    }
  } else {
    no_tokenizer_ = std::string("the bundle has no ") + kTokenizer + "; pass token ids";
  }
  device_ = open_device(manifest_.device, manifest_.architecture);
  weights_.emplace(folder, *device_);
  const int concurrent =
      concurrency > 0 ? concurrency : static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  std::set<std::string> files;
  for (const auto& [name, entry] : manifest_.programs) {
    programs_.try_emplace(name, folder, entry, manifest_, *weights_, *device_, concurrent);
    for (const Stage* stage : {&entry.begin, &entry.layer, &entry.end}) {
      for (const StageInput& input : stage->inputs) files.insert(input.file);
    }
  }
  if (!device_->is_concurrent() && !decode_program(1).chooses()) {
    throw unavailable("the bundle is from before this library: its programs for a GPU choose no tokens" +
                      std::string(kExportAgain));
  }
  files.erase("");
  for (const std::string& file : files) weight_bytes_ += manifest_.files.at(file);
}

std::int64_t Engine::state_bytes() const {
  std::size_t bytes = 0;
  for (const CacheTensor& tensor : manifest_.cache) bytes += tensor.row_bytes;
  return static_cast<std::int64_t>(bytes);
}

const Tokenizer& Engine::tokenizer() const {
  if (!tokenizer_) throw unavailable(no_tokenizer_);
  return *tokenizer_;
}

CacheRow Engine::new_cache() const {
  CacheRow row = *CacheRow::take(new_block(1), 0);
  row.view().reset();
  return row;
}

std::shared_ptr<CacheBlock> Engine::new_block(std::int64_t rows) const {
  if (device_->is_concurrent()) return std::make_shared<CacheBlock>(manifest_.cache, *device_, rows);
  std::unique_ptr<CacheBlock> block = take_spare(rows);
  if (!block) {
    try {
      block = std::make_unique<CacheBlock>(manifest_.cache, *device_, rows);
    } catch (const std::bad_alloc&) {
      clear_spare();
      block = std::make_unique<CacheBlock>(manifest_.cache, *device_, rows);
    }
  }
  return {block.release(), [this](CacheBlock* done) { keep_spare(std::unique_ptr<CacheBlock>(done)); }};
}

std::unique_ptr<CacheBlock> Engine::take_spare(std::int64_t rows) const {
  const std::lock_guard lock(spare_mutex_);
  auto found = spare_.extract(rows);
  return found ? std::move(found.mapped()) : nullptr;
}

void Engine::keep_spare(std::unique_ptr<CacheBlock> block) const noexcept {
  const std::lock_guard lock(spare_mutex_);
  std::swap(spare_[block->rows()], block);
}

void Engine::clear_spare() const {
  const std::lock_guard lock(spare_mutex_);
  spare_.clear();
}

const float* Engine::values_of(const Tensor& logits, std::vector<std::int64_t> shape) const {
  return static_cast<const float*>(logits.contiguous(*dtype_by_name("float32"), shape));
}

void Engine::prefill(std::span<const std::span<const std::int64_t>> token_ids, const CacheView& cache,
                     std::span<float> logits) const {
  std::size_t longest = 0;
  for (const auto& ids : token_ids) {
    check_ids(ids);
    longest = std::max(longest, ids.size());
  }
  const auto rows = static_cast<std::int64_t>(token_ids.size());
  const auto width = static_cast<std::size_t>(manifest_.logits_size);
  const auto granule = static_cast<std::size_t>(manifest_.granule);
  const auto most = static_cast<std::size_t>(manifest_.max_length);
  for (std::size_t start = 0; start < longest; start += most) {
    const std::size_t length = (std::min(longest - start, most) + granule - 1) / granule * granule;
    std::vector<std::int64_t> padded(token_ids.size() * length), lengths(token_ids.size());
    for (std::size_t i = 0; i < token_ids.size(); ++i) {
      const auto piece = token_ids[i].subspan(std::min(start, token_ids[i].size()));
      lengths[i] = static_cast<std::int64_t>(std::min(piece.size(), most));
      std::copy_n(piece.begin(), lengths[i], padded.begin() + static_cast<std::ptrdiff_t>(i * length));
    }
    const Uploaded ids(*device_, padded, std::array{rows, static_cast<std::int64_t>(length)});
    const Uploaded valid(*device_, lengths, std::array{rows});
    Tensor result;
    device_->run(
        [&](void* stream) { result = programs_.at("prefill").run({&ids.tensor(), &valid.tensor()}, cache, stream); });
    std::vector<std::int64_t> shape{rows, manifest_.logits_size};
    if (manifest_.all_logits) shape.insert(shape.begin() + 1, static_cast<std::int64_t>(length));
    const float* values = values_of(result, shape);
    for (std::size_t i = 0; i < token_ids.size() && !logits.empty(); ++i) {
      if (lengths[i] == 0 || token_ids[i].size() > start + most) continue;  // its last token is in another call
      const std::size_t row = manifest_.all_logits ? i * length + static_cast<std::size_t>(lengths[i]) - 1 : i;
      device_->copy(logits.data() + i * width, values + row * width, width * sizeof(float));
    }
  }
}

const Program& Engine::decode_program(std::int64_t rows) const {
  return programs_.at(rows == 1 && programs_.contains("decode_one") ? "decode_one" : "decode");
}

RecordedStep* Engine::recorded(const CacheView& cache) const {
  const std::int64_t rows = cache.rows();
  return cache.block()->step(cache.first(), rows, [&] {
    const auto step = [&](const Tensor& ids, const Tensor& choice, void* stream) {
      Tensor result = decode_program(rows).run({.token_ids = &ids, .choice = &choice}, cache, stream);
      values_of(result, {rows, manifest_.logits_size});
      return result;
    };
    return device_->record(step, rows, cache.memory(), manifest_.logits_size);
  });
}

void Engine::decode(std::span<const std::int64_t> token_ids, const CacheView& cache, std::span<float> logits,
                    std::span<std::int64_t> greedy) const {
  check_ids(token_ids);
  if (RecordedStep* step = recorded(cache)) return step->run(token_ids, logits, greedy);
  const std::int64_t rows = cache.rows();
  const Program& program = decode_program(rows);
  const Uploaded ids(*device_, token_ids, std::array{rows});
  std::optional<Uploaded> choice;  // not read: the choice is made again below, from the logits
  if (program.chooses())
    choice.emplace(*device_, std::vector<std::int64_t>(2 * token_ids.size()), std::array{2L, rows});
  Tensor result;
  device_->run([&](void* stream) {
    result = program.run({.token_ids = &ids.tensor(), .choice = choice ? &choice->tensor() : nullptr}, cache, stream);
  });
  const float* values = values_of(result, {rows, manifest_.logits_size});
  const auto width = static_cast<std::size_t>(manifest_.logits_size);
  std::vector<float> copy(logits.empty() && !greedy.empty() ? token_ids.size() * width : 0);
  const std::span<float> wanted = copy.empty() ? logits : copy;
  if (!wanted.empty()) device_->copy(wanted.data(), values, wanted.size_bytes());
  for (std::size_t i = 0; i < greedy.size(); ++i) {
    greedy[i] = sample_checked(wanted.subspan(i * width, width), MEGALODON_GREEDY, 0);
  }
}

void Engine::step(std::span<const std::int64_t> token_ids, const CacheView& cache,
                  std::span<const megalodon_sampling> samplings, std::span<const std::uint64_t> indices,
                  std::span<std::int64_t> next) const {
  const auto is_greedy = [](const megalodon_sampling& one) { return one.temperature == 0.0; };
  if (std::ranges::all_of(samplings, is_greedy)) return decode(token_ids, cache, {}, next);
  const auto width = static_cast<std::size_t>(manifest_.logits_size);
  std::vector<float> logits(token_ids.size() * width);
  decode(token_ids, cache, logits);
  for (std::size_t i = 0; i < next.size(); ++i) {
    next[i] = sample_checked(std::span(logits).subspan(i * width, width), samplings[i], indices[i]);
  }
}

void Engine::check_ids(std::span<const std::int64_t> token_ids) const {
  require(!token_ids.empty(), "there are no tokens to feed; give at least one");
  const auto [low, high] = std::ranges::minmax(token_ids);
  require(low >= 0 && high < manifest_.vocab_size,
          "token ids must be in 0.." + std::to_string(manifest_.vocab_size - 1) + ", got " + std::to_string(low) +
              ".." + std::to_string(high) + "; is this the model's tokenizer?");
}

void Engine::check_batch(std::int64_t batch) const {
  require(batch >= 1 && batch <= manifest_.max_batch,
          "a batch of " + std::to_string(batch) + " is outside 1.." + std::to_string(manifest_.max_batch) +
              ", which this bundle was exported for; export with a larger --max-batch, or run smaller batches");
}

}  // namespace megalodon::impl
