// Facts about the build, for `grace info`. A target of its own: pybind11 and torch's stable headers
// do not mix in one file.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = GRACE_BUILD_TORCH;
  info["cuda"] = GRACE_BUILD_CUDA;  // nvcc's version, empty in a CPU build
  info["cuda_archs"] = GRACE_BUILD_CUDA_ARCHS;
  info["compiler"] = GRACE_BUILD_COMPILER;
  info["build_type"] = GRACE_BUILD_TYPE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "How grace's compiled library was built.";
  m.def("build_info", &build_info,
        "Versions and architectures of the build: torch, cuda, cuda_archs, compiler, build_type.");
}
