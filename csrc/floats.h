// The float types that the kernels take. No ATen here: the CUDA compiler reads it without PyTorch.
#pragma once

namespace tilewise {

enum class Float { f32, f64, bf16, f16 };

}  // namespace tilewise
