/* Includes KERNELS, a file of kernels, once for each scalar type and every instruction set worth having.
 *
 * Needs: ARGS, the type of its arguments; the kernels define NAME(run)(const ARGS *, int backward). With FLOAT_ONLY there
 * are none for double.
 *
 * Plain C with GNU vector extensions: no Python, no PyTorch, and intrinsics only for minimum, maximum, fused multiply-add,
 * constants and the turning over of squares. The kernels are compiled once for each instruction set; the processor is asked
 * which to use, so one build runs everywhere.
 */
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define EXPORT __attribute__((visibility("default")))
#define JOIN(a, b, c) a##_##b##_##c
#define NAME2(x, type, isa) JOIN(x, type, isa)
#define NAME(x) NAME2(x, TYPE, ISA)

/* States that decay towards zero become subnormal, which costs many processors a hundred cycles an operation. */
#if defined(__x86_64__)
__attribute__((unused)) static unsigned flush_denormals(void) {
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
}
__attribute__((unused)) static void restore_denormals(unsigned mode) { _mm_setcsr(mode); }
#else
__attribute__((unused)) static unsigned flush_denormals(void) { return 0; }
__attribute__((unused)) static void restore_denormals(unsigned mode) { (void)mode; }
#endif

/* All threads or one, as PyTorch does it: the runtime ends the threads that a smaller team has no place for, and the next
 * larger one, ours or PyTorch's, has to start them again, which takes longer than many a call. */
__attribute__((unused)) static int team(int64_t threads, int64_t tasks) { return tasks > 1 ? (int)threads : 1; }

/* Waits until a counter of another thread is beyond a number. */
__attribute__((unused)) static void wait_beyond(const int64_t *counter, int64_t number) {
    for (int looks = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) <= number; looks++) {
        if (looks > 200) sched_yield();
#if defined(__x86_64__)
        else _mm_pause();
#endif
    }
}

#if defined(__x86_64__)
/* Turns a square of 8 x 8 numbers over: row i of `dst` is column i of `src`. */
__attribute__((target("avx2,fma"), unused))
static inline void transpose8(float *dst, int64_t dst_stride, const float *src, int64_t src_stride) {
    __m256 row[8], pair[8], quad[8];
    for (int i = 0; i < 8; i++) row[i] = _mm256_loadu_ps(src + i * src_stride);
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            quad[i + 2 * j] = _mm256_shuffle_ps(pair[i + j], pair[i + 2 + j], 0x44);
            quad[i + 2 * j + 1] = _mm256_shuffle_ps(pair[i + j], pair[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(dst + i * dst_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
        _mm256_storeu_ps(dst + (i + 4) * dst_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
    }
}
#define TRANSPOSE transpose8

/* Adds up each of 8 rows of 8 or 16 numbers: halves, then halves of that, and so on. */
__attribute__((target("avx2,fma"), always_inline, unused))
static inline void sum_rows8(float *dst, const float *src, int64_t src_stride, int lanes) {
    __m256 row[8], four[4], two[2];
    for (int i = 0; i < 8; i++) {
        row[i] = _mm256_loadu_ps(src + i * src_stride);
        if (lanes == 16) row[i] = _mm256_add_ps(row[i], _mm256_loadu_ps(src + i * src_stride + 8));
    }
    for (int i = 0; i < 4; i++)
        four[i] = _mm256_add_ps(_mm256_permute2f128_ps(row[i], row[i + 4], 0x20),
                                _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
    for (int i = 0; i < 2; i++)
        two[i] = _mm256_add_ps(_mm256_unpacklo_ps(four[2 * i], four[2 * i + 1]),
                               _mm256_unpackhi_ps(four[2 * i], four[2 * i + 1]));
    _mm256_storeu_ps(dst, _mm256_add_ps(_mm256_shuffle_ps(two[0], two[1], 0x44), _mm256_shuffle_ps(two[0], two[1], 0xee)));
}
#define SUM_ROWS sum_rows8
#endif

#define T float
#define TI int32_t
#define TYPE f32
#define IS_FLOAT 1

#define ISA base
#define LANES 4
#define BLOCK 0
#define FMA(a, b, c) ((a) * (b) + (c))
#define SPLAT(x) ((V){x, x, x, x})
#define HOLD(x) SPLAT(x)
#define TARGET
#define CLAMP(x, low, high) do { \
        x = SELECT(x < (low), (V){0} + (low), x); \
        x = SELECT(x > (high), (V){0} + (high), x); \
    } while (0)
#include "vectors.h"
#include KERNELS
#undef ISA
#undef LANES
#undef BLOCK
#undef FMA
#undef SPLAT
#undef HOLD
#undef TARGET
#undef CLAMP

#if defined(__x86_64__)
#define BLOCK 8
/* the second operand of these instructions comes back where one is NaN */
#define CLAMP(x, low, high) \
    (x = (V)_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), (__m256)(x))))
#define FMA(a, b, c) ((V)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define SPLAT(x) ((V)_mm256_set1_ps(x))
#define HOLD(x) ({ V held = SPLAT(x); __asm__("" : "+x"(held)); held; })
#define ISA avx2
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#include "vectors.h"
#include KERNELS
#undef ISA
#undef LANES
#undef TARGET
#undef FMA
#undef SPLAT
#undef HOLD
#undef CLAMP

#define CLAMP(x, low, high) \
    (x = (V)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)(x))))
#define FMA(a, b, c) ((V)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define SPLAT(x) ((V)_mm512_set1_ps(x))
#define HOLD(x) SPLAT(x) /* thirty-two registers hold all */
#define ISA avx512
#define LANES 16
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")))
#include "vectors.h"
#include KERNELS
#undef ISA
#undef LANES
#undef TARGET
#undef FMA
#undef SPLAT
#undef HOLD
#undef CLAMP
#undef BLOCK
#endif

#ifndef FLOAT_ONLY
#undef T
#undef TI
#undef TYPE
#undef IS_FLOAT
#define T double
#define TI int64_t
#define TYPE f64
#define LANES 8
#define BLOCK 0
#define FMA(a, b, c) ((a) * (b) + (c))
#define IS_FLOAT 0
#define ISA base
#define TARGET
#include "vectors.h"
#include KERNELS
#endif

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
#ifndef FLOAT_ONLY
    if (is_double) return run_f64_base(a, backward);
#endif
    if (isa > best_isa()) isa = best_isa();
#if defined(__x86_64__)
    if (isa == 2) return run_f32_avx512(a, backward);
    if (isa == 1) return run_f32_avx2(a, backward);
#endif
    return run_f32_base(a, backward);
}
