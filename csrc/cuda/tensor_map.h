// TMA's descriptions of the operands, encoded by the driver without linking to it: at every call (about 1 us), since an
// address may be another tensor's at the next.
#pragma once

#include <cuda.h>

#include "cuda/launchers.h"

namespace peftkern {

// Boxes of `tokens` rows of x and 64 of its `depth` columns, in the 128-byte swizzle. A cudaError_t.
int encode_tokens(CUtensorMap* map, const CudaLinear& linear, int64_t depth, int tokens);

// Boxes of `rows` rows of codes and `bytes` of their bytes, 64 or 128, in the swizzle of that width. A cudaError_t.
int encode_codes(CUtensorMap* map, const CudaLinear& linear, int rows, int bytes);

}  // namespace peftkern
