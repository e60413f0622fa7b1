/* Sums of dilated depth-wise convolutions, forward and backward, for float and double; see dilated_conv2d_kernels.h. */
#include "dilated_conv2d.h"

#define CACHED (1 << 18) /* bytes of a slab of rows, which fit into a second-level cache beside other things */
#define ARGS dilated_args
#define KERNELS "dilated_conv2d_kernels.h"
#include "instances.h"

EXPORT int visionssm_dilated_conv2d(const dilated_args *a, int is_double, int backward, int isa) {
    return run_best(a, is_double, backward, isa);
}
