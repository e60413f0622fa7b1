/* The wavefront scan for one scalar type and one instruction set; instances.h includes this file once for each pair.
 *
 * Lanes are channels: a task is a slab of blocks of them in one batch element. Rows follow each other, and the states of the
 * row above stay with the task, [N][P]. Within a row the scan runs state by state, a group of pixels at a time: the state to
 * the left and the decay rates stay in registers, and the exponentials are independent of each other. The backward pass
 * takes a band of rows at a time, recomputes its states from the checkpoint above it, and runs the adjoint recurrence from
 * its last pixel. Rows of W pixels are filled up with zeros to P, a whole number of groups.
 */
#define ROWS VISIONSSM_ROWS
#define PAIR 2 /* states that share loads in the backward pass; their states and decays of a band of rows stay in the cache */

typedef struct {
    V *x, *top, *left, *y;                       /* [ROWS][P]: input, steps; output or its gradient */
    V *slope_top, *slope_left, *dtop, *dleft;    /* [ROWS][P]: slopes of the steps, gradients of the steps */
    V *drive_top, *drive_left;                   /* [ROWS][P]: gradients of step times input */
    V *states, *decay_top, *decay_left;          /* [PAIR][ROWS][P] */
    V *row;                                      /* [N][P]: states of the row above, or adjoints of the row below */
    V *above;                                    /* [PAIR][P]: states of the row above a band */
    V *rate_top, *rate_left, *drate_top, *drate_left; /* [N] */
    T *btop, *bleft, *c;                         /* [N][ROWS][P] */
    int64_t *pixel;                              /* [W] */
} NAME(scratch);

/* One block of channels of one batch element. */
typedef struct {
    const wavefront_args *a;
    NAME(scratch) *s;
    int64_t b, slab, d;
    int lanes, add; /* add: not the first block of its slab */
} NAME(task);

INLINE int64_t NAME(row_of)(const wavefront_args *a, int64_t i) { return a->reverse ? a->height - 1 - i : i; }

INLINE NAME(place) NAME(row_place)(const NAME(task) *t) {
    return (NAME(place)){t->s->pixel, t->a->reverse ? -1 : 1, (int)t->a->width, t->lanes};
}

/* Reads row i of a map (B, D, H, W) into a tile. */
INLINE void NAME(load_map)(const NAME(task) *t, V *tile, const void *map, const int64_t *stride, int64_t i) {
    const T *src = (const T *)map + t->b * stride[0] + t->d * stride[1] + NAME(row_of)(t->a, i) * stride[2];
    NAME(load_tile)(tile, src, stride[1], stride[3], NAME(row_place)(t));
}

/* Writes a tile into row i of a map (B, D, H, W). */
INLINE void NAME(store_map)(const NAME(task) *t, const V *tile, void *map, const int64_t *stride, int64_t i) {
    T *dst = (T *)map + t->b * stride[0] + t->d * stride[1] + NAME(row_of)(t->a, i) * stride[2];
    NAME(store_tile)(tile, dst, stride[1], stride[3], NAME(row_place)(t), 0);
}

/* Reads row i of B or C into row r of a band, [N][ROWS][P]. */
INLINE void NAME(load_coefficients)(const NAME(task) *t, T *dst, const void *map, const int64_t *stride, int64_t i, int64_t r) {
    const int64_t pitch = ROUND_UP(t->a->width);
    const T *src = (const T *)map + t->b * stride[0] + NAME(row_of)(t->a, i) * stride[2];
    NAME(load_matrix)(dst + r * pitch, ROWS * pitch, src, t->a->state, stride[1], stride[3], NAME(row_place)(t));
}

/* Adds the bias of these channels to a row of steps and applies softplus. */
APART void NAME(finish_steps)(const NAME(task) *t, V *step, V *slope, const void *bias) {
    const int64_t W = t->a->width;
    V shift = {0};
    if (bias) NAME(load_rows)(&shift, (const T *)bias + t->d, 1, 1, t->lanes, 1);
    for (int64_t at = 0; at < W; at += GROUP) {
        V raw[GROUP], x[GROUP];
        EACH raw[j] = x[j] = at + j < W ? step[at + j] + shift : (V){0};
        if (slope) {
            NAME(sigmoid)(x);
            EACH slope[at + j] = SELECT(raw[j] > 20, (V){0} + 1, t->a->delta_softplus ? x[j] : (V){0} + 1);
            EACH x[j] = raw[j];
        }
        if (t->a->delta_softplus) NAME(softplus)(x);
        EACH step[at + j] = at + j < W ? slope ? NAME(plain)(x[j]) : x[j] : (V){0};
    }
}

/* Reads everything of row i into row r of a band. */
APART void NAME(load_row)(const NAME(task) *t, int64_t i, int64_t r, int backward) {
    const wavefront_args *a = t->a;
    const NAME(scratch) *s = t->s;
    const int64_t at = r * ROUND_UP(a->width);
    NAME(load_map)(t, s->x + at, a->u, a->u_stride, i);
    for (int64_t j = a->width; j < ROUND_UP(a->width); j++) s->x[at + j] = (V){0};
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
    NAME(load_rates)(t->s->rate_top, (const T *)t->a->A_top + t->d * N, N, t->lanes);
    NAME(load_rates)(t->s->rate_left, (const T *)t->a->A_left + t->d * N, N, t->lanes);
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
        for (int64_t j = 0; j < W; j++) memcpy(dst + j * dim, &t->s->row[n * ROUND_UP(W) + j], sizeof(T) * t->lanes);
    }
}

/* One state of row i: advances it and adds its share of the output. Row 0 has no row above it. */
INLINE void NAME(advance_)(const int first, const NAME(task) *t, int64_t n) {
    const NAME(scratch) *s = t->s;
    const int64_t W = t->a->width, pitch = ROUND_UP(W);
    const T *bt = s->btop + n * ROWS * pitch, *bl = s->bleft + n * ROWS * pitch, *c = s->c + n * ROWS * pitch;
    V *row = s->row + n * pitch;
    V h = {0};
    const V rt = s->rate_top[n], rl = s->rate_left[n];
    for (int64_t at = 0; at < W; at += GROUP) {
        V from_left[GROUP], from_top[GROUP], in[GROUP];
        EACH from_left[j] = s->left[at + j] * rl;
        DECAY(from_left);
        if (first) EACH in[j] = s->left[at + j] * s->x[at + j] * bl[at + j];
        else {
            EACH from_top[j] = s->top[at + j] * rt;
            DECAY(from_top);
            EACH {
                const V x = s->x[at + j], left = s->left[at + j] * x * bl[at + j], top = s->top[at + j] * x * bt[at + j];
                /* the weights of the mean: all from the left in row 0, all from above in column 0 of the others */
                const T wl = at + j ? (T)0.5 : 0, wt = at + j ? (T)0.5 : 1;
                in[j] = wl * left + wt * (top + from_top[j] * row[at + j]);
                from_left[j] *= wl;
            }
        }
        EACH {
            h = FMA(from_left[j], h, in[j]); /* the only operation that waits for the pixel before */
            row[at + j] = h;
            s->y[at + j] += h * c[at + j];
        }
    }
}

APART void NAME(advance)(const NAME(task) *t, int64_t n) { NAME(advance_)(0, t, n); }
APART void NAME(advance_first)(const NAME(task) *t, int64_t n) { NAME(advance_)(1, t, n); }

APART void NAME(forward_task)(const NAME(task) *t) {
    const wavefront_args *a = t->a;
    const NAME(scratch) *s = t->s;
    const int64_t N = a->state, W = a->width;
    V skip = {0};
    NAME(load_parameters)(t);
    if (a->D) NAME(load_rows)(&skip, (const T *)a->D + t->d, 1, 1, t->lanes, 1);
    memset(s->row, 0, sizeof(V) * N * ROUND_UP(W));
    for (int64_t i = 0; i < a->height; i++) {
        if (a->checkpoints && i % ROWS == 0) NAME(save_checkpoint)(t, i / ROWS);
        NAME(load_row)(t, i, 0, 0);
        for (int64_t j = 0; j < W; j++) s->y[j] = a->D ? s->x[j] * skip : skip; /* x may be infinite */
        for (int64_t n = 0; n < N; n++)
            if (i) NAME(advance)(t, n);
            else NAME(advance_first)(t, n);
        NAME(store_map)(t, s->y, a->out, a->out_stride, i);
    }
}

/* One state of a band of rows from row i on, the k-th of those at hand: recomputes it and its decays, times the weights of
 * the mean. */
INLINE void NAME(recompute_)(const NAME(task) *t, int64_t i, int64_t rows, int64_t n, int k) {
    const NAME(scratch) *s = t->s;
    const int64_t W = t->a->width, pitch = ROUND_UP(W), plane = ROWS * pitch;
    const T *bt = s->btop + n * plane, *bl = s->bleft + n * plane, *src = NAME(checkpoint)(t, i / ROWS, n);
    const V rt = s->rate_top[n], rl = s->rate_left[n];
    V *above = s->above + k * pitch, *states = s->states + k * plane;
    memset(above, 0, sizeof(V) * pitch);
    for (int64_t j = 0; j < W; j++) memcpy(&above[j], src + j * t->a->dim, sizeof(T) * t->lanes);
    for (int64_t r = 0; r < rows; r++) {
        V h = {0};
        const V *last = r ? states + (r - 1) * pitch : above;
        for (int64_t first = 0; first < W; first += GROUP) {
            const int64_t at = r * pitch + first;
            V from_left[GROUP], from_top[GROUP], in[GROUP];
            EACH from_left[j] = s->left[at + j] * rl;
            DECAY(from_left);
            EACH from_top[j] = s->top[at + j] * rt;
            DECAY(from_top);
            EACH {
                const T wl = i + r == 0 ? 1 : first + j ? (T)0.5 : 0, wt = 1 - wl;
                const V left = s->left[at + j] * bl[at + j], top = s->top[at + j] * bt[at + j];
                from_left[j] *= wl, from_top[j] *= wt;
                in[j] = (wl * left + wt * top) * s->x[at + j] + from_top[j] * last[first + j];
            }
            EACH {
                h = FMA(from_left[j], h, in[j]);
                states[at + j] = h;
                s->decay_left[k * plane + at + j] = from_left[j];
                s->decay_top[k * plane + at + j] = from_top[j];
            }
        }
    }
}

INLINE void NAME(add_sum)(T *to, V v, int add) { *to = NAME(sum_lanes)(v) + (add ? *to : 0); }

/* The adjoint recurrence of `many` states over a band, after `recompute_`. */
INLINE void NAME(retreat_)(const int many, const NAME(task) *t, int64_t i, int64_t rows, int64_t n) {
    const wavefront_args *a = t->a;
    const NAME(scratch) *s = t->s;
    const int64_t N = a->state, H = a->height, W = a->width, pitch = ROUND_UP(W), plane = ROWS * pitch;
    const int64_t base = ((t->b * a->slabs + t->slab) * N + n) * H;
    const T *bt = s->btop + n * plane, *bl = s->bleft + n * plane, *c = s->c + n * plane;
    V *carry = s->row + n * pitch;
    V rt[PAIR], rl[PAIR], drt[PAIR], drl[PAIR];
    for (int k = 0; k < many; k++) {
        rt[k] = s->rate_top[n + k], rl[k] = s->rate_left[n + k];
        drt[k] = s->drate_top[n + k], drl[k] = s->drate_left[n + k];
    }
    for (int64_t r = rows - 1; r >= 0; r--) {
        V g[PAIR]; /* what the pixel to the right hands over */
        const int64_t line = (base + NAME(row_of)(a, i + r)) * W;
        for (int k = 0; k < many; k++) g[k] = (V){0};
        for (int64_t j = W - 1, at = r * pitch + j; j >= 0; j--, at--) {
            const T wl = i + r == 0 ? 1 : j ? (T)0.5 : 0, wt = 1 - wl;
            const V x = s->x[at], left = s->left[at], top = s->top[at], dy = s->y[at];
            V dleft = s->dleft[at], dtop = s->dtop[at], drive_left = s->drive_left[at], drive_top = s->drive_top[at];
            for (int k = 0; k < many; k++) {
                const int64_t here = k * plane + at, to = line + k * H * W + s->pixel[j];
                const V above = r ? s->states[here - pitch] : s->above[k * pitch + j];
                const V before = j ? s->states[here - 1] : (V){0};
                const V dh = dy * c[here] + g[k] + carry[k * pitch + j], gl = wl * dh, gt = wt * dh;
                NAME(add_sum)((T *)a->dC + to, dy * s->states[here], t->add);
                NAME(add_sum)((T *)a->dB_left + to, gl * left * x, t->add);
                NAME(add_sum)((T *)a->dB_top + to, gt * top * x, t->add);
                drive_left += gl * bl[here];
                drive_top += gt * bt[here];
                g[k] = dh * s->decay_left[here];
                carry[k * pitch + j] = dh * s->decay_top[here];
                const V slope_left = g[k] * before, slope_top = carry[k * pitch + j] * above;
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
    for (int k = 0; k < PAIR; k++) NAME(recompute_)(t, i, rows, n + k, k);
    NAME(retreat_)(PAIR, t, i, rows, n);
}

APART void NAME(retreat_one)(const NAME(task) *t, int64_t i, int64_t rows, int64_t n) {
    NAME(recompute_)(t, i, rows, n, 0);
    NAME(retreat_)(1, t, i, rows, n);
}

/* Sums of a task that become gradients of D and of the biases. */
typedef struct {
    V skip, bias_top, bias_left;
} NAME(sums);

/* Turns the gradients of a row of a band into those of the inputs, and writes them. */
APART void NAME(finish_row)(const NAME(task) *t, int64_t i, int64_t r, V skip, NAME(sums) *sums) {
    const NAME(scratch) *s = t->s;
    const int64_t W = t->a->width, pitch = ROUND_UP(W);
    for (int64_t j = 0, at = r * pitch; j < W; j++, at++) {
        const V x = s->x[at], dy = s->y[at], drive_left = s->drive_left[at], drive_top = s->drive_top[at];
        s->dleft[at] = (s->dleft[at] * RATE_UNSCALE + drive_left * x) * s->slope_left[at];
        s->dtop[at] = (s->dtop[at] * RATE_UNSCALE + drive_top * x) * s->slope_top[at];
        sums->skip += dy * x;
        sums->bias_left += s->dleft[at];
        sums->bias_top += s->dtop[at];
        s->drive_left[at] = drive_left * s->left[at] + drive_top * s->top[at] + (t->a->D ? dy * skip : skip);
    }
    NAME(store_map)(t, s->drive_left + r * pitch, t->a->du, t->a->du_stride, i + r);
    NAME(store_map)(t, s->dleft + r * pitch, t->a->ddelta_left, t->a->ddelta_left_stride, i + r);
    NAME(store_map)(t, s->dtop + r * pitch, t->a->ddelta_top, t->a->ddelta_top_stride, i + r);
}

APART void NAME(backward_task)(const NAME(task) *t) {
    const wavefront_args *a = t->a;
    const NAME(scratch) *s = t->s;
    const int64_t N = a->state, W = a->width, channel = t->b * a->dim + t->d;
    NAME(sums) sums = {{0}, {0}, {0}};
    V skip = {0};
    NAME(load_parameters)(t);
    if (a->D) NAME(load_rows)(&skip, (const T *)a->D + t->d, 1, 1, t->lanes, 1);
    memset(s->row, 0, sizeof(V) * N * ROUND_UP(W));
    memset(s->drate_top, 0, sizeof(V) * N);
    memset(s->drate_left, 0, sizeof(V) * N);
    for (int64_t i = (a->height - 1) / ROWS * ROWS; i >= 0; i -= ROWS) {
        const int64_t rows = a->height - i < ROWS ? a->height - i : ROWS;
        for (int64_t r = 0; r < rows; r++) {
            NAME(load_row)(t, i + r, r, 1);
            NAME(load_map)(t, s->y + r * ROUND_UP(W), a->dout, a->dout_stride, i + r);
        }
        memset(s->dleft, 0, sizeof(V) * rows * ROUND_UP(W));
        memset(s->dtop, 0, sizeof(V) * rows * ROUND_UP(W));
        memset(s->drive_left, 0, sizeof(V) * rows * ROUND_UP(W));
        memset(s->drive_top, 0, sizeof(V) * rows * ROUND_UP(W));
        for (int64_t n = 0, step; n < N; n += step) {
            step = n + PAIR <= N ? PAIR : 1;
            if (step == PAIR) NAME(retreat_pair)(t, i, rows, n);
            else NAME(retreat_one)(t, i, rows, n);
        }
        for (int64_t r = 0; r < rows; r++) NAME(finish_row)(t, i, r, skip, &sums);
    }
    NAME(store_rows)(s->drate_top, (T *)a->dA_top + channel * N, N, N, t->lanes);
    NAME(store_rows)(s->drate_left, (T *)a->dA_left + channel * N, N, N, t->lanes);
    if (a->D) NAME(store_rows)(&sums.skip, (T *)a->dD + channel, 1, 1, t->lanes);
    if (a->bias_top) NAME(store_rows)(&sums.bias_top, (T *)a->dbias_top + channel, 1, 1, t->lanes);
    if (a->bias_left) NAME(store_rows)(&sums.bias_left, (T *)a->dbias_left + channel, 1, 1, t->lanes);
}

/* Lays the scratch of a thread out in one block of memory; returns its size, and fills `s` if `base` is given. */
static size_t NAME(layout)(const wavefront_args *a, int backward, NAME(scratch) *s, char *base) {
    const size_t P = ROUND_UP(a->width), N = a->state, band = sizeof(V) * ROWS * P, extra = backward ? band : 0;
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
    CARVE(row, V, sizeof(V) * N * P);
    CARVE(above, V, sizeof(V) * PAIR * P);
    CARVE(rate_top, V, sizeof(V) * N);
    CARVE(rate_left, V, sizeof(V) * N);
    CARVE(drate_top, V, sizeof(V) * N);
    CARVE(drate_left, V, sizeof(V) * N);
    CARVE(btop, T, sizeof(T) * N * ROWS * P);
    CARVE(bleft, T, sizeof(T) * N * ROWS * P);
    CARVE(c, T, sizeof(T) * N * ROWS * P);
    CARVE(pixel, int64_t, sizeof(int64_t) * P);
#undef CARVE
    return (size_t)(p - base);
}

/* Runs all tasks on the given number of threads; returns 0, or 1 if memory ran out. Tasks never share an output, so results
 * do not depend on the number of threads. */
static int NAME(run)(const wavefront_args *a, int backward) {
    const int64_t tasks = a->batch * a->slabs;
    const size_t size = NAME(layout)(a, backward, NULL, NULL);
    int64_t next = 0;
    /* a shared counter instead of `omp for`: no barrier but the last, and a thread without memory just takes no task */
#pragma omp parallel num_threads(team(a->threads, tasks))
    {
        char *memory = THREAD < tasks ? malloc(size + 64) : NULL;
        if (memory) {
            NAME(scratch) s;
            NAME(layout)(a, backward, &s, (char *)(((uintptr_t)memory + 63) / 64 * 64));
            const unsigned mode = flush_denormals();
            for (;;) {
                int64_t at;
#pragma omp atomic capture
                at = next++;
                if (at >= tasks) break;
                const int64_t first = at % a->slabs * a->slab;
                const int64_t end = first + a->slab < a->dim ? first + a->slab : a->dim;
                for (int64_t d = first; d < end; d += LANES) {
                    const int lanes = end - d < LANES ? (int)(end - d) : LANES;
                    const NAME(task) t = {a, &s, at / a->slabs, at % a->slabs, d, lanes, d > first};
                    if (backward) NAME(backward_task)(&t);
                    else NAME(forward_task)(&t);
                }
            }
            restore_denormals(mode);
        }
        free(memory);
    }
    return next < tasks;
}

#undef ROWS
#undef PAIR
