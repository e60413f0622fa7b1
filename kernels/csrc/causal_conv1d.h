/* Arguments of the causal convolution; packed by `ARGUMENTS` in visionssm_kernels/causal_conv1d/cpu.py.
 *
 * Strides count elements, in the order (B, D, L). Everything without strides is contiguous.
 */
#ifndef VISIONSSM_CAUSAL_CONV1D_H
#define VISIONSSM_CAUSAL_CONV1D_H

#include <stdint.h>

typedef struct {
    int64_t batch, dim, length, width, silu, reverse, threads; /* silu: of the sums, in the forward pass only */
    const void *x, *weight, *bias, *dout; /* bias may be NULL; dout is read in the backward pass only */
    int64_t x_stride[3], dout_stride[3], out_stride[3], dx_stride[3];
    void *out;                  /* forward: (B, D, L), stride 1 along D or along L */
    void *dx, *dweight, *dbias; /* backward: (B, D, L) like out; (D, W), (D) */
} conv_args;

#endif
