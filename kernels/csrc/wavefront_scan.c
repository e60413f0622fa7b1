/* The two-axis scan of Mamba2D, forward and backward, for float and double; see wavefront_scan_kernels.h. */
#include "wavefront_scan.h"

#define ARGS wavefront_args
#define KERNELS "wavefront_scan_kernels.h"
#include "instances.h"

EXPORT int visionssm_wavefront_scan(const wavefront_args *a, int is_double, int backward, int isa) {
    return run_best(a, is_double, backward, isa);
}
