/* The convolution for one scalar type and one instruction set; causal_conv1d.c includes this file once for each pair.
 *
 * Needs: T, TARGET (function attribute), NAME(x) (a distinct name for x).
 *
 * A row is the sequence of one channel of one batch element; it stays in the first-level cache while each tap passes over
 * it once, so any filter width runs at full vector width.
 */
#define INLINE TARGET static inline __attribute__((always_inline))

/* out[t] = bias + sum_k weight[width - 1 - k] * in[t - k], or in[t + k] with `ahead`; zero outside the row. */
INLINE void NAME(filter_row)(T *restrict out, const T *restrict in, const T *weight, T bias, int64_t length, int64_t width,
                             int64_t ahead) {
    const T last = weight[width - 1];
    for (int64_t t = 0; t < length; t++) out[t] = bias + last * in[t];
    for (int64_t k = 1; k < width && k < length; k++) {
        const T tap = weight[width - 1 - k];
        T *target = out + (ahead ? 0 : k);
        const T *source = in + (ahead ? k : 0);
        for (int64_t t = 0; t < length - k; t++) target[t] += tap * source[t];
    }
}

/* Sum of a[t] * b[t], in LANES partial sums whose order depends on the length alone. */
INLINE T NAME(dot)(const T *a, const T *b, int64_t length) {
    T part[LANES] = {0}, sum = 0;
    int64_t t = 0;
    for (; t + LANES <= length; t += LANES)
        for (int i = 0; i < LANES; i++) part[i] += a[t + i] * b[t + i];
    for (; t < length; t++) sum += a[t] * b[t];
    for (int i = 0; i < LANES; i++) sum += part[i];
    return sum;
}

INLINE T NAME(total)(const T *a, int64_t length) {
    T part[LANES] = {0}, sum = 0;
    int64_t t = 0;
    for (; t + LANES <= length; t += LANES)
        for (int i = 0; i < LANES; i++) part[i] += a[t + i];
    for (; t < length; t++) sum += a[t];
    for (int i = 0; i < LANES; i++) sum += part[i];
    return sum;
}

/* First of `rows` rows with stride 1: the tensor itself where it has that stride, else copies in `scratch`. */
INLINE const T *NAME(rows_of)(const T *src, const int64_t *stride, int64_t rows, int64_t length, T *scratch, int64_t *step) {
    *step = stride[1];
    if (stride[2] == 1) return src;
    /* position by position, as neighbouring channels share cache lines in a channel-last tensor */
    for (int64_t t = 0; t < length; t++)
        for (int64_t r = 0; r < rows; r++) scratch[r * length + t] = src[r * stride[1] + t * stride[2]];
    *step = length;
    return scratch;
}

TARGET static void NAME(forward_rows)(const conv_args *a, T *scratch, int64_t b, int64_t d0, int64_t d1) {
    const int64_t L = a->length, W = a->width;
    int64_t step;
    const T *x = (const T *)a->x + b * a->x_stride[0] + d0 * a->x_stride[1];
    x = NAME(rows_of)(x, a->x_stride, d1 - d0, L, scratch, &step);
    for (int64_t d = d0; d < d1; d++)
        NAME(filter_row)((T *)a->out + (b * a->dim + d) * L, x + (d - d0) * step, (const T *)a->weight + d * W,
                         a->bias ? ((const T *)a->bias)[d] : 0, L, W, a->reverse);
}

/* Adds the share of one batch element to the gradients of the filters of these channels. */
TARGET static void NAME(backward_rows)(const conv_args *a, T *scratch, int64_t b, int64_t d0, int64_t d1) {
    const int64_t L = a->length, W = a->width;
    int64_t x_step, g_step;
    const T *x = (const T *)a->x + b * a->x_stride[0] + d0 * a->x_stride[1];
    const T *g = (const T *)a->dout + b * a->dout_stride[0] + d0 * a->dout_stride[1];
    x = NAME(rows_of)(x, a->x_stride, d1 - d0, L, scratch, &x_step);
    g = NAME(rows_of)(g, a->dout_stride, d1 - d0, L, scratch + ROWS * L, &g_step);
    for (int64_t d = d0; d < d1; d++, x += x_step, g += g_step) {
        T *dweight = (T *)a->dweight + d * W;
        NAME(filter_row)((T *)a->dx + (b * a->dim + d) * L, g, (const T *)a->weight + d * W, 0, L, W, !a->reverse);
        ((T *)a->dbias)[d] += NAME(total)(g, L);
        for (int64_t k = 0; k < W && k < L; k++)
            dweight[W - 1 - k] += NAME(dot)(g + (a->reverse ? 0 : k), x + (a->reverse ? k : 0), L - k);
    }
}

/* Runs all blocks of channels; returns 0, or 1 if memory ran out. A block sums over the batch in order, so gradients do not
 * depend on the number of threads. */
static int NAME(run)(const conv_args *a, int backward) {
    const int64_t blocks = (a->dim + ROWS - 1) / ROWS, tasks = backward ? blocks : blocks * a->batch;
    const int strided = a->x_stride[2] != 1 || (backward && a->dout_stride[2] != 1);
    int failed = 0;
#pragma omp parallel num_threads((int)(a->threads < tasks ? a->threads : tasks))
    {
        T *scratch = strided ? malloc(sizeof(T) * 2 * ROWS * a->length) : NULL;
        if (strided && !scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(static)
            for (int64_t task = 0; task < tasks; task++) {
                const int64_t d0 = task % blocks * ROWS, d1 = d0 + ROWS < a->dim ? d0 + ROWS : a->dim;
                if (!backward) {
                    NAME(forward_rows)(a, scratch, task / blocks, d0, d1);
                    continue;
                }
                memset((T *)a->dweight + d0 * a->width, 0, sizeof(T) * (d1 - d0) * a->width);
                memset((T *)a->dbias + d0, 0, sizeof(T) * (d1 - d0));
                for (int64_t b = 0; b < a->batch; b++) NAME(backward_rows)(a, scratch, b, d0, d1);
            }
        }
        free(scratch);
    }
    return failed;
}

#undef INLINE
