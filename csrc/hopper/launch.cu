// Tensor maps, made by the driver's own function, which is looked up when the first one is needed.
#include "launch.cuh"

#include <string>

namespace r1kern::hopper {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw CudaError(std::string("CUDA, ") + what + ": " + cudaGetErrorString(error) + " (" +
                  cudaGetErrorName(error) + ")");
}

int cuda_version() { return CUDART_VERSION; }

namespace {

constexpr int DEPTH = 128;

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                         cudaEnableDefault, &result),
        "looking for cuTensorMapEncodeTiled");
  if (result != cudaDriverEntryPointSuccess || !found) {
    throw CudaError("CUDA: this driver has no cuTensorMapEncodeTiled; update it to 525 or newer");
  }
  return reinterpret_cast<Encode>(found);
}

CUtensorMap encode(CUtensorMapDataType type, int rank, Address address, const cuuint64_t* sizes,
                   const cuuint64_t* byte_strides, const cuuint32_t* box,
                   CUtensorMapSwizzle swizzle) {
  static const Encode make = find_encode();
  CUtensorMap map;
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult result =
      make(&map, type, rank, reinterpret_cast<void*>(address), sizes, byte_strides, box, steps,
           CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw CudaError("CUDA refused a tensor map of " + std::to_string(sizes[1]) + " x " +
                    std::to_string(sizes[0]) + " (CUresult " + std::to_string(result) + ")");
  }
  return map;
}

}  // namespace

CUtensorMap bytes_map(Address address, std::initializer_list<Int> sizes, int rows) {
  cuuint64_t extents[3], strides[3];
  cuuint64_t bytes = 1;
  int rank = 0;
  for (const Int size : sizes) {
    extents[rank] = static_cast<cuuint64_t>(size);
    strides[rank++] = bytes *= static_cast<cuuint64_t>(size);
  }
  const cuuint32_t box[] = {DEPTH, static_cast<cuuint32_t>(rows), 1};
  return encode(CU_TENSOR_MAP_DATA_TYPE_UINT8, rank, address, extents, strides, box,
                CU_TENSOR_MAP_SWIZZLE_128B);
}

CUtensorMap floats_map(Address address, Int columns, Int rows, Int stride, int box) {
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t bytes[] = {static_cast<cuuint64_t>(stride) * sizeof(float)};
  const cuuint32_t boxes[] = {static_cast<cuuint32_t>(box), 1};
  return encode(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, address, extents, bytes, boxes,
                CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace r1kern::hopper
