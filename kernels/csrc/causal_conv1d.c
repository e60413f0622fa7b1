/* Depth-wise causal convolution, forward and backward, for float and double; see causal_conv1d_kernels.h. */
#include <stdlib.h>
#include <string.h>

#include "causal_conv1d.h"

#define EXPORT __attribute__((visibility("default")))
#define JOIN(a, b, c) a##_##b##_##c
#define NAME2(x, type, isa) JOIN(x, type, isa)
#define NAME(x) NAME2(x, TYPE, ISA)
#define ROWS 16 /* channels a task: the floats of a cache line */

#define T float
#define TYPE f32
#define LANES 16
#define ISA base
#define TARGET
#include "causal_conv1d_kernels.h"
#undef ISA
#undef TARGET

#if defined(__x86_64__)
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "causal_conv1d_kernels.h"
#undef ISA
#undef TARGET
#endif

#undef T
#undef TYPE
#undef LANES
#define T double
#define TYPE f64
#define LANES 8
#define ISA base
#define TARGET
#include "causal_conv1d_kernels.h"

/* Runs one pass; `isa` caps the instruction set (0 base, from 1 on AVX2). Returns 0, or 1 if memory ran out. */
EXPORT int visionssm_causal_conv1d(const conv_args *a, int is_double, int backward, int isa) {
    if (is_double) return run_f64_base(a, backward);
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run_f32_avx2(a, backward);
#endif
    (void)isa;
    return run_f32_base(a, backward);
}
