// What a manifest says about a model and its AOTInductor programs, checked for sense.
#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "runtime/tensor.hpp"

namespace megalodon::impl {

// The cache's count of the tokens of each row.
inline constexpr const char* kPosition = "final.position";

// What to do about programs for another machine.
inline constexpr const char* kExportAgain = "; export it again on this machine: megalodon-export aoti";

// One tensor of the cache; its rows (streams) are independent, and contiguous.
struct CacheTensor {
  std::string name;
  std::vector<std::int64_t> row_shape;
  const DType* dtype;
  double fill;
  bool ring;  // of slots that tokens overwrite in turn; everything else is small
  std::size_t row_bytes;
};

enum class InputKind { argument, cache, stage, weight };

struct StageInput {
  InputKind kind;
  std::string name;  // `{layer}` in it stands for the number of the layer
  const DType* dtype;
  std::vector<std::int64_t> shape;  // of a weight
  std::string file, tensor;         // of a weight: where it is
};

struct Stage {
  std::string file;  // of the bundle, in aoti/
  std::vector<StageInput> inputs;
  std::vector<std::string> outputs;
};

struct ProgramEntry {
  Stage begin, layer, end;
};

struct Manifest {
  std::string device, architecture;  // that the programs are for: cpu or cuda; x86_64, or sm_90 for a GPU
  std::int64_t vocab_size, logits_size, max_batch, max_length, granule, layers, chunk;
  std::optional<std::int64_t> bos, eos;
  std::string layout_id;
  bool all_logits;
  std::map<std::string, std::int64_t> files;  // of the bundle: their sizes
  std::vector<CacheTensor> cache;
  std::map<std::string, ProgramEntry> programs;
};

// Reads what `read_bundle` returned. MEGALODON_UNAVAILABLE if the programs are not for this CPU, this libtorch or this
// library; MEGALODON_BAD_BUNDLE if the manifest makes no sense.
Manifest read_manifest(const std::filesystem::path& folder, const nlohmann::json& manifest);

// The name of a tensor of a layer, from that for all layers.
std::string numbered(std::string name, std::int64_t layer);

}  // namespace megalodon::impl
