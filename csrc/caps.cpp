// _caps: what this build and this CPU can do. No tensors, no torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/nf4_codebook.h"
#include "cpu/isa.h"

#ifndef PEFTKERN_CUDA_ARCHS
#define PEFTKERN_CUDA_ARCHS ""
#endif

namespace py = pybind11;
using namespace peftkern;

PYBIND11_MODULE(_caps, m) {
    m.doc() = "Capabilities of this build of peftkern and of the CPU it runs on.";
    m.def(
        "isa",
        [] {
            std::string error;
            const Isa isa = current_isa(&error);
            if (!error.empty()) throw std::runtime_error(error);
            return std::string(isa_name(isa));
        },
        "The CPU instruction set in use (PEFTKERN_ISA forces one).");
    m.def(
        "isas",
        [] {
            std::map<std::string, bool> result;
            for (int i = 0; i < kIsaCount; ++i)
                result[isa_name(static_cast<Isa>(i))] =
                    isa_supported(static_cast<Isa>(i)) && isa_built(static_cast<Isa>(i));
            return result;
        },
        "Each instruction set level and whether it runs here: this CPU has it, and this build.");
    m.def(
        "built_isas",
        [] {
            std::vector<std::string> result;
            for (int i = 0; i < kIsaCount; ++i)
                if (isa_built(static_cast<Isa>(i))) result.emplace_back(isa_name(static_cast<Isa>(i)));
            return result;
        },
        "The instruction set levels of this build, lowest first (PEFTKERN_LEVELS of CMakeLists.txt).");
    m.def(
        "nf4_codebook", [] { return std::vector<float>(kNf4Codebook, kNf4Codebook + 16); },
        "The 16 NF4 code values (QLoRA, arXiv 2305.14314, appendix E), ascending.");
    m.def(
        "nf4_scaled_codebook",
        [](const std::string& dtype) {
            if (dtype != "bfloat16" && dtype != "float16")
                throw std::invalid_argument("nf4_scaled_codebook: dtype must be bfloat16 or float16, got " + dtype);
            const bool bf16 = dtype == "bfloat16";
            const unsigned short* bits = bf16 ? kNf4Bf16Codebook : kNf4Fp16Codebook;
            return std::make_pair(std::vector<int>(bits, bits + 16), bf16 ? kNf4Bf16Scale : kNf4Fp16Scale);
        },
        "The codebook times a factor, as the 16 bits of each value, and the factor, by which absmax is divided.");
    m.def(
        "cuda_archs", [] { return std::string(PEFTKERN_CUDA_ARCHS); },
        "The CUDA architectures compiled, such as \"80,90a\"; empty without CUDA kernels.");
    m.def(
        "build_info", [] { return std::map<std::string, std::string>{{"compiler", __VERSION__}}; },
        "Compiler and build options.");
}
