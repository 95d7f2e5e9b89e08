// Which instruction set the CPU kernels run on: detected once, or forced by PEFTKERN_ISA.
#pragma once

#include <string>

namespace peftkern {

enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
constexpr int kIsaCount = 4;

const char* isa_name(Isa isa);
// The CPU has it.
bool isa_supported(Isa isa);
// CMakeLists.txt compiled its kernels (PEFTKERN_LEVELS); those of the others are null.
bool isa_built(Isa isa);

// The level in use. PEFTKERN_ISA is read at every call (tests change it); an unknown, unsupported or unbuilt name gives
// an error text through `error` and the return value is then meaningless.
Isa current_isa(std::string* error);

}  // namespace peftkern
