// Host side of a kernel: tensor maps through the driver's own entry point (no link to libcuda), and the launch.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace m1 {

using Stream = cudaStream_t;

constexpr int kNoTensorMapEncoder = -1;
constexpr int kTensorMapRefused = -2;
constexpr int kNoInstantiation = -3;

// Types of a tensor map by their bytes.
enum Element : uint32_t { kBf16 = 2, kFp32 = 4 };

// A tensor of three dims, innermost first, of bf16 or fp32, cut into boxes whose rows are 128 bytes, 128-byte swizzled.
// Elements of a box outside the tensor are read as zero and never written. strides_bytes: of dims 1 and 2.
inline int encode_map_3d(CUtensorMap* map, const void* address, const uint64_t (&dims)[3],
                         const uint64_t (&strides_bytes)[2], const uint32_t (&box)[3], Element element = kBf16) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static void* entry = nullptr;
  if (entry == nullptr) {
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (status != cudaSuccess) return status;
    if (found != cudaDriverEntryPointSuccess || entry == nullptr) return kNoTensorMapEncoder;
  }
  const uint32_t element_strides[3] = {1, 1, 1};
  const auto encode = [&] {
    return reinterpret_cast<Encode>(entry)(
        map, element == kFp32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(address), dims, strides_bytes, box, element_strides,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode();
  // A thread whose first CUDA call this is, such as autograd's, has no current context yet: the runtime makes one.
  int device = 0;
  if (result == CUDA_ERROR_INVALID_CONTEXT && cudaGetDevice(&device) == cudaSuccess &&
      cudaSetDevice(device) == cudaSuccess)
    result = encode();
  return result == CUDA_SUCCESS ? 0 : kTensorMapRefused;
}

inline int zero_device_memory(void* address, size_t bytes, void* stream) {
  return cudaMemsetAsync(address, 0, bytes, static_cast<Stream>(stream));
}

// Launches `blocks` blocks in clusters of `together` and reports the launch's own error.
template <typename Parameters>
int launch_together(int together, void (*kernel)(Parameters), int blocks, int threads, int shared_bytes, void* stream,
                    const Parameters& parameters) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(together), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<Stream>(stream);
  config.attrs = &cluster;
  config.numAttrs = together > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, parameters);
}
template <typename Parameters>
int launch(void (*kernel)(Parameters), int blocks, int threads, int shared_bytes, void* stream,
           const Parameters& parameters) {
  return launch_together(1, kernel, blocks, threads, shared_bytes, stream, parameters);
}
template <typename Parameters>
int launch_pairs(void (*kernel)(Parameters), int pairs, int threads, int shared_bytes, void* stream,
                 const Parameters& parameters) {
  return launch_together(2, kernel, 2 * pairs, threads, shared_bytes, stream, parameters);
}

}  // namespace m1
