/* Depth-wise causal convolution, forward and backward, for float and double; see causal_conv1d_kernels.h. */
#include "causal_conv1d.h"

#define ROWS 16 /* channels a task: the floats of a cache line */
#define ARGS conv_args
#define KERNELS "causal_conv1d_kernels.h"
#include "instances.h"

EXPORT int visionssm_causal_conv1d(const conv_args *a, int is_double, int backward, int isa) {
    return run_best(a, is_double, backward, isa);
}
