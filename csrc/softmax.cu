// Softmax on CUDA: a warp per row up to 1024 columns, held in registers; above that a block per
// row, with the scores kept in shared memory where they fit and computed again where not.
//
// Memory: forward 2 * rows * columns elements, backward 3, plus the mask; rows too long for shared
// memory are read twice. Accumulates in float32, or float64 for float64. No atomics and a fixed
// order of reduction: the same inputs give the same bits.
//
// A row is cut into slots of 16 bytes that are aligned in memory, so that every slot but the first
// and the last is one vector access whatever the row's length; slot s holds the columns from
// s * kVector - shift on. NaN needs no branch: the maximum skips it and exp keeps it, so the sum
// and with it the whole row become NaN, as does a row that holds +inf.

#include "softmax.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <limits>
#include <type_traits>

namespace tilewise::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kWarpRowColumns = 1024;
constexpr int kMaxThreads = 1024;
constexpr int kPlainSharedBytes = 48 * 1024;  // more than this must be asked for

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ---- arithmetic -------------------------------------------------------------------------------

template <typename T>
__device__ Accumulate<T> widen(T value) {
  return static_cast<Accumulate<T>>(value);
}

template <typename T>
__device__ T narrow(Accumulate<T> value) {
  return static_cast<T>(value);
}

__device__ float exponential(float x) { return __expf(x); }
// Out of line: 32 of them side by side in one kernel would spill.
__device__ __noinline__ double exponential(double x) { return exp(x); }

// fmax returns the number where the other is NaN.
struct Max {
  static constexpr double kIdentity = -std::numeric_limits<double>::infinity();
  __device__ static float of(float a, float b) { return fmaxf(a, b); }
  __device__ static double of(double a, double b) { return fmax(a, b); }
};

struct Sum {
  static constexpr double kIdentity = 0.0;
  template <typename A>
  __device__ static A of(A a, A b) {
    return a + b;
  }
};

// What to subtract before exp: in a row of nothing but -inf and NaN, 0, so that each exp is 0 or
// NaN and never exp(-inf - -inf).
template <typename A>
__device__ A base_of(A highest) {
  return highest == static_cast<A>(Max::kIdentity) ? A(0) : highest;
}

template <typename A>
__device__ A inverse_of(A sum) {
  return sum == A(0) ? A(0) : A(1) / sum;
}

// Both operations commute, so that every lane ends with the same bits.
template <typename Op, typename A>
__device__ A warp_reduce(A value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// To be called by every thread of a block of whole warps.
template <typename Op, typename A>
__device__ A block_reduce(A value) {
  __shared__ A partial[kMaxThreads / kWarp];
  const int lane = threadIdx.x % kWarp;
  value = warp_reduce<Op>(value);
  __syncthreads();  // the readers of the previous call are done
  if (lane == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  const bool present = lane < blockDim.x / kWarp;
  return warp_reduce<Op>(present ? partial[lane] : static_cast<A>(Op::kIdentity));
}

// ---- slots ------------------------------------------------------------------------------------

// The columns before `written`'s row begins inside its first aligned 16 bytes.
template <typename T>
__device__ int shift_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kVector<T>);
}

template <typename T>
struct alignas(16) Vector {
  T lanes[kVector<T>];
};

// Index is int in the warp kernels, to save registers, and int64_t in the block kernels.
// Columns outside [0, columns) read as 0.
template <typename Index, typename T, typename A>
__device__ void read(const T* row, Index first, Index columns, bool vectors,
                     A (&out)[kVector<T>]) {
  if (vectors && first >= 0 && first + kVector<T> <= columns) {
    const Vector<T> values = *reinterpret_cast<const Vector<T>*>(row + first);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) out[v] = widen(values.lanes[v]);
    return;
  }
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) {
    const Index column = first + v;
    out[v] = column >= 0 && column < columns ? widen(row[column]) : A(0);
  }
}

template <typename Index, typename T, typename A>
__device__ void write(T* row, Index first, Index columns, bool vectors,
                      const A (&values)[kVector<T>]) {
  if (vectors && first >= 0 && first + kVector<T> <= columns) {
    Vector<T> packed;
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) packed.lanes[v] = narrow<T>(values[v]);
    *reinterpret_cast<Vector<T>*>(row + first) = packed;
    return;
  }
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) {
    const Index column = first + v;
    if (column >= 0 && column < columns) row[column] = narrow<T>(values[v]);
  }
}

// ---- forward ----------------------------------------------------------------------------------

template <typename T, typename Index>
struct ForwardRow {
  using A = Accumulate<T>;
  const SoftmaxForward& args;
  const T* x;
  T* y;
  int64_t mask_offset;
  Index active;
  int shift;
  bool vectors;

  __device__ ForwardRow(const SoftmaxForward& args, int64_t row) : args(args) {
    const RowOffset at = offset_of(args.rows, row);
    x = static_cast<const T*>(args.x) + at.operand[0];
    y = static_cast<T*>(args.y) + row * args.columns;
    mask_offset = at.operand[1];
    active = static_cast<Index>(attended(args, row));
    vectors = shift_of(x) == shift_of(y);
    shift = vectors ? shift_of(y) : 0;
  }

  __device__ Index first(Index slot) const { return slot * kVector<T> - shift; }
  __device__ Index columns() const { return static_cast<Index>(args.columns); }

  __device__ A masked(A score, Index column) const {
    const int64_t i = mask_offset + column * args.mask_column_stride;
    if (args.mask_kind == Mask::boolean) {
      return static_cast<const unsigned char*>(args.mask)[i] ? score
                                                             : static_cast<A>(Max::kIdentity);
    }
    if (args.mask_kind == Mask::f32) return score + static_cast<const float*>(args.mask)[i];
    return score + widen(static_cast<const T*>(args.mask)[i]);
  }

  // scale * x, masked; -inf outside the columns that the row attends to.
  __device__ void scores(Index slot, A (&z)[kVector<T>]) const {
    const Index begin = first(slot);
    if (begin < active) read(x, begin, columns(), vectors, z);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) {
      const Index column = begin + v;
      const bool inside = column >= 0 && column < active;
      z[v] = inside ? z[v] * static_cast<A>(args.scale) : static_cast<A>(Max::kIdentity);
      if (inside && args.mask_kind != Mask::none) z[v] = masked(z[v], column);
    }
  }

  __device__ void store(Index slot, const A (&values)[kVector<T>]) const {
    write(y, first(slot), columns(), vectors, values);
  }
};

template <typename T, int kSlots>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 1)
    forward_warp(const __grid_constant__ SoftmaxForward args) {
  using A = Accumulate<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t{gridDim.x} * kWarpsPerBlock;
  int64_t row = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp;
  for (; row < args.num_rows; row += step) {
    const ForwardRow<T, int> at(args, row);
    A z[kSlots][kVector<T>];
    A highest = static_cast<A>(Max::kIdentity);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      at.scores(s * kWarp + lane, z[s]);
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) highest = Max::of(highest, z[s][v]);
    }
    const A base = base_of(warp_reduce<Max>(highest));
    A sum = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) {
        z[s][v] = exponential(z[s][v] - base);
        sum += z[s][v];
      }
    }
    const A inverse = inverse_of(warp_reduce<Sum>(sum));
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) z[s][v] *= inverse;
      at.store(s * kWarp + lane, z[s]);
    }
  }
}

// Where thread-private values live in shared memory: neighbours in neighbouring banks, and each
// thread reads only what it wrote, so that no barrier is needed.
template <typename T>
__device__ int64_t cache_index(int64_t slot, int v) {
  return (slot / blockDim.x * kVector<T> + v) * blockDim.x + threadIdx.x;
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    forward_block(const __grid_constant__ SoftmaxForward args, const bool cached) {
  using A = Accumulate<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* const cache = reinterpret_cast<A*>(shared);

  for (int64_t row = blockIdx.x; row < args.num_rows; row += gridDim.x) {
    const ForwardRow<T, int64_t> at(args, row);
    const int64_t slots = (args.columns + at.shift + kVector<T> - 1) / kVector<T>;
    A z[kVector<T>];
    A highest = static_cast<A>(Max::kIdentity), sum = 0;  // this thread's own, kept in step
    for (int64_t slot = threadIdx.x; slot < slots; slot += blockDim.x) {
      at.scores(slot, z);
      A higher = highest;
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) higher = Max::of(higher, z[v]);
      const A base = base_of(higher);
      sum *= exponential(highest - base);
      highest = higher;
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) {
        sum += exponential(z[v] - base);
        if (cached) cache[cache_index<T>(slot, v)] = z[v];
      }
    }
    const A base = base_of(block_reduce<Max>(highest));
    const A inverse = inverse_of(block_reduce<Sum>(sum * exponential(highest - base)));
    for (int64_t slot = threadIdx.x; slot < slots; slot += blockDim.x) {
      if (!cached) at.scores(slot, z);
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) {
        if (cached) z[v] = cache[cache_index<T>(slot, v)];
        z[v] = exponential(z[v] - base) * inverse;
      }
      at.store(slot, z);
    }
  }
}

// ---- backward ---------------------------------------------------------------------------------

template <typename T, typename Index>
struct BackwardRow {
  using A = Accumulate<T>;
  const SoftmaxBackward& args;
  const T *grad, *y;
  T* dx;
  int shift;
  bool vectors;

  __device__ BackwardRow(const SoftmaxBackward& args, int64_t row) : args(args) {
    grad = static_cast<const T*>(args.grad) + offset_of(args.rows, row).operand[0];
    y = static_cast<const T*>(args.y) + row * args.columns;
    dx = static_cast<T*>(args.dx) + row * args.columns;
    vectors = shift_of(grad) == shift_of(dx) && shift_of(y) == shift_of(dx);
    shift = vectors ? shift_of(dx) : 0;
  }

  __device__ Index first(Index slot) const { return slot * kVector<T> - shift; }
  __device__ Index columns() const { return static_cast<Index>(args.columns); }

  // Reads a slot and returns its part of sum(grad * y).
  __device__ A load(Index slot, A (&g)[kVector<T>], A (&p)[kVector<T>]) const {
    read(grad, first(slot), columns(), vectors, g);
    read(y, first(slot), columns(), vectors, p);
    A dot = 0;
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) dot += g[v] * p[v];
    return dot;
  }

  __device__ void store(Index slot, A dot, A (&g)[kVector<T>], const A (&p)[kVector<T>]) const {
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) {
      g[v] = static_cast<A>(args.scale) * p[v] * (g[v] - dot);
    }
    write(dx, first(slot), columns(), vectors, g);
  }
};

template <typename T, int kSlots>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 1)
    backward_warp(const __grid_constant__ SoftmaxBackward args) {
  using A = Accumulate<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t{gridDim.x} * kWarpsPerBlock;
  int64_t row = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp;
  for (; row < args.num_rows; row += step) {
    const BackwardRow<T, int> at(args, row);
    A g[kSlots][kVector<T>], p[kSlots][kVector<T>];
    A dot = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) dot += at.load(s * kWarp + lane, g[s], p[s]);
    dot = warp_reduce<Sum>(dot);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) at.store(s * kWarp + lane, dot, g[s], p[s]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    backward_block(const __grid_constant__ SoftmaxBackward args, const bool cached) {
  using A = Accumulate<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* const cache = reinterpret_cast<A*>(shared);

  for (int64_t row = blockIdx.x; row < args.num_rows; row += gridDim.x) {
    const BackwardRow<T, int64_t> at(args, row);
    const int64_t slots = (args.columns + at.shift + kVector<T> - 1) / kVector<T>;
    const int64_t rounds = (slots + blockDim.x - 1) / blockDim.x;
    A* const cached_y = cache + rounds * blockDim.x * kVector<T>;
    A g[kVector<T>], p[kVector<T>];
    A dot = 0;
    for (int64_t slot = threadIdx.x; slot < slots; slot += blockDim.x) {
      dot += at.load(slot, g, p);
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) {
        if (cached) cache[cache_index<T>(slot, v)] = g[v];
        if (cached) cached_y[cache_index<T>(slot, v)] = p[v];
      }
    }
    dot = block_reduce<Sum>(dot);
    for (int64_t slot = threadIdx.x; slot < slots; slot += blockDim.x) {
      if (!cached) at.load(slot, g, p);
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) {
        if (cached) g[v] = cache[cache_index<T>(slot, v)];
        if (cached) p[v] = cached_y[cache_index<T>(slot, v)];
      }
      at.store(slot, dot, g, p);
    }
  }
}

// ---- launch -----------------------------------------------------------------------------------

const char* message_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The kernels loop over rows, so that a grid cut at the limit still does them all.
unsigned grid_for(int64_t blocks) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, INT_MAX));
}

template <typename T, typename Args>
const char* launch_warp(void (*kernel)(Args), const Args& args, cudaStream_t stream) {
  const int64_t blocks = (args.num_rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  kernel<<<grid_for(blocks), kWarp * kWarpsPerBlock, 0, stream>>>(args);
  return message_of(cudaGetLastError());
}

// A block per row; `values_cached` values of each column are kept in shared memory if they fit.
template <typename T, typename Args>
const char* launch_block(void (*kernel)(Args, bool), const Args& args, int values_cached,
                         cudaStream_t stream) {
  const int threads = args.columns <= 4096 ? 256 : args.columns <= 16384 ? 512 : kMaxThreads;
  const int64_t slots = (args.columns + 2 * (kVector<T> - 1)) / kVector<T>;
  const int64_t rounds = (slots + threads - 1) / threads;
  const int64_t bytes =
      rounds * threads * kVector<T> * values_cached * int64_t{sizeof(Accumulate<T>)};

  int device = 0, most = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return message_of(error);

  const bool cached = bytes + static_cast<int64_t>(attributes.sharedSizeBytes) <= most;
  const int shared = cached ? static_cast<int>(bytes) : 0;
  if (shared > kPlainSharedBytes - static_cast<int64_t>(attributes.sharedSizeBytes)) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return message_of(error);
  }
  kernel<<<grid_for(args.num_rows), threads, shared, stream>>>(args, cached);
  return message_of(cudaGetLastError());
}

// The fewest slots per lane that hold a row. A row whose length is no multiple of a vector may
// begin inside its first slot, so that the last few lengths below 1024 go to the block kernel.
template <typename T, int kSlots>
bool fits_warp(int64_t columns) {
  const int64_t before = columns % kVector<T> == 0 ? 0 : kVector<T> - 1;
  return columns + before <= kSlots * kWarp * kVector<T>;
}

template <typename T, int kSlots = 1>
const char* forward(const SoftmaxForward& args, cudaStream_t stream) {
  if (fits_warp<T, kSlots>(args.columns)) {
    return launch_warp<T>(forward_warp<T, kSlots>, args, stream);
  }
  if constexpr (kSlots * kWarp * kVector<T> < kWarpRowColumns) {
    return forward<T, 2 * kSlots>(args, stream);
  } else {
    return launch_block<T>(forward_block<T>, args, 1, stream);
  }
}

template <typename T, int kSlots = 1>
const char* backward(const SoftmaxBackward& args, cudaStream_t stream) {
  if (fits_warp<T, kSlots>(args.columns)) {
    return launch_warp<T>(backward_warp<T, kSlots>, args, stream);
  }
  if constexpr (kSlots * kWarp * kVector<T> < kWarpRowColumns) {
    return backward<T, 2 * kSlots>(args, stream);
  } else {
    return launch_block<T>(backward_block<T>, args, 2, stream);
  }
}

}  // namespace

const char* softmax_forward(const SoftmaxForward& args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case Float::f32: return forward<float>(args, on);
    case Float::f64: return forward<double>(args, on);
    case Float::bf16: return forward<__nv_bfloat16>(args, on);
    case Float::f16: return forward<__half>(args, on);
  }
  return "unknown dtype";
}

const char* softmax_backward(const SoftmaxBackward& args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case Float::f32: return backward<float>(args, on);
    case Float::f64: return backward<double>(args, on);
    case Float::bf16: return backward<__nv_bfloat16>(args, on);
    case Float::f16: return backward<__half>(args, on);
  }
  return "unknown dtype";
}

}  // namespace tilewise::cuda
