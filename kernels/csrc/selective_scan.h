/* Arguments of the routed selective scan; packed by `ARGUMENTS` in visionssm_kernels/selective_scan/cpu.py.
 *
 * Shapes and meaning are those of the backend contract in visionssm_kernels/_dispatch.py. Strides count elements, in the
 * order of the dimensions; a dimension that is absent or broadcast has stride 0. What has no strides is contiguous.
 */
#ifndef VISIONSSM_SELECTIVE_SCAN_H
#define VISIONSSM_SELECTIVE_SCAN_H

#include <stdint.h>

#define VISIONSSM_CHUNK 64 /* positions between two checkpoints, CHUNK in _dispatch.py */
#define VISIONSSM_SUMS 2   /* places in which slabs add up the gradient of B or C by turns */

typedef struct {
    int64_t batch, routes, dim, state, length;
    int64_t groups;              /* common groups of B and C: every group of either is a whole number of these */
    int64_t b_groups, c_groups;  /* 0: constant over time, (K, D, N) */
    int64_t slab, slabs;         /* channels a task, tasks a common group */
    int64_t delta_softplus, reverse, merge, shared_u, threads;

    const void *u, *delta, *A, *B, *C, *D, *z, *delta_bias;
    const int32_t *index;
    int64_t u_stride[4], delta_stride[4], z_stride[4], dout_stride[4];            /* (B, K, D, L) */
    int64_t out_stride[4], du_stride[4], ddelta_stride[4], dz_stride[4]; /* (B, 1 or K, D, L) */
    int64_t b_stride[5], c_stride[5], db_stride[5], dc_stride[5];        /* (B, K, G, N, L) */

    void *out, *last_state, *checkpoints; /* checkpoints may be NULL in the forward pass */

    const void *dout, *dlast_state;
    void *du, *ddelta, *dz;         /* du (B, 1 or K, D, L) */
    void *dA, *dD, *ddelta_bias;    /* a batch element each: (B, K, D, N), (B, K, D), (B, K, D) */
    void *dB, *dC;                  /* (B, K, G, N, L); constant: (B, K, D, N) */
    void *dB_odd, *dC_odd;          /* laid out alike: sums of every other slab of a group, for the caller to add; NULL
                                     * where no group has more than one */
} scan_args;

#endif
