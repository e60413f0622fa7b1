/* Includes KERNELS, a file of kernels, once for each scalar type and every instruction set worth having.
 *
 * Needs: ARGS, the type of its arguments; the kernels define NAME(run)(const ARGS *, int backward).
 *
 * Plain C with GNU vector extensions: no Python, no PyTorch, no intrinsics but minimum and maximum. The kernels are compiled
 * once for each instruction set; the processor is asked which to use, so one build runs everywhere.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define JOIN(a, b, c) a##_##b##_##c
#define NAME2(x, type, isa) JOIN(x, type, isa)
#define NAME(x) NAME2(x, TYPE, ISA)

/* States that decay towards zero become subnormal, which costs many processors a hundred cycles an operation. */
#if defined(__x86_64__)
static unsigned flush_denormals(void) {
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
}
static void restore_denormals(unsigned mode) { _mm_setcsr(mode); }
#else
static unsigned flush_denormals(void) { return 0; }
static void restore_denormals(unsigned mode) { (void)mode; }
#endif

#define T float
#define TI int32_t
#define TYPE f32
#define LANES 16
#define IS_FLOAT 1

#define ISA base
#define TARGET
#define CLAMP(x, low, high) do { \
        x = SELECT(x < (low), (V){0} + (low), x); \
        x = SELECT(x > (high), (V){0} + (high), x); \
    } while (0)
#include "vectors.h"
#include KERNELS
#undef ISA
#undef TARGET
#undef CLAMP

#if defined(__x86_64__)
/* the second operand of these instructions comes back where one is NaN */
#define CLAMP(x, low, high) do { \
        __m256 *half = (__m256 *)&(x); \
        for (int h = 0; h < 2; h++) \
            half[h] = _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), half[h])); \
    } while (0)
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "vectors.h"
#include KERNELS
#undef ISA
#undef TARGET

#undef CLAMP
#define CLAMP(x, low, high) \
    (x = (V)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)(x))))
#define ISA avx512
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")))
#include "vectors.h"
#include KERNELS
#undef ISA
#undef TARGET
#endif

#undef T
#undef TI
#undef TYPE
#undef LANES
#undef IS_FLOAT
#define T double
#define TI int64_t
#define TYPE f64
#define LANES 8
#define IS_FLOAT 0
#define ISA base
#define TARGET
#include "vectors.h"
#include KERNELS

static int best_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* Runs one pass; `isa` caps the instruction set (0 base, 1 AVX2, 2 AVX-512). Returns 0, or 1 if memory ran out. */
static int run_best(const ARGS *a, int is_double, int backward, int isa) {
    if (is_double) return run_f64_base(a, backward);
    if (isa > best_isa()) isa = best_isa();
#if defined(__x86_64__)
    if (isa == 2) return run_f32_avx512(a, backward);
    if (isa == 1) return run_f32_avx2(a, backward);
#endif
    return run_f32_base(a, backward);
}
