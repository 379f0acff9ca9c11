#include "engine.hpp"

#include <algorithm>
#include <cstring>
#include <set>
#include <thread>

#include "bundle.hpp"
#include "error.hpp"
#include "file.hpp"

namespace megalodon::impl {
namespace {

constexpr const char* kTokenizer = "tokenizer.json";

}  // namespace

Engine::Engine(const std::filesystem::path& folder, bool check_hashes, int concurrency) {
  require(concurrency >= 0, "concurrency is " + std::to_string(concurrency) + ", expected 1 or more, or 0");
  const nlohmann::json manifest = read_bundle(folder, check_hashes);
  manifest_ = read_manifest(folder, manifest);
  if (manifest["files"].contains(kTokenizer)) {
    try {
      tokenizer_.emplace(parse_json(read_file(folder / kTokenizer), folder / kTokenizer));
    } catch (const Error& error) {
      no_tokenizer_ = error.what();
    }
  } else {
    no_tokenizer_ = std::string("the bundle has no ") + kTokenizer + "; pass token ids";
  }
  weights_.emplace(folder);
  const int concurrent =
      concurrency > 0 ? concurrency : static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  std::set<std::string> files;
  for (const auto& [name, entry] : manifest_.programs) {
    programs_.try_emplace(name, folder, entry, manifest_, *weights_, concurrent);
    for (const Stage* stage : {&entry.begin, &entry.layer, &entry.end}) {
      for (const StageInput& input : stage->inputs) files.insert(input.file);
    }
  }
  files.erase("");
  for (const std::string& file : files) weight_bytes_ += manifest["files"][file]["size"].get<std::int64_t>();
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

CacheView Engine::new_cache(std::int64_t rows) const {
  CacheView view(std::make_shared<CacheBlock>(manifest_.cache, rows), 0, rows);
  view.reset();
  return view;
}

void Engine::prefill(std::span<const std::int64_t> token_ids, const CacheView& cache, std::span<float> logits) const {
  require(!token_ids.empty(), "there are no tokens to feed; give at least one");
  check_ids(token_ids);
  const DType& int64 = *dtype_by_name("int64");
  const auto width = static_cast<std::size_t>(manifest_.logits_size);
  const auto granule = static_cast<std::size_t>(manifest_.granule);
  while (!token_ids.empty()) {
    const std::size_t valid = std::min(token_ids.size(), static_cast<std::size_t>(manifest_.max_length));
    std::vector<std::int64_t> padded(token_ids.begin(), token_ids.begin() + static_cast<std::ptrdiff_t>(valid));
    padded.resize((valid + granule - 1) / granule * granule, 0);
    const auto length = static_cast<std::int64_t>(padded.size());
    std::int64_t count = static_cast<std::int64_t>(valid);
    const Tensor ids = Tensor::over(padded.data(), std::array{std::int64_t{1}, length}, int64);
    const Tensor lengths = Tensor::over(&count, std::array{std::int64_t{1}}, int64);
    const Tensor result = programs_.at("prefill").run(ids, &lengths, cache);
    std::vector<std::int64_t> shape{1, manifest_.logits_size};
    if (manifest_.all_logits) shape.insert(shape.begin() + 1, length);
    const auto* values = static_cast<const float*>(result.contiguous(*dtype_by_name("float32"), shape));
    if (manifest_.all_logits) values += (valid - 1) * width;
    token_ids = token_ids.subspan(valid);
    if (token_ids.empty() && !logits.empty()) std::memcpy(logits.data(), values, width * sizeof(float));
  }
}

void Engine::decode(std::span<const std::int64_t> token_ids, const CacheView& cache, std::span<float> logits) const {
  check_ids(token_ids);
  std::vector<std::int64_t> ids(token_ids.begin(), token_ids.end());
  const std::int64_t rows = cache.rows();
  const bool one = rows == 1 && programs_.contains("decode_one");
  const Tensor tensor = Tensor::over(ids.data(), std::array{rows}, *dtype_by_name("int64"));
  const Tensor result = programs_.at(one ? "decode_one" : "decode").run(tensor, nullptr, cache);
  const std::array shape{rows, manifest_.logits_size};
  const void* values = result.contiguous(*dtype_by_name("float32"), shape);
  if (!logits.empty()) std::memcpy(logits.data(), values, logits.size_bytes());
}

void Engine::check_ids(std::span<const std::int64_t> token_ids) const {
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
