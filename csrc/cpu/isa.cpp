// Compiled without -m flags: this file runs on every x86-64 CPU, before it is known what the CPU can do.
#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#ifndef PEFTKERN_LEVELS
#error "CMakeLists.txt defines PEFTKERN_LEVELS, the levels of this build, such as \"scalar,avx512bf16\""
#endif

namespace peftkern {
namespace {
constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512bf16"};
}  // namespace

const char* isa_name(Isa isa) {
    return kNames[static_cast<int>(isa)];
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
    const bool avx2 =
        !!__builtin_cpu_supports("avx2") && !!__builtin_cpu_supports("fma") && !!__builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && !!__builtin_cpu_supports("avx512f") && !!__builtin_cpu_supports("avx512bw") &&
                        !!__builtin_cpu_supports("avx512vl") && !!__builtin_cpu_supports("avx512dq");
    const bool avx512bf16 = avx512 && !!__builtin_cpu_supports("avx512bf16");
    switch (isa) {
        case Isa::kScalar:
            return true;
        case Isa::kAvx2:
            return avx2;
        case Isa::kAvx512:
            return avx512;
        case Isa::kAvx512Bf16:
            return avx512bf16;
    }
    return false;
#else
    return isa == Isa::kScalar;
#endif
}

bool isa_built(Isa isa) {
    static const std::string built = "," PEFTKERN_LEVELS ",";
    return built.find(std::string(",") + isa_name(isa) + ",") != std::string::npos;
}

Isa current_isa(std::string* error) {
    error->clear();
    const char* forced = std::getenv("PEFTKERN_ISA");
    if (forced && *forced) {
        for (int i = 0; i < kIsaCount; ++i) {
            if (std::strcmp(forced, kNames[i]) != 0) continue;
            if (!isa_supported(static_cast<Isa>(i)))
                *error = std::string("PEFTKERN_ISA names an instruction set that this CPU lacks, got ") + forced;
            else if (!isa_built(static_cast<Isa>(i)))
                *error =
                    std::string("PEFTKERN_ISA must be one of this build's levels (" PEFTKERN_LEVELS "), got ") + forced;
            return static_cast<Isa>(i);
        }
        *error = std::string("PEFTKERN_ISA must be scalar, avx2, avx512 or avx512bf16, got ") + forced;
        return Isa::kScalar;
    }
    static const Isa best = [] {
        for (int i = kIsaCount - 1; i > 0; --i)
            if (isa_supported(static_cast<Isa>(i)) && isa_built(static_cast<Isa>(i))) return static_cast<Isa>(i);
        return Isa::kScalar;
    }();
    return best;
}

}  // namespace peftkern
