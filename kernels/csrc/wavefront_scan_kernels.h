/* The wavefront scan for one scalar type and one instruction set; instances.h includes this file once for each pair.
 *
 * Lanes are channels: a task is one block of them in one batch element. Rows follow each other, and the states of the row
 * above stay with the task, [N][W]. Within a row the scan runs state by state: the state to the left and the decay rates
 * stay in registers, and the exponentials of a row are independent of each other. The backward pass takes a band of rows
 * at a time, recomputes its states from the checkpoint above it, and runs the adjoint recurrence from its last pixel.
 */
#define ROWS VISIONSSM_ROWS
#define MANY 4  /* states that run through a row together in the forward pass: more share loads, fewer keep registers free */
#define PAIR 2  /* and in the backward pass, where the states and decays of a band of rows must stay in the cache */

typedef struct {
    V *x, *top, *left, *y;                       /* [ROWS][W]: input, steps; output or its gradient */
    V *slope_top, *slope_left, *dtop, *dleft;    /* [ROWS][W]: slopes of the steps, gradients of the steps */
    V *drive_top, *drive_left;                   /* [ROWS][W]: gradients of step times input */
    V *states, *decay_top, *decay_left;          /* [PAIR][ROWS][W] */
    V *row;                                      /* [N][W]: states of the row above, or adjoints of the row below */
    V *above;                                    /* [PAIR][W]: states of the row above a band */
    V *rate_top, *rate_left, *drate_top, *drate_left; /* [N] */
    T *btop, *bleft, *c;                         /* [N][ROWS][W] */
    int64_t *pixel;                              /* [W] */
} NAME(scratch);

/* One block of channels of one batch element. */
typedef struct {
    const wavefront_args *a;
    NAME(scratch) *s;
    int64_t b, d;
    int lanes;
} NAME(task);

INLINE int64_t NAME(row_of)(const wavefront_args *a, int64_t i) { return a->reverse ? a->height - 1 - i : i; }

/* Reads row i of a map (B, D, H, W) into a tile. */
INLINE void NAME(load_map)(const NAME(task) *t, V *tile, const void *map, const int64_t *stride, int64_t i) {
    const T *src = (const T *)map + t->b * stride[0] + t->d * stride[1] + NAME(row_of)(t->a, i) * stride[2];
    NAME(load_tile)(tile, src, stride[1], stride[3], t->s->pixel, (int)t->a->width, t->lanes);
}

/* Writes a tile into row i of a contiguous map (B, D, H, W). */
INLINE void NAME(store_map)(const NAME(task) *t, const V *tile, void *map, int64_t i) {
    const int64_t H = t->a->height, W = t->a->width;
    T *dst = (T *)map + ((t->b * t->a->dim + t->d) * H + NAME(row_of)(t->a, i)) * W;
    NAME(store_tile)(tile, dst, H * W, t->s->pixel, (int)W, t->lanes, 0);
}

/* Reads row i of B or C into row r of a band, [N][ROWS][W]. */
INLINE void NAME(load_coefficients)(const NAME(task) *t, T *dst, const void *map, const int64_t *stride, int64_t i, int64_t r) {
    const int64_t W = t->a->width;
    const T *src = (const T *)map + t->b * stride[0] + NAME(row_of)(t->a, i) * stride[2];
    NAME(load_matrix)(dst + r * W, src, stride[1], stride[3], t->s->pixel, (int)W, t->a->state, ROWS * W);
}

/* Adds the bias of these channels to a row of steps and applies softplus. */
APART void NAME(finish_steps)(const NAME(task) *t, V *step, V *slope, const void *bias) {
    const int64_t W = t->a->width;
    V shift = {0};
    if (bias) NAME(load_rows)(&shift, (const T *)bias + t->d, 1, 1, t->lanes, 1);
    for (int64_t j = 0; j < W; j++) {
        V raw = step[j] + shift;
        step[j] = t->a->delta_softplus ? NAME(softplus)(raw) : raw;
        if (slope) slope[j] = t->a->delta_softplus ? SELECT(raw > 20, (V){0} + 1, NAME(sigmoid)(raw)) : (V){0} + 1;
    }
}

/* Reads everything of row i into row r of a band. */
APART void NAME(load_row)(const NAME(task) *t, int64_t i, int64_t r, int backward) {
    const wavefront_args *a = t->a;
    const NAME(scratch) *s = t->s;
    const int64_t at = r * a->width;
    NAME(load_map)(t, s->x + at, a->u, a->u_stride, i);
    NAME(load_map)(t, s->top + at, a->delta_top, a->delta_top_stride, i);
    NAME(load_map)(t, s->left + at, a->delta_left, a->delta_left_stride, i);
    NAME(finish_steps)(t, s->top + at, backward ? s->slope_top + at : NULL, a->bias_top);
    NAME(finish_steps)(t, s->left + at, backward ? s->slope_left + at : NULL, a->bias_left);
    NAME(load_coefficients)(t, s->btop, a->B_top, a->b_top_stride, i, r);
    NAME(load_coefficients)(t, s->bleft, a->B_left, a->b_left_stride, i, r);
    NAME(load_coefficients)(t, s->c, a->C, a->c_stride, i, r);
}

APART void NAME(load_parameters)(const NAME(task) *t) {
    const int64_t N = t->a->state;
    NAME(load_rows)(t->s->rate_top, (const T *)t->a->A_top + t->d * N, N, N, t->lanes, RATE_SCALE);
    NAME(load_rows)(t->s->rate_left, (const T *)t->a->A_left + t->d * N, N, N, t->lanes, RATE_SCALE);
    for (int64_t j = 0; j < t->a->width; j++) t->s->pixel[j] = t->a->reverse ? t->a->width - 1 - j : j;
}

/* First of the rows (W, D) of checkpoint `mark` and state n that belongs to these channels. */
INLINE T *NAME(checkpoint)(const NAME(task) *t, int64_t mark, int64_t n) {
    const wavefront_args *a = t->a;
    const int64_t marks = (a->height + ROWS - 1) / ROWS;
    return (T *)a->checkpoints + ((t->b * marks + mark) * a->state + n) * a->width * a->dim + t->d;
}

APART void NAME(save_checkpoint)(const NAME(task) *t, int64_t mark) {
    const int64_t W = t->a->width, dim = t->a->dim;
    for (int64_t n = 0; n < t->a->state; n++) {
        T *dst = NAME(checkpoint)(t, mark, n);
        for (int64_t j = 0; j < W; j++) memcpy(dst + j * dim, &t->s->row[n * W + j], sizeof(T) * t->lanes);
    }
}

/* `many` states of row i: advances them and adds their share of the output. Row 0 has no row above it. */
INLINE void NAME(advance_)(const int many, const int first, const NAME(task) *t, int64_t n) {
    const NAME(scratch) *s = t->s;
    const int64_t W = t->a->width, plane = ROWS * W;
    const T *bt = s->btop + n * plane, *bl = s->bleft + n * plane, *c = s->c + n * plane;
    V *row = s->row + n * W;
    V h[MANY], rt[MANY], rl[MANY];
    for (int k = 0; k < many; k++) h[k] = (V){0}, rt[k] = s->rate_top[n + k], rl[k] = s->rate_left[n + k];
    for (int64_t j = 0; j < W; j++) {
        /* the weights of the mean: all from the left in row 0, all from above in column 0 of the others */
        const T wl = first ? 1 : j ? (T)0.5 : 0, wt = j ? (T)0.5 : 1;
        const V left = s->left[j], top = s->top[j], dl = wl * left * s->x[j], dt = wt * top * s->x[j];
        V y = s->y[j];
        for (int k = 0; k < many; k++) {
            V in = dl * bl[k * plane + j];
            if (!first) in += dt * bt[k * plane + j] + wt * DECAY(top * rt[k]) * row[k * W + j];
            h[k] = wl * DECAY(left * rl[k]) * h[k] + in;
            row[k * W + j] = h[k];
            y += h[k] * c[k * plane + j];
        }
        s->y[j] = y;
    }
}

APART void NAME(advance_many)(const NAME(task) *t, int64_t n) { NAME(advance_)(MANY, 0, t, n); }
APART void NAME(advance_one)(const NAME(task) *t, int64_t n) { NAME(advance_)(1, 0, t, n); }
APART void NAME(advance_first)(const NAME(task) *t, int64_t n) { NAME(advance_)(1, 1, t, n); }

APART void NAME(forward_task)(const NAME(task) *t) {
    const wavefront_args *a = t->a;
    const NAME(scratch) *s = t->s;
    const int64_t N = a->state, W = a->width;
    V skip = {0};
    NAME(load_parameters)(t);
    if (a->D) NAME(load_rows)(&skip, (const T *)a->D + t->d, 1, 1, t->lanes, 1);
    memset(s->row, 0, sizeof(V) * N * W);
    for (int64_t i = 0; i < a->height; i++) {
        if (i % ROWS == 0) NAME(save_checkpoint)(t, i / ROWS);
        NAME(load_row)(t, i, 0, 0);
        for (int64_t j = 0; j < W; j++) s->y[j] = s->x[j] * skip;
        for (int64_t n = 0, step; n < N; n += step) {
            step = i && n + MANY <= N ? MANY : 1;
            if (!i) NAME(advance_first)(t, n);
            else if (step == MANY) NAME(advance_many)(t, n);
            else NAME(advance_one)(t, n);
        }
        NAME(store_map)(t, s->y, a->out, i);
    }
}

/* `many` states of a band of rows from row i on: recomputes them and their decays, times the weights of the mean. */
INLINE void NAME(recompute_)(const int many, const NAME(task) *t, int64_t i, int64_t rows, int64_t n) {
    const NAME(scratch) *s = t->s;
    const int64_t W = t->a->width, plane = ROWS * W;
    const T *bt = s->btop + n * plane, *bl = s->bleft + n * plane;
    for (int k = 0; k < many; k++) {
        const T *src = NAME(checkpoint)(t, i / ROWS, n + k);
        if (t->lanes < LANES) memset(s->above + k * W, 0, sizeof(V) * W);
        for (int64_t j = 0; j < W; j++) memcpy(&s->above[k * W + j], src + j * t->a->dim, sizeof(T) * t->lanes);
    }
    for (int64_t r = 0; r < rows; r++) {
        V h[PAIR], rt[PAIR], rl[PAIR];
        for (int k = 0; k < many; k++) h[k] = (V){0}, rt[k] = s->rate_top[n + k], rl[k] = s->rate_left[n + k];
        for (int64_t j = 0, at = r * W; j < W; j++, at++) {
            const T wl = i + r == 0 ? 1 : j ? (T)0.5 : 0, wt = 1 - wl;
            const V left = s->left[at], top = s->top[at], dl = wl * left * s->x[at], dt = wt * top * s->x[at];
            for (int k = 0; k < many; k++) {
                const V above = r ? s->states[k * plane + at - W] : s->above[k * W + j];
                const V from_left = wl * DECAY(left * rl[k]), from_top = wt * DECAY(top * rt[k]);
                h[k] = from_left * h[k] + (from_top * above + dl * bl[k * plane + at] + dt * bt[k * plane + at]);
                s->states[k * plane + at] = h[k];
                s->decay_left[k * plane + at] = from_left;
                s->decay_top[k * plane + at] = from_top;
            }
        }
    }
}

/* The adjoint recurrence of `many` states over a band, after `recompute_`. */
INLINE void NAME(retreat_)(const int many, const NAME(task) *t, int64_t i, int64_t rows, int64_t n) {
    const wavefront_args *a = t->a;
    const NAME(scratch) *s = t->s;
    const int64_t N = a->state, H = a->height, W = a->width, plane = ROWS * W, blocks = (a->dim + LANES - 1) / LANES;
    const int64_t base = ((t->b * blocks + t->d / LANES) * N + n) * H;
    const T *bt = s->btop + n * plane, *bl = s->bleft + n * plane, *c = s->c + n * plane;
    V *carry = s->row + n * W;
    V rt[PAIR], rl[PAIR], drt[PAIR], drl[PAIR];
    for (int k = 0; k < many; k++) {
        rt[k] = s->rate_top[n + k], rl[k] = s->rate_left[n + k];
        drt[k] = s->drate_top[n + k], drl[k] = s->drate_left[n + k];
    }
    for (int64_t r = rows - 1; r >= 0; r--) {
        V g[PAIR]; /* what the pixel to the right hands over */
        const int64_t line = (base + NAME(row_of)(a, i + r)) * W;
        for (int k = 0; k < many; k++) g[k] = (V){0};
        for (int64_t j = W - 1, at = r * W + j; j >= 0; j--, at--) {
            const T wl = i + r == 0 ? 1 : j ? (T)0.5 : 0, wt = 1 - wl;
            const V x = s->x[at], left = s->left[at], top = s->top[at], dy = s->y[at];
            V dleft = s->dleft[at], dtop = s->dtop[at], drive_left = s->drive_left[at], drive_top = s->drive_top[at];
            for (int k = 0; k < many; k++) {
                const int64_t here = k * plane + at, to = line + k * H * W + s->pixel[j];
                const V above = r ? s->states[here - W] : s->above[k * W + j];
                const V before = j ? s->states[here - 1] : (V){0};
                const V dh = dy * c[here] + g[k] + carry[k * W + j], gl = wl * dh, gt = wt * dh;
                ((T *)a->dC)[to] = NAME(sum_lanes)(dy * s->states[here]);
                ((T *)a->dB_left)[to] = NAME(sum_lanes)(gl * left * x);
                ((T *)a->dB_top)[to] = NAME(sum_lanes)(gt * top * x);
                drive_left += gl * bl[here];
                drive_top += gt * bt[here];
                g[k] = dh * s->decay_left[here];
                carry[k * W + j] = dh * s->decay_top[here];
                const V slope_left = g[k] * before, slope_top = carry[k * W + j] * above;
                drl[k] += slope_left * left;
                drt[k] += slope_top * top;
                dleft += slope_left * rl[k];
                dtop += slope_top * rt[k];
            }
            s->dleft[at] = dleft, s->dtop[at] = dtop;
            s->drive_left[at] = drive_left, s->drive_top[at] = drive_top;
        }
    }
    for (int k = 0; k < many; k++) s->drate_top[n + k] = drt[k], s->drate_left[n + k] = drl[k];
}

APART void NAME(retreat_pair)(const NAME(task) *t, int64_t i, int64_t rows, int64_t n) {
    NAME(recompute_)(PAIR, t, i, rows, n);
    NAME(retreat_)(PAIR, t, i, rows, n);
}

APART void NAME(retreat_one)(const NAME(task) *t, int64_t i, int64_t rows, int64_t n) {
    NAME(recompute_)(1, t, i, rows, n);
    NAME(retreat_)(1, t, i, rows, n);
}

/* Sums of a task that become gradients of D and of the biases. */
typedef struct {
    V skip, bias_top, bias_left;
} NAME(sums);

/* Turns the gradients of a row of a band into those of the inputs, and writes them. */
APART void NAME(finish_row)(const NAME(task) *t, int64_t i, int64_t r, V skip, NAME(sums) *sums) {
    const NAME(scratch) *s = t->s;
    const int64_t W = t->a->width;
    for (int64_t j = 0, at = r * W; j < W; j++, at++) {
        const V x = s->x[at], dy = s->y[at], drive_left = s->drive_left[at], drive_top = s->drive_top[at];
        s->dleft[at] = (s->dleft[at] * RATE_UNSCALE + drive_left * x) * s->slope_left[at];
        s->dtop[at] = (s->dtop[at] * RATE_UNSCALE + drive_top * x) * s->slope_top[at];
        sums->skip += dy * x;
        sums->bias_left += s->dleft[at];
        sums->bias_top += s->dtop[at];
        s->drive_left[at] = drive_left * s->left[at] + drive_top * s->top[at] + dy * skip;
    }
    NAME(store_map)(t, s->drive_left + r * W, t->a->du, i + r);
    NAME(store_map)(t, s->dleft + r * W, t->a->ddelta_left, i + r);
    NAME(store_map)(t, s->dtop + r * W, t->a->ddelta_top, i + r);
}

APART void NAME(backward_task)(const NAME(task) *t) {
    const wavefront_args *a = t->a;
    const NAME(scratch) *s = t->s;
    const int64_t N = a->state, W = a->width, channel = t->b * a->dim + t->d;
    NAME(sums) sums = {{0}, {0}, {0}};
    V skip = {0};
    NAME(load_parameters)(t);
    if (a->D) NAME(load_rows)(&skip, (const T *)a->D + t->d, 1, 1, t->lanes, 1);
    memset(s->row, 0, sizeof(V) * N * W);
    memset(s->drate_top, 0, sizeof(V) * N);
    memset(s->drate_left, 0, sizeof(V) * N);
    for (int64_t i = (a->height - 1) / ROWS * ROWS; i >= 0; i -= ROWS) {
        const int64_t rows = a->height - i < ROWS ? a->height - i : ROWS;
        for (int64_t r = 0; r < rows; r++) {
            NAME(load_row)(t, i + r, r, 1);
            NAME(load_map)(t, s->y + r * W, a->dout, a->dout_stride, i + r);
        }
        memset(s->dleft, 0, sizeof(V) * rows * W);
        memset(s->dtop, 0, sizeof(V) * rows * W);
        memset(s->drive_left, 0, sizeof(V) * rows * W);
        memset(s->drive_top, 0, sizeof(V) * rows * W);
        for (int64_t n = 0, step; n < N; n += step) {
            step = n + PAIR <= N ? PAIR : 1;
            if (step == PAIR) NAME(retreat_pair)(t, i, rows, n);
            else NAME(retreat_one)(t, i, rows, n);
        }
        for (int64_t r = 0; r < rows; r++) NAME(finish_row)(t, i, r, skip, &sums);
    }
    NAME(store_rows)(s->drate_top, (T *)a->dA_top + channel * N, N, N, t->lanes, 1);
    NAME(store_rows)(s->drate_left, (T *)a->dA_left + channel * N, N, N, t->lanes, 1);
    if (a->D) NAME(store_rows)(&sums.skip, (T *)a->dD + channel, 1, 1, t->lanes, 1);
    if (a->bias_top) NAME(store_rows)(&sums.bias_top, (T *)a->dbias_top + channel, 1, 1, t->lanes, 1);
    if (a->bias_left) NAME(store_rows)(&sums.bias_left, (T *)a->dbias_left + channel, 1, 1, t->lanes, 1);
}

/* Lays the scratch of a thread out in one block of memory; returns its size, and fills `s` if `base` is given. */
static size_t NAME(layout)(const wavefront_args *a, int backward, NAME(scratch) *s, char *base) {
    const size_t W = a->width, N = a->state, band = sizeof(V) * ROWS * W, extra = backward ? band : 0;
    char *p = base;
    /* a cache line more each, so that rows do not compete for the same cache sets */
#define CARVE(field, type, bytes) do { if (base) s->field = (type *)p; p += ((bytes) + 127) / 64 * 64; } while (0)
    CARVE(x, V, band);
    CARVE(top, V, band);
    CARVE(left, V, band);
    CARVE(y, V, band);
    CARVE(slope_top, V, extra);
    CARVE(slope_left, V, extra);
    CARVE(dtop, V, extra);
    CARVE(dleft, V, extra);
    CARVE(drive_top, V, extra);
    CARVE(drive_left, V, extra);
    CARVE(states, V, PAIR * extra);
    CARVE(decay_top, V, PAIR * extra);
    CARVE(decay_left, V, PAIR * extra);
    CARVE(row, V, sizeof(V) * N * W);
    CARVE(above, V, sizeof(V) * PAIR * W);
    CARVE(rate_top, V, sizeof(V) * N);
    CARVE(rate_left, V, sizeof(V) * N);
    CARVE(drate_top, V, sizeof(V) * N);
    CARVE(drate_left, V, sizeof(V) * N);
    CARVE(btop, T, sizeof(T) * N * ROWS * W);
    CARVE(bleft, T, sizeof(T) * N * ROWS * W);
    CARVE(c, T, sizeof(T) * N * ROWS * W);
    CARVE(pixel, int64_t, sizeof(int64_t) * W);
#undef CARVE
    return (size_t)(p - base);
}

/* Runs all tasks on the given number of threads; returns 0, or 1 if memory ran out. Tasks never share an output, so results
 * do not depend on the number of threads. */
static int NAME(run)(const wavefront_args *a, int backward) {
    const int64_t blocks = (a->dim + LANES - 1) / LANES, tasks = a->batch * blocks;
    const size_t size = NAME(layout)(a, backward, NULL, NULL);
    int64_t next = 0;
    /* a shared counter instead of `omp for`: no barrier but the last, and a thread without memory just takes no task */
#pragma omp parallel num_threads((int)(a->threads < tasks ? a->threads : tasks))
    {
        char *memory = malloc(size + 64);
        if (memory) {
            NAME(scratch) s;
            NAME(layout)(a, backward, &s, (char *)(((uintptr_t)memory + 63) / 64 * 64));
            const unsigned mode = flush_denormals();
            for (;;) {
                int64_t at;
#pragma omp atomic capture
                at = next++;
                if (at >= tasks) break;
                const int64_t d = at % blocks * LANES;
                const NAME(task) t = {a, &s, at / blocks, d, a->dim - d < LANES ? (int)(a->dim - d) : LANES};
                if (backward) NAME(backward_task)(&t);
                else NAME(forward_task)(&t);
            }
            restore_denormals(mode);
        }
        free(memory);
    }
    return next < tasks;
}

#undef ROWS
#undef MANY
#undef PAIR
