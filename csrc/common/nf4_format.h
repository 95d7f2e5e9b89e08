// Constants of the NF4 format and of its quantisers, which are bitsandbytes'.
#pragma once

#include <stdint.h>

namespace peftkern {

constexpr int64_t kMinBlockSize = 32, kMaxBlockSize = 4096;
constexpr int64_t kNestedBlockSize = 256;
constexpr int64_t kNestedMapSize = 256;

// absmax - offset is rounded to this many points of [-1, 1] before the nearest value of the map is taken.
constexpr int64_t kGridSize = 65536;

// Below these absmax is taken as this: 1 / absmax would be too coarse or infinite. bitsandbytes' value for weights.
constexpr float kMinAbsmax = 1e-38f;
constexpr float kMinNestedAbsmax = 3e-39f;

}  // namespace peftkern
