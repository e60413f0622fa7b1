/* The convolution for one scalar type and one instruction set; instances.h includes this file once for each pair.
 *
 * Where channels are innermost, lanes are channels and a step of the sequence is a row of vectors. Otherwise a row is the
 * sequence of one channel of one batch element; it stays in the first-level cache while each tap passes over it once. Either
 * way any filter width runs at full vector width.
 */

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

TARGET static void NAME(silu_row)(T *row, int64_t length) {
    for (int64_t t = 0; t < length; t += GROUP * LANES) {
        const size_t size = sizeof(T) * (length - t < GROUP * LANES ? length - t : GROUP * LANES);
        V x[GROUP] = {{0}};
        memcpy(x, row + t, size);
        NAME(silu)(x);
        memcpy(row + t, x, size);
    }
}

TARGET static void NAME(forward_rows)(const conv_args *a, T *scratch, int64_t b, int64_t d0, int64_t d1) {
    const int64_t L = a->length, W = a->width;
    int64_t step;
    const T *x = (const T *)a->x + b * a->x_stride[0] + d0 * a->x_stride[1];
    x = NAME(rows_of)(x, a->x_stride, d1 - d0, L, scratch, &step);
    for (int64_t d = d0; d < d1; d++) {
        T *out = (T *)a->out + b * a->out_stride[0] + d * a->out_stride[1];
        NAME(filter_row)(out, x + (d - d0) * step, (const T *)a->weight + d * W, a->bias ? ((const T *)a->bias)[d] : 0, L, W,
                         a->reverse);
        if (a->silu) NAME(silu_row)(out, L);
    }
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
        NAME(filter_row)((T *)a->dx + b * a->dx_stride[0] + d * a->dx_stride[1], g, (const T *)a->weight + d * W, 0, L, W,
                         !a->reverse);
        ((T *)a->dbias)[d] += NAME(total)(g, L);
        for (int64_t k = 0; k < W && k < L; k++)
            dweight[W - 1 - k] += NAME(dot)(g + (a->reverse ? 0 : k), x + (a->reverse ? k : 0), L - k);
    }
}

/* Channels of one step, `lanes` of them; all of a vector where the compiler knows that it is full. */
INLINE V NAME(load_lanes)(const T *src, int lanes) {
    V x = {0};
    memcpy(&x, src, sizeof(T) * lanes);
    return x;
}

INLINE void NAME(store_lanes)(T *dst, V x, int lanes) { memcpy(dst, &x, sizeof(T) * lanes); }

/* The filter at step t of channels with stride 1: looks back, or with `ahead` forth; see filter_row. */
INLINE V NAME(filter_lanes)(const T *in, int64_t step, const V *taps, V sum, int64_t t, int64_t length, int64_t width,
                            int64_t ahead, int lanes) {
    const int64_t room = ahead ? length - t : t + 1, reach = room < width ? room : width, move = ahead ? step : -step;
    in += t * step;
    if (width == 4 && reach == 4) { /* the width of every released model */
        for (int k = 0; k < 4; k++) sum = FMA(taps[3 - k], NAME(load_lanes)(in + k * move, lanes), sum);
        return sum;
    }
    for (int64_t k = 0; k < reach; k++, in += move) sum = FMA(taps[width - 1 - k], NAME(load_lanes)(in, lanes), sum);
    return sum;
}

INLINE void NAME(forward_steps)(const conv_args *a, const V *taps, V bias, int64_t b, int64_t d, int lanes) {
    const int64_t L = a->length, W = a->width;
    const T *x = (const T *)a->x + b * a->x_stride[0] + d;
    T *out = (T *)a->out + b * a->out_stride[0] + d;
    for (int64_t t = 0; t < L; t += GROUP) {
        const int many = L - t < GROUP ? (int)(L - t) : GROUP;
        V sum[GROUP];
        EACH sum[j] = j < many ? NAME(filter_lanes)(x, a->x_stride[2], taps, bias, t + j, L, W, a->reverse, lanes) : bias;
        if (a->silu) NAME(silu)(sum);
        for (int j = 0; j < many; j++) NAME(store_lanes)(out + (t + j) * a->out_stride[2], sum[j], lanes);
    }
}

TARGET static void NAME(forward_lanes)(const conv_args *a, V *taps, int64_t b, int64_t d, int lanes) {
    V bias = {0};
    NAME(load_rows)(taps, (const T *)a->weight + d * a->width, a->width, a->width, lanes, 1);
    if (a->bias) NAME(load_rows)(&bias, (const T *)a->bias + d, 1, 1, lanes, 1);
    if (lanes == LANES) NAME(forward_steps)(a, taps, bias, b, d, LANES);
    else NAME(forward_steps)(a, taps, bias, b, d, lanes);
}

INLINE V NAME(backward_steps)(const conv_args *a, const V *taps, V *dtaps, int64_t d, int lanes) {
    const int64_t L = a->length, W = a->width;
    V dbias = {0};
    for (int64_t b = 0; b < a->batch; b++) {
        const T *x = (const T *)a->x + b * a->x_stride[0] + d, *g = (const T *)a->dout + b * a->dout_stride[0] + d;
        T *dx = (T *)a->dx + b * a->dx_stride[0] + d;
        for (int64_t t = 0; t < L; t++) {
            const V here = NAME(load_lanes)(g + t * a->dout_stride[2], lanes);
            const int64_t room = a->reverse ? L - t : t + 1, reach = room < W ? room : W;
            dbias += here;
            for (int64_t k = 0; k < reach; k++)
                dtaps[W - 1 - k] += here * NAME(load_lanes)(x + (a->reverse ? t + k : t - k) * a->x_stride[2], lanes);
            const V sum = NAME(filter_lanes)(g, a->dout_stride[2], taps, (V){0}, t, L, W, !a->reverse, lanes);
            NAME(store_lanes)(dx + t * a->dx_stride[2], sum, lanes);
        }
    }
    return dbias;
}

/* All batch elements of a block of channels: `taps` has room for the filters and for their gradients. */
TARGET static void NAME(backward_lanes)(const conv_args *a, V *taps, int64_t d, int lanes) {
    const int64_t W = a->width;
    V *dtaps = taps + W, dbias;
    NAME(load_rows)(taps, (const T *)a->weight + d * W, W, W, lanes, 1);
    memset(dtaps, 0, sizeof(V) * W);
    if (lanes == LANES) dbias = NAME(backward_steps)(a, taps, dtaps, d, LANES);
    else dbias = NAME(backward_steps)(a, taps, dtaps, d, lanes);
    NAME(store_rows)(dtaps, (T *)a->dweight + d * W, W, W, lanes);
    NAME(store_rows)(&dbias, (T *)a->dbias + d, 1, 1, lanes);
}

TARGET static void NAME(task)(const conv_args *a, char *scratch, int innermost, int backward, int64_t b, int64_t d0, int64_t d1) {
    if (innermost) {
        for (int64_t d = d0; d < d1; d += LANES) {
            const int lanes = d1 - d < LANES ? (int)(d1 - d) : LANES;
            if (backward) NAME(backward_lanes)(a, (V *)scratch, d, lanes);
            else NAME(forward_lanes)(a, (V *)scratch, b, d, lanes);
        }
    } else if (backward) {
        memset((T *)a->dweight + d0 * a->width, 0, sizeof(T) * (d1 - d0) * a->width);
        memset((T *)a->dbias + d0, 0, sizeof(T) * (d1 - d0));
        for (b = 0; b < a->batch; b++) NAME(backward_rows)(a, (T *)scratch, b, d0, d1);
    } else
        NAME(forward_rows)(a, (T *)scratch, b, d0, d1);
}

/* Runs all blocks of channels; returns 0, or 1 if memory ran out. A block sums over the batch in order, so gradients do not
 * depend on the number of threads. */
static int NAME(run)(const conv_args *a, int backward) {
    const int64_t blocks = (a->dim + ROWS - 1) / ROWS, tasks = backward ? blocks : blocks * a->batch;
    const int innermost = (backward ? a->dx_stride : a->out_stride)[1] == 1 && a->x_stride[1] == 1 &&
        (!backward || a->dout_stride[1] == 1);
    const size_t rows = sizeof(T) * 2 * ROWS * a->length, taps = sizeof(V) * 2 * a->width;
    int failed = 0;
#pragma omp parallel num_threads(team(a->threads, tasks))
    {
        char *memory = malloc((innermost ? taps : rows) + 64);
        char *scratch = (char *)(((uintptr_t)memory + 63) / 64 * 64);
        const unsigned mode = flush_denormals();
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(static)
            for (int64_t task = 0; task < tasks; task++) {
                const int64_t d0 = task % blocks * ROWS, d1 = d0 + ROWS < a->dim ? d0 + ROWS : a->dim;
                NAME(task)(a, scratch, innermost, backward, task / blocks, d0, d1);
            }
        }
        restore_denormals(mode);
        free(memory);
    }
    return failed;
}
