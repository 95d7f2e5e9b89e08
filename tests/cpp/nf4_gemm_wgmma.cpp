// Which kernels a build has for a device of 9.0.
#include <stdio.h>

#include "cuda/nf4_gemm_plan.h"

int main() {
    peftkern::DeviceTraits device = {};
    device.compute_capability = 90;
    puts(peftkern::has_wgmma(device) ? "9.0: wgmma" : "9.0: mma.sync");
}
