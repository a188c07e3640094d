// The library registers kernels only: each op's files do it themselves, schemas live in Python.
// This file keeps the target non-empty in a build where no op has a C++ kernel, and checks the ABI.
#include <torch/csrc/stable/library.h>

static_assert(TORCH_FEATURE_VERSION >= TORCH_VERSION_2_11_0,
              "grace needs the stable ABI of torch 2.11");
