// The extension module: what was built, and which copy of the CPU kernels runs. The ops are in the
// files *_op.cpp: schemas, argument checks, choice of kernel.

#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#include "capability.h"

namespace tilewise {

Capability cpu_capability() {
  static const Capability chosen = [] {
    const std::string capability = at::get_cpu_capability();
#ifdef TILEWISE_WITH_X86
    if (capability == "AVX512") return Capability::avx512;
    if (capability == "AVX2") return Capability::avx2;
#endif
    return Capability::standard;
  }();
  return chosen;
}

namespace {

pybind11::dict build_info() {
  pybind11::list capabilities;
#ifdef TILEWISE_WITH_X86
  capabilities.append("AVX512");
  capabilities.append("AVX2");
#endif
  capabilities.append("DEFAULT");
  const Capability best = cpu_capability();
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["cpu_capabilities"] = capabilities;
  info["cpu_capability"] = best == Capability::avx512 ? "AVX512"
                           : best == Capability::avx2 ? "AVX2"
                                                      : "DEFAULT";
#ifdef TILEWISE_WITH_CUDA
  info["cuda"] = true;
  info["cuda_architectures"] = TILEWISE_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["cuda_architectures"] = "";
#endif
  return info;
}

}  // namespace
}  // namespace tilewise

PYBIND11_MODULE(_C, m) {
  m.doc() = "tilewise's native ops; importing it registers torch.ops.tilewise_native.";
  m.def("build_info", tilewise::build_info, "What this extension was built with, as a dict.");
}
