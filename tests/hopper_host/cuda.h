// The part of CUDA's driver interface that csrc/hopper names, on the host: tensor maps.
#pragma once

#include <cstdint>

using cuuint32_t = std::uint32_t;
using cuuint64_t = std::uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_FLOAT32 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {
  const std::uint8_t* address;
  std::int64_t rank, itemsize;
  std::int64_t sizes[3], strides[3];  // strides in bytes, that of the innermost included
  std::int64_t box[3];
  bool swizzled;
};

// Refuses what the driver's own refuses (CUDA Driver API, cuTensorMapEncodeTiled).
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                       void* address, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  const std::int64_t itemsize = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 4;
  *map = {static_cast<const std::uint8_t*>(address), rank, itemsize, {1, 1, 1}, {}, {1, 1, 1},
          swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  bool right = reinterpret_cast<std::uintptr_t>(address) % 16 == 0 && rank >= 1 && rank <= 3;
  for (cuuint32_t i = 0; right && i < rank; ++i) {
    map->sizes[i] = static_cast<std::int64_t>(sizes[i]);
    map->strides[i] = i == 0 ? itemsize : static_cast<std::int64_t>(strides[i - 1]);
    map->box[i] = box[i];
    right = sizes[i] >= 1 && sizes[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
    if (i > 0) {
      right = right && map->strides[i] % 16 == 0 && strides[i - 1] < 1ull << 40 &&
              map->strides[i] >= map->sizes[i - 1] * map->strides[i - 1];
    }
  }
  const std::int64_t inner = map->box[0] * itemsize;
  right = right && inner % 16 == 0 && (!map->swizzled || inner <= 128);
  return right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
