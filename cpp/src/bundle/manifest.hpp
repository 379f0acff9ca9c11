// A bundle's manifest as a typed value: the model, its cache and its AOTInductor programs.
#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "bundle/dtype.hpp"

namespace megalodon::impl {

// The name of the cache tensor that counts the tokens of each row.
inline constexpr const char* kPosition = "final.position";
// The end of the names of cache tensors that hold variances.
inline constexpr const char* kVariance = ".norm_var";

// The machine and the torch version that the programs were compiled for.
struct Target {
  std::string device;                     // "cpu" or "cuda"
  std::string architecture;               // of the CPU, "x86_64", or of the GPU, "sm_90"
  std::vector<std::string> cpu_features;  // as /proc/cpuinfo names them; none for a GPU
  std::string torch;                      // "2.13.0"
};

// One tensor of the cache, of shape (B, ...row_shape). A row is the state of one stream; rows are contiguous.
struct CacheTensor {
  std::string name;
  std::vector<std::int64_t> row_shape;
  const DType* dtype;
  double fill;  // the value of every element in a fresh stream
  bool ring;    // a ring cache: one slot per token of a chunk, overwritten chunk after chunk; other tensors are small
  std::size_t row_bytes;
  std::size_t slot_axis = 0;  // of a ring: the axis of `row_shape` that counts its slots
};

enum class InputKind { argument, cache, stage, weight };

// An input of a stage. In `name` and `tensor`, "{layer}" stands for the index of the layer.
struct StageInput {
  InputKind kind;
  std::string name;
  const DType* dtype;
  std::vector<std::int64_t> shape;  // weights only
  std::string file, tensor;         // weights only: the safetensors file, and the name of the tensor in it
};

// One compiled library: the part of a program before the layers, one layer, or the part after the layers.
struct Stage {
  std::string file;  // in the bundle's folder aoti/
  std::vector<StageInput> inputs;
  std::vector<std::string> outputs;
};

struct ProgramEntry {
  Stage begin, layer, end;
};

struct Manifest {
  Target target;
  std::int64_t vocab_size, logits_size;  // token ids that may be fed; logits that a token gives
  std::int64_t max_batch;                // rows of a call
  std::int64_t max_length;               // tokens of a row in one call of prefill
  std::int64_t length_multiple;          // prefill takes this many tokens, or a multiple of it
  std::int64_t layers, chunk;            // chunk: tokens of an attention chunk, and slots of a ring cache
  std::optional<std::int64_t> bos_token_id, eos_token_id;
  std::string layout_id;                      // of the cache
  bool all_logits;                            // prefill returns the logits of every position, not of the last alone
  std::string model_id;                       // a fingerprint of the weights: the sha256 of their file
  std::map<std::string, std::int64_t> files;  // sizes in bytes
  std::vector<CacheTensor> cache;
  std::map<std::string, ProgramEntry> programs;  // "prefill", "decode", and for some bundles "decode_one"
};

// Converts the JSON that `read_bundle` returned. `folder` is for messages alone. Error MEGALODON_BAD_BUNDLE if the
// manifest contradicts itself, MEGALODON_UNAVAILABLE if it describes something that this library does not run.
Manifest read_manifest(const std::filesystem::path& folder, const nlohmann::json& manifest);

// Replaces "{layer}" in a name by the index of a layer.
std::string numbered(std::string name, std::int64_t layer);

}  // namespace megalodon::impl
