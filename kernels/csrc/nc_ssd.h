/* Arguments of the non-causal SSD, all of them float; packed by `ARGUMENTS` in visionssm_kernels/nc_ssd/cpu.py.
 *
 * Strides count elements, in the order of the axes; the last one of maps and matrices is 1. Everything without strides is
 * contiguous.
 */
#ifndef VISIONSSM_NC_SSD_H
#define VISIONSSM_NC_SSD_H

#include <stdint.h>

typedef struct {
    int64_t batch, length, heads, size, groups, state, positive, threads;
    const void *x, *dt, *A, *B, *C, *D; /* (B, L, M, P); (B, L, M); (M); (B, L, G, N) twice; (M) or null */
    const void *dout;                   /* (B, L, M, P), read in the backward pass only */
    int64_t x_stride[4], dt_stride[3], B_stride[4], C_stride[4], dout_stride[4];
    void *sums; /* (B, G, N, M / G * P): written forward, read backward */
    void *out;  /* forward: (B, L, M, P) */
    void *dx, *ddt, *dB, *dC; /* backward: like x, dt, B and C */
    void *dterms; /* backward: (2, B, L, M), what each position and head adds to the gradients of A and of D */
} nc_ssd_args;

#endif
