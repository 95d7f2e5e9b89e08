// The 16 NF4 code values (QLoRA, arXiv 2305.14314, appendix E): the only copy, used by C++, CUDA and (through _caps)
// Python.
#pragma once

namespace peftkern {

alignas(64) static constexpr float kNf4Codebook[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// The codebook scaled by kNf4Bf16Scale and rounded to bf16. Rounding the plain codebook leaves a common error of 2e-2
// on inputs with a mean, since the 16 errors do not cancel; at this scale they do (1.4e-3). absmax is divided by the
// scale.
static constexpr float kNf4Bf16Scale = 1.286945f;
alignas(32) static constexpr unsigned short kNf4Bf16Codebook[16] = {
    0xbfa5, 0xbf65, 0xbf2d, 0xbf02, 0xbebb, 0xbe74, 0xbdf0, 0x0000,
    0x3dd2, 0x3e54, 0x3ea2, 0x3edf, 0x3f11, 0x3f39, 0x3f6e, 0x3fa5,
};

// The same for fp16, whose plain codebook leaves 1.4e-3, this one 2.2e-4.
static constexpr float kNf4Fp16Scale = 1.458945f;
alignas(32) static constexpr unsigned short kNf4Fp16Codebook[16] = {
    0xbdd6, 0xbc10, 0xba21, 0xb89c, 0xb6a4, 0xb450, 0xb040, 0x0000,
    0x2f6e, 0x3383, 0x35bf, 0x37e3, 0x3925, 0x3a91, 0x3c38, 0x3dd6,
};

}  // namespace peftkern
