// Kernels compiled once per CPU capability, and the choice between the copies at run time.
//
// A kernel file X.cpp puts its functions in namespace tilewise::CPU_CAPABILITY; X.h declares them
// with TILEWISE_PER_CAPABILITY, and X_op.cpp calls TILEWISE_BEST(function)(arguments).
#pragma once

#ifdef TILEWISE_WITH_X86
#define TILEWISE_PER_CAPABILITY(...)        \
  namespace DEFAULT { __VA_ARGS__ }         \
  namespace AVX2 { __VA_ARGS__ }            \
  namespace AVX512 { __VA_ARGS__ }
#define TILEWISE_BEST(function)                                                  \
  (::tilewise::cpu_capability() == ::tilewise::Capability::avx512 ? AVX512::function \
   : ::tilewise::cpu_capability() == ::tilewise::Capability::avx2 ? AVX2::function   \
                                                                  : DEFAULT::function)
#else
#define TILEWISE_PER_CAPABILITY(...) namespace DEFAULT { __VA_ARGS__ }
#define TILEWISE_BEST(function) (DEFAULT::function)
#endif

namespace tilewise {

enum class Capability { standard, avx2, avx512 };

// The best of this build that PyTorch's own choice (ATEN_CPU_CAPABILITY) allows; fixed once asked.
Capability cpu_capability();

}  // namespace tilewise
