/* Arguments of the wavefront scan; packed by `ARGUMENTS` in visionssm_kernels/wavefront_scan_2d/cpu.py.
 *
 * Shapes and meaning are those of visionssm_kernels/wavefront_scan_2d/reference.py. Strides count elements, in the order
 * (B, D or N, H, W). Everything without strides is contiguous.
 */
#ifndef VISIONSSM_WAVEFRONT_SCAN_H
#define VISIONSSM_WAVEFRONT_SCAN_H

#include <stdint.h>

#define VISIONSSM_ROWS 8 /* rows between two checkpoints, ROWS in reference.py */

typedef struct {
    int64_t batch, dim, state, height, width, delta_softplus, reverse, threads;
    int64_t slab, slabs; /* channels a task, tasks a batch element */
    const void *u, *delta_top, *delta_left, *A_top, *A_left, *B_top, *B_left, *C, *D, *bias_top, *bias_left, *dout;
    int64_t u_stride[4], delta_top_stride[4], delta_left_stride[4], dout_stride[4];
    int64_t b_top_stride[4], b_left_stride[4], c_stride[4];
    int64_t out_stride[4], du_stride[4], ddelta_top_stride[4], ddelta_left_stride[4];
    void *out, *checkpoints; /* checkpoints (B, J, N, W, D): rows J of checkpoints */
    void *du, *ddelta_top, *ddelta_left;
    void *dA_top, *dA_left, *dD, *dbias_top, *dbias_left; /* a batch element each: (B, D, N), (B, D) */
    void *dB_top, *dB_left, *dC;                          /* a slab each: (B, slabs, N, H, W) */
} wavefront_args;

#endif
