#include "runtime/engine.hpp"

#include <algorithm>
#include <array>
#include <set>
#include <thread>

#include "bundle/contents.hpp"
#include "bundle/json.hpp"
#include "error.hpp"
#include "runtime/logits.hpp"
#include "runtime/target.hpp"

namespace megalodon::impl {
namespace {

constexpr const char* kTokenizer = "tokenizer.json";
constexpr int kMaxConcurrency = 1024;  // each call that may run at the same time has a copy of the program's state

// The process that opened the first bundle.
pid_t first_process() {
  static const pid_t first = getpid();
  return first;
}

// A JSON beside a library lists operators that it calls by name, through an interface of torch's that Python provides.
void check_operators(const Manifest& manifest) {
  for (const auto& [name, size] : manifest.files) {
    if (name.starts_with("aoti/") && name.ends_with(".json")) {
      throw unavailable(name.substr(0, name.size() - 5) +
                        " calls operators of torch by name, which this library cannot; export the bundle again with "
                        "--ema-prefill blocked, or run it from Python");
    }
  }
}

}  // namespace

// ---- opening a bundle -----------------------------------------------------------------------------------------------

Engine::Engine(const std::filesystem::path& folder, bool check_hashes, int concurrency) : process_(first_process()) {
  require_same_process();
  require(concurrency >= 0 && concurrency <= kMaxConcurrency,
          "concurrency is " + std::to_string(concurrency) + ", expected 1.." + std::to_string(kMaxConcurrency) +
              ", or 0 for one call per processor");
  manifest_ = open_manifest(folder, check_hashes);
  check_target(manifest_.target);
  check_operators(manifest_);
  load_tokenizer(folder);
  device_ = open_device(manifest_.target.device, manifest_.target.architecture);
  weights_.emplace(folder, *device_);
  const auto processors = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  load_programs(folder, concurrency > 0 ? concurrency : processors);
}

void Engine::load_tokenizer(const std::filesystem::path& folder) {
  if (!manifest_.files.contains(kTokenizer)) {
    no_tokenizer_ = std::string("the bundle has no ") + kTokenizer + "; pass token ids";
    return;
  }
  try {
    tokenizer_.emplace(parse_json(read_file(folder / kTokenizer), folder / kTokenizer));
  } catch (const Error& error) {
    no_tokenizer_ = error.what();
  }
}

void Engine::load_programs(const std::filesystem::path& folder, int concurrency) {
  std::set<std::string> files;
  for (const auto& [name, entry] : manifest_.programs) {
    programs_.try_emplace(name, entry, ProgramSource{folder, manifest_, *weights_, *device_, concurrency});
    for (const Stage* stage : {&entry.begin, &entry.layer, &entry.end}) {
      for (const StageInput& input : stage->inputs) {
        if (input.kind == InputKind::weight) files.insert(input.file);
      }
    }
  }
  if (!device_->is_concurrent() && !decode_program(1).has_next_tokens()) {
    throw unavailable("the bundle is from before this library: its programs for a GPU do not choose tokens" +
                      std::string(kExportAgain));
  }
  for (const std::string& file : files) weight_bytes_ += manifest_.files.at(file);
}

std::int64_t Engine::state_bytes() const {
  std::size_t bytes = 0;
  for (const CacheTensor& tensor : manifest_.cache) bytes += tensor.row_bytes;
  return static_cast<std::int64_t>(bytes);
}

void Engine::require_same_process() const {
  if (is_same_process()) return;
  throw unavailable(
      "this process was forked after the bundle was loaded, and compiled programs cannot run in a fork; load the "
      "bundle after the fork, in each process");
}

const Tokenizer& Engine::tokenizer() const {
  if (!tokenizer_) throw unavailable(no_tokenizer_);
  return *tokenizer_;
}

// ---- memory for states ----------------------------------------------------------------------------------------------

CacheRow Engine::new_cache() const {
  CacheRow row = *CacheRow::acquire(new_block(1), 0);
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
      free_spares();
      block = std::make_unique<CacheBlock>(manifest_.cache, *device_, rows);
    }
  }
  return {block.release(), [this](CacheBlock* unused) { store_spare(std::unique_ptr<CacheBlock>(unused)); }};
}

std::unique_ptr<CacheBlock> Engine::take_spare(std::int64_t rows) const {
  const std::lock_guard lock(spare_mutex_);
  auto found = spares_.extract(rows);
  return found ? std::move(found.mapped()) : nullptr;
}

void Engine::store_spare(std::unique_ptr<CacheBlock> block) const noexcept {
  const std::lock_guard lock(spare_mutex_);
  std::swap(spares_[block->rows()], block);
}

void Engine::free_spares() const {
  const std::lock_guard lock(spare_mutex_);
  spares_.clear();
}

// ---- running programs -----------------------------------------------------------------------------------------------

const float* Engine::address_of(const Tensor& logits, std::vector<std::int64_t> shape) const {
  return static_cast<const float*>(logits.contiguous(*dtype_by_name("float32"), shape));
}

void Engine::prefill(std::span<const std::span<const std::int64_t>> token_ids, const CacheView& cache,
                     std::span<float> logits) const {
  std::size_t longest = 0;
  for (const auto& ids : token_ids) {
    check_ids(ids);
    longest = std::max(longest, ids.size());
  }
  const auto most = static_cast<std::size_t>(manifest_.max_length);
  for (std::size_t start = 0; start < longest; start += most) prefill_part(token_ids, start, longest, cache, logits);
}

// One call of the program: feeds the tokens of each row from `start` on, `max_length` at most. Rows that have fewer are
// padded. Rows whose last token is fed get their logits.
void Engine::prefill_part(std::span<const std::span<const std::int64_t>> token_ids, std::size_t start,
                          std::size_t longest, const CacheView& cache, std::span<float> logits) const {
  const auto multiple = static_cast<std::size_t>(manifest_.length_multiple);
  const auto most = static_cast<std::size_t>(manifest_.max_length);
  const auto width = static_cast<std::size_t>(manifest_.logits_size);
  const auto rows = static_cast<std::int64_t>(token_ids.size());
  const std::size_t length = (std::min(longest - start, most) + multiple - 1) / multiple * multiple;
  std::vector<std::int64_t> padded(token_ids.size() * length), lengths(token_ids.size());
  for (std::size_t i = 0; i < token_ids.size(); ++i) {
    const auto rest = token_ids[i].subspan(std::min(start, token_ids[i].size()));
    lengths[i] = static_cast<std::int64_t>(std::min(rest.size(), most));
    std::copy_n(rest.begin(), lengths[i], padded.begin() + static_cast<std::ptrdiff_t>(i * length));
  }
  const DeviceTensor ids(*device_, padded, std::array{rows, static_cast<std::int64_t>(length)});
  const DeviceTensor valid(*device_, lengths, std::array{rows});
  Tensor result;
  device_->run([&](void* cuda_stream) {
    result = programs_.at("prefill").run({&ids.tensor(), &valid.tensor()}, cache, cuda_stream);
  });
  std::vector<std::int64_t> shape{rows, manifest_.logits_size};
  if (manifest_.all_logits) shape.insert(shape.begin() + 1, static_cast<std::int64_t>(length));
  const float* values = address_of(result, shape);
  for (std::size_t i = 0; i < token_ids.size() && !logits.empty(); ++i) {
    if (lengths[i] == 0 || token_ids[i].size() > start + most) continue;
    const std::size_t position = manifest_.all_logits ? i * length + static_cast<std::size_t>(lengths[i]) - 1 : i;
    device_->copy(logits.data() + i * width, values + position * width, width * sizeof(float));
  }
}

const Program& Engine::decode_program(std::int64_t rows) const {
  return programs_.at(rows == 1 && programs_.contains("decode_one") ? "decode_one" : "decode");
}

CapturedStep* Engine::captured_step(const CacheView& cache) const {
  const std::int64_t rows = cache.rows();
  return cache.block()->captured_step(cache.first(), rows, [&] {
    const auto step = [&](const Tensor& ids, const Tensor& next_tokens, void* cuda_stream) {
      Tensor logits = decode_program(rows).run({.token_ids = &ids, .next_tokens = &next_tokens}, cache, cuda_stream);
      address_of(logits, {rows, manifest_.logits_size});
      return logits;
    };
    return device_->capture(step, rows, cache.memory(), manifest_.logits_size);
  });
}

void Engine::decode(std::span<const std::int64_t> token_ids, const CacheView& cache, std::span<float> logits,
                    std::span<std::int64_t> next_tokens) const {
  check_ids(token_ids);
  if (CapturedStep* step = captured_step(cache)) return step->run(token_ids, logits, next_tokens);
  const std::int64_t rows = cache.rows();
  const Program& program = decode_program(rows);
  const DeviceTensor ids(*device_, token_ids, std::array{rows});
  std::optional<DeviceTensor> unused;  // the program writes it; the tokens are chosen from the logits below
  if (program.has_next_tokens()) {
    unused.emplace(*device_, std::vector<std::int64_t>(2 * token_ids.size()), std::array{std::int64_t{2}, rows});
  }
  const Program::Arguments arguments{.token_ids = &ids.tensor(), .next_tokens = unused ? &unused->tensor() : nullptr};
  Tensor result;
  device_->run([&](void* cuda_stream) { result = program.run(arguments, cache, cuda_stream); });
  const float* values = address_of(result, {rows, manifest_.logits_size});
  const auto width = static_cast<std::size_t>(manifest_.logits_size);
  std::vector<float> own(logits.empty() && !next_tokens.empty() ? token_ids.size() * width : 0);
  const std::span<float> wanted = own.empty() ? logits : own;
  if (!wanted.empty()) device_->copy(wanted.data(), values, wanted.size_bytes());
  choose_tokens(next_tokens, [&](std::size_t row) {
    return argmax(wanted.subspan(row * width, width), MEGALODON_FAILED, row);
  });
}

void Engine::check_ids(std::span<const std::int64_t> token_ids, const std::string& whose) const {
  require(!token_ids.empty(), "there are no tokens to feed; give at least one");
  for (const std::int64_t id : token_ids) {
    if (id >= 0 && id < manifest_.vocab_size) continue;
    throw invalid("token id " + std::to_string(id) + whose + " is outside 0.." +
                  std::to_string(manifest_.vocab_size - 1) + "; is this the model's tokenizer?");
  }
}

void Engine::check_batch(std::size_t batch) const {
  require(batch >= 1 && batch <= static_cast<std::size_t>(manifest_.max_batch),
          "a batch of " + std::to_string(batch) + " is outside 1.." + std::to_string(manifest_.max_batch) +
              ", which this bundle was exported for; export with a larger --max-batch, or run smaller batches");
}

}  // namespace megalodon::impl
