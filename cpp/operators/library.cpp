// The operator library: `SessionOptions.register_custom_ops_library` loads it from any of ONNX Runtime's languages.
//
// It has one operator, megalodon.Launch, for every operation of the exported graphs: the node's attribute `program` says
// which kernels run. A new kernel therefore needs no change here.
#include <string>

#include "operator.hpp"
#include "refusal.hpp"

#ifndef MEGALODON_PROVIDER
#define MEGALODON_PROVIDER "CUDAExecutionProvider"
#endif

namespace {

using namespace megalodon;

constexpr const char* kDomain = "megalodon";
ort::Api* api = nullptr;

// Runs an action; what it throws becomes a status of ONNX Runtime.
template <typename Action>
ort::Status* guarded(const Action& action) {
  std::string text;
  try {
    action();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const std::exception& error) {
    text = error.what();
  } catch (...) {
    text = "an unknown error in the operator library";
  }
  return ort::call<ort::Status*>(api, ort::kCreateStatus, ort::kFail, text.c_str());
}

ort::Status* create(const ort::CustomOp*, ort::Api* given, const ort::KernelInfo* info, void** kernel) {
  return guarded([&] { *kernel = new Operator(given, info); });
}

ort::Status* compute(void* kernel, ort::KernelContext* context) {
  return guarded([&] { static_cast<const Operator*>(kernel)->run(context); });
}

void destroy(void* kernel) { delete static_cast<Operator*>(kernel); }

const char* name(const ort::CustomOp*) { return "Launch"; }
const char* provider(const ort::CustomOp*) { return MEGALODON_PROVIDER; }
size_t one(const ort::CustomOp*) { return 1; }
int least(const ort::CustomOp*) { return 1; }
int heterogeneous(const ort::CustomOp*) { return 0; }
int any_type(const ort::CustomOp*, size_t) { return ort::kAnyType; }
int variadic(const ort::CustomOp*, size_t) { return ort::kVariadic; }
int on_the_device(const ort::CustomOp*, size_t) { return 0; }  // OrtMemTypeDefault
int first_version(const ort::CustomOp*) { return 1; }
int last_version(const ort::CustomOp*) { return ort::kMaxVersion; }
size_t no_pairs(int**, int**) { return 0; }
void release_pairs(int*, int*) {}

const ort::CustomOp kLaunch = {
    ort::kApiVersion, nullptr,  name,     provider,      any_type,      one,           any_type, one,           nullptr,
    destroy,          variadic, variadic, on_the_device, least,         heterogeneous, least,    heterogeneous, create,
    compute,          nullptr,  first_version, last_version, no_pairs,  release_pairs, no_pairs, release_pairs,
};

}  // namespace

#ifdef _WIN32
#define MEGALODON_EXPORT __declspec(dllexport)
#else
#define MEGALODON_EXPORT __attribute__((visibility("default")))
#endif

extern "C" MEGALODON_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  static ort::CustomOpDomain* domain = nullptr;  // lives as long as the process: sessions may outlive the options
  ort::Api* given = base->get_api(ort::kApiVersion);
  if (given == nullptr) return nullptr;  // older than 1.18: the session then says that it does not know the operator
  api = given;
  return guarded([&] {
    const auto check = [](ort::Status* status) {
      if (status != nullptr) throw StatusError{status};
    };
    if (domain == nullptr) {
      ort::CustomOpDomain* made = nullptr;
      check(ort::call<ort::Status*>(api, ort::kCreateCustomOpDomain, kDomain, &made));
      check(ort::call<ort::Status*>(api, ort::kCustomOpDomainAdd, made, &kLaunch));
      domain = made;
    }
    check(ort::call<ort::Status*>(api, ort::kAddCustomOpDomain, options, domain));
  });
}
