/* Arguments of the dilated convolutions; packed by `ARGUMENTS` in visionssm_kernels/dilated_conv2d/cpu.py.
 *
 * Strides count elements, in the order (B, D, H, W); the one along D is 1. Everything without strides is contiguous.
 */
#ifndef VISIONSSM_DILATED_CONV2D_H
#define VISIONSSM_DILATED_CONV2D_H

#include <stdint.h>

typedef struct {
    int64_t batch, dim, height, width, filters, side, radius, threads; /* radius: how far the widest filter reaches */
    const void *x, *weight, *dilations, *dout; /* (M, D, S, S); (M), int64_t; dout is read in the backward pass only */
    int64_t x_stride[4], dout_stride[4], out_stride[4], dx_stride[4];
    void *out;          /* forward: (B, D, H, W) */
    void *dx, *dweight; /* backward: (B, D, H, W); (M, D, S, S) */
} dilated_args;

#endif
