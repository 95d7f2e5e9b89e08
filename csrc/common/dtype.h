// The element types that kernels take.
#pragma once

namespace peftkern {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

}  // namespace peftkern
