// The launchers of the NF4 GEMMs. For dX, x is dY [rows, out_features] and y is dX [rows, in_features]; the weight's
// sizes keep their names, and there is no epilogue.
#pragma once

#include "cuda/launchers.h"
#include "cuda/nf4_gemm_plan.h"

namespace peftkern {

// linear.splits is plan.slices. dX also needs out_features % 8 == 0.
struct CudaGemm {
    CudaLinear linear;
    GemmPlan plan;
};

extern "C" {
int peftkern_cuda_nf4_gemm_sm80(const CudaGemm* gemm, const DeviceTraits* traits, int device, void* stream);
int peftkern_cuda_nf4_gemm_sm90(const CudaGemm* gemm, int device, void* stream);
int peftkern_cuda_nf4_gemm_backward_sm80(const CudaGemm* gemm, const DeviceTraits* traits, int device, void* stream);
int peftkern_cuda_nf4_gemm_backward_sm90(const CudaGemm* gemm, int device, void* stream);
}

// By the kernels of the device that gemm.plan was made for. Where y is empty nothing is launched, nor described to TMA,
// which knows no empty matrix.
inline int launch_gemm(const CudaGemm& gemm, bool backward, const DeviceTraits& traits, int device, void* stream) {
    const CudaLinear& linear = gemm.linear;
    if (linear.rows == 0 || (backward ? linear.in_features : linear.out_features) == 0) return 0;
    if (has_wgmma(traits))
        return backward ? peftkern_cuda_nf4_gemm_backward_sm90(&gemm, device, stream)
                        : peftkern_cuda_nf4_gemm_sm90(&gemm, device, stream);
    return backward ? peftkern_cuda_nf4_gemm_backward_sm80(&gemm, &traits, device, stream)
                    : peftkern_cuda_nf4_gemm_sm80(&gemm, &traits, device, stream);
}

}  // namespace peftkern
