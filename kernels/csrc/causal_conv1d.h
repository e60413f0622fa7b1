/* Arguments of the causal convolution; mirrored by `ConvArgs` in visionssm_kernels/causal_conv1d/cpu.py.
 *
 * Strides count elements, in the order (B, D, L). Everything without strides is contiguous.
 */
#ifndef VISIONSSM_CAUSAL_CONV1D_H
#define VISIONSSM_CAUSAL_CONV1D_H

#include <stdint.h>

typedef struct {
    int64_t batch, dim, length, width, reverse, threads;
    const void *x, *weight, *bias, *dout; /* bias may be NULL; dout is read in the backward pass only */
    int64_t x_stride[3], dout_stride[3];
    void *out;                  /* forward: (B, D, L) */
    void *dx, *dweight, *dbias; /* backward: (B, D, L), (D, W), (D) */
} conv_args;

#endif
