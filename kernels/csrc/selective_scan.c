/* Routed selective scan, forward and backward, for float and double; see selective_scan_kernels.h. */
#include "selective_scan.h"

#define ARGS scan_args
#define KERNELS "selective_scan_kernels.h"
#include "instances.h"

EXPORT int visionssm_abi(void) { return 6; }

EXPORT const char *visionssm_isa(void) {
    static const char *const names[] = {"base", "avx2", "avx512"};
    return names[best_isa()];
}

EXPORT int visionssm_selective_scan(const scan_args *a, int is_double, int backward, int isa) {
    return run_best(a, is_double, backward, isa);
}
