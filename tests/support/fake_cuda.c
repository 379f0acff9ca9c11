/* A CUDA driver without a GPU: the functions that the operator library calls. Each is written to a log, and a launch is
   given to the test, which may compute what the kernel would. Built as libcuda.so.1. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  int id, padding;
  union {
    char bytes[64];
    int flag;
  } value;
} Attribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
} Config;
typedef void (*Callback)(const char* kernel, const unsigned* grid, unsigned threads, unsigned shared, int pdl, void** args);

static Callback callback;
static int capability = 90, has_context = 1, failing_launch, copies;
static char contexts[1000], *context_now = contexts;

void fake_reset(Callback given, int gpu, int context, int launch_error) {
  callback = given, capability = gpu, has_context = context, failing_launch = launch_error, copies = 0;
  context_now++; /* another context, in which no kernel is loaded */
}
int fake_copies(void) { return copies; }

int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuCtxGetCurrent(void** context) { return *context = has_context ? context_now : NULL, 0; }
int cuCtxGetDevice(int* device) { return *device = 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  return *value = attribute == 75 ? capability / 10 : capability % 10, 0;
}
/* An image begins with the kernel's name. */
int cuModuleLoadData(void** module, const void* image) { return *module = strdup(image), 0; }
int cuModuleGetFunction(void** function, void* module, const char* symbol) {
  (void)symbol;
  return *function = module, 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  (void)function;
  return attribute == 8 && value <= 232448 ? 0 : 1;
}
int cuLaunchKernelEx(const Config* config, void* function, void** args, void** extra) {
  int pdl = config->count == 1 && config->attributes[0].id == 6 && config->attributes[0].value.flag == 1;
  if (failing_launch || extra || config->block[1] != 1 || config->block[2] != 1) return failing_launch;
  callback(function, config->grid, config->block[0], config->shared, pdl, args);
  return 0;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  (void)stream;
  memcpy((void*)to, (const void*)from, bytes);
  copies++;
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  (void)error;
  return *text = "an error of the fake driver", 0;
}
