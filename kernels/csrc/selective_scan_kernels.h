/* The scan for one scalar type and one instruction set; instances.h includes this file once for each pair.
 *
 * Lanes are channels, so sums over states need no shuffle and any state size fills the vectors. A chunk of 64 positions of
 * 64 bytes of channels is a tile (4 KiB); maps are read into tiles through the route and written back the same way, so the
 * recurrence itself sees neither routes nor strides. It runs state by state over a chunk: decay rate and state stay in
 * registers and the exponentials of a chunk are independent of each other.
 */
#define CHUNK VISIONSSM_CHUNK
#define PITCH (CHUNK + 1) /* tiles of exactly 4 KiB would all compete for the same cache sets */

/* Scratch of one thread, carved out of one aligned block; the sizes of the last rows depend on the states N. */
typedef struct {
    V x[PITCH], step[PITCH], drive[PITCH], y[PITCH];
    V slope[PITCH], dy[PITCH], gate[PITCH], dout[PITCH], dstep[PITCH], ddrive[PITCH];
    V decay[STATES][PITCH], after[STATES][PITCH];
    int64_t pixel[CHUNK];
} NAME(tiles);

typedef struct {
    NAME(tiles) *tiles;
    V *rate, *state, *carry, *drate, *db_sum, *dc_sum; /* [blocks][N] each */
    V *bvec, *cvec;                            /* [blocks][N]: constant B and C */
    V *db, *dc;                                /* [N][PITCH]: sums over the blocks of a slab */
    V *dskip, *dbias;                          /* [blocks] */
    T *brow, *crow;                            /* [N][CHUNK] */
} NAME(scratch);

APART void NAME(fill_pixels)(int64_t *pixel, const scan_args *a, int64_t k, int64_t start, int len) {
    if (a->index)
        for (int i = 0; i < len; i++) pixel[i] = a->index[k * a->length + start + i];
    else
        for (int i = 0; i < len; i++) pixel[i] = a->reverse ? a->length - 1 - start - i : start + i;
}

/* Reads delta, finishes it (bias, softplus) and multiplies it with the input. */
APART void NAME(load_inputs)(NAME(tiles) *t, const scan_args *a, int64_t b, int64_t k, int64_t d, int len, int lanes, int slope) {
    const int64_t *us = a->u_stride, *ds = a->delta_stride;
    NAME(load_tile)(t->x, (const T *)a->u + b * us[0] + k * us[1] + d * us[2], us[2], us[3], t->pixel, len, lanes);
    NAME(load_tile)(t->step, (const T *)a->delta + b * ds[0] + k * ds[1] + d * ds[2], ds[2], ds[3], t->pixel, len, lanes);
    if (a->delta_bias) {
        V bias;
        NAME(load_rows)(&bias, (const T *)a->delta_bias + k * a->dim + d, 1, 1, lanes, 1);
        for (int i = 0; i < len; i++) t->step[i] += bias;
    }
    if (a->delta_softplus)
        for (int i = 0; i < len; i++) {
            V raw = t->step[i];
            t->step[i] = NAME(softplus)(raw);
            if (slope) t->slope[i] = SELECT(raw > 20, (V){0} + 1, NAME(sigmoid)(raw));
        }
    for (int i = 0; i < len; i++) t->drive[i] = t->step[i] * t->x[i];
}

/* `many` states of a chunk: advances them and adds their share of the output. */
INLINE void NAME(advance_)(const int many, const int b_const, const int c_const, NAME(tiles) *t, V *state, const V *rate,
                          const T *brow, const T *crow, const V *bvec, const V *cvec, int len) {
    V h[4], r[4];
    for (int j = 0; j < many; j++) h[j] = state[j], r[j] = rate[j];
    for (int i = 0; i < len; i++) {
        V step = t->step[i], drive = t->drive[i], y = t->y[i];
        for (int j = 0; j < many; j++) {
            V in = b_const ? drive * bvec[j] : drive * brow[j * CHUNK + i];
            h[j] = DECAY(step * r[j]) * h[j] + in;
            y += c_const ? h[j] * cvec[j] : h[j] * crow[j * CHUNK + i];
        }
        t->y[i] = y;
    }
    for (int j = 0; j < many; j++) state[j] = h[j];
}

/* The variants that are compiled apart; constant B and C are rare and share one. */
#define ADVANCE_ARGS NAME(tiles) *t, V *state, const V *rate, const T *brow, const T *crow, const V *bvec, const V *cvec, int len
#define ADVANCE_PASS t, state, rate, brow, crow, bvec, cvec, len
APART void NAME(advance_many)(ADVANCE_ARGS) { NAME(advance_)(STATES, 0, 0, ADVANCE_PASS); }
APART void NAME(advance_one)(ADVANCE_ARGS) { NAME(advance_)(1, 0, 0, ADVANCE_PASS); }
APART void NAME(advance_const)(int b_const, int c_const, ADVANCE_ARGS) { NAME(advance_)(1, b_const, c_const, ADVANCE_PASS); }

INLINE void NAME(advance)(int many, int b_const, int c_const, ADVANCE_ARGS) {
    if (b_const || c_const) NAME(advance_const)(b_const, c_const, ADVANCE_PASS);
    else if (many == 1) NAME(advance_one)(ADVANCE_PASS);
    else NAME(advance_many)(ADVANCE_PASS);
}

APART void NAME(forward_slab)(const scan_args *a, NAME(scratch) *s, int64_t b, int64_t k, int64_t g, int64_t d0, int64_t d1) {
    const int b_const = a->b_groups == 0, c_const = a->c_groups == 0, many = b_const || c_const ? 1 : STATES;
    const int64_t N = a->state, L = a->length, chunks = (L + CHUNK - 1) / CHUNK, bk = b * a->routes + k;
    NAME(tiles) *t = s->tiles;
    const T *B = a->B, *C = a->C;
    if (!b_const) B += b * a->b_stride[0] + k * a->b_stride[1] + g * a->b_groups / a->groups * a->b_stride[2];
    if (!c_const) C += b * a->c_stride[0] + k * a->c_stride[1] + g * a->c_groups / a->groups * a->c_stride[2];
    memset(s->state, 0, sizeof(V) * N * ((d1 - d0 + LANES - 1) / LANES));
    for (int64_t d = d0, block = 0; d < d1; d += LANES, block++) {
        const int lanes = d1 - d < LANES ? (int)(d1 - d) : LANES;
        NAME(load_rows)(s->rate + block * N, (const T *)a->A + (k * a->dim + d) * N, N, N, lanes, RATE_SCALE);
        if (b_const) NAME(load_rows)(s->bvec + block * N, B + (k * a->dim + d) * N, N, N, lanes, 1);
        if (c_const) NAME(load_rows)(s->cvec + block * N, C + (k * a->dim + d) * N, N, N, lanes, 1);
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int len = L - chunk * CHUNK < CHUNK ? (int)(L - chunk * CHUNK) : CHUNK;
        NAME(fill_pixels)(t->pixel, a, k, chunk * CHUNK, len);
        if (!b_const) NAME(load_matrix)(s->brow, B, a->b_stride[3], a->b_stride[4], t->pixel, len, N, CHUNK);
        if (!c_const) NAME(load_matrix)(s->crow, C, a->c_stride[3], a->c_stride[4], t->pixel, len, N, CHUNK);
        for (int64_t d = d0, block = 0; d < d1; d += LANES, block++) {
            const int lanes = d1 - d < LANES ? (int)(d1 - d) : LANES;
            const int64_t row = bk * a->dim + d;
            V *state = s->state + block * N;
            if (a->checkpoints)
                NAME(store_rows)(state, (T *)a->checkpoints + (row * chunks + chunk) * N, chunks * N, N, lanes, 1);
            NAME(load_inputs)(t, a, b, k, d, len, lanes, 0);
            V skip = {0};
            if (a->D) NAME(load_rows)(&skip, (const T *)a->D + k * a->dim + d, 1, 1, lanes, 1);
            for (int i = 0; i < len; i++) t->y[i] = t->x[i] * skip;
            const V *rate = s->rate + block * N, *bvec = s->bvec + block * N, *cvec = s->cvec + block * N;
            for (int64_t n = 0, step; n < N; n += step) {
                step = n + many <= N ? many : 1;
                NAME(advance)((int)step, b_const, c_const, t, state + n, rate + n, s->brow + n * CHUNK, s->crow + n * CHUNK,
                              bvec + n, cvec + n, len);
            }
            if (a->z) {
                const int64_t *zs = a->z_stride;
                NAME(load_tile)(t->gate, (const T *)a->z + b * zs[0] + k * zs[1] + d * zs[2], zs[2], zs[3], t->pixel, len, lanes);
                for (int i = 0; i < len; i++) t->y[i] *= t->gate[i] * NAME(sigmoid)(t->gate[i]);
            }
            const int64_t out_row = a->merge ? b * a->dim + d : row;
            NAME(store_tile)(t->y, (T *)a->out + out_row * L, L, t->pixel, len, lanes, a->merge && k);
        }
    }
    for (int64_t d = d0, block = 0; d < d1; d += LANES, block++)
        NAME(store_rows)(s->state + block * N, (T *)a->last_state + (bk * a->dim + d) * N, N, N,
                         d1 - d < LANES ? (int)(d1 - d) : LANES, 1);
}

/* `many` states of a chunk: recomputes them from the checkpoint, then runs the adjoint recurrence backwards. */
INLINE void NAME(retreat_)(const int many, const int b_const, const int c_const, const int gated, NAME(tiles) *t,
                          const V *start, V *carry, const V *rate, V *drate, const T *brow, const T *crow,
                          const V *bvec, const V *cvec, V *db, V *dc, V *db_sum, V *dc_sum, int len) {
    V h[STATES], r[STATES], g[STATES], dr[STATES], bs[STATES], cs[STATES];
    for (int j = 0; j < many; j++) h[j] = start[j], r[j] = rate[j], g[j] = carry[j], dr[j] = drate[j];
    for (int i = 0; i < len; i++) {
        V step = t->step[i], drive = t->drive[i], y = gated ? t->y[i] : (V){0};
        for (int j = 0; j < many; j++) {
            V decay = DECAY(step * r[j]);
            h[j] = decay * h[j] + (b_const ? drive * bvec[j] : drive * brow[j * CHUNK + i]);
            t->decay[j][i] = decay;
            t->after[j][i] = h[j];
            if (gated) y += c_const ? h[j] * cvec[j] : h[j] * crow[j * CHUNK + i];
        }
        if (gated) t->y[i] = y;
    }
    for (int j = 0; j < many; j++) bs[j] = b_const ? db_sum[j] : (V){0}, cs[j] = c_const ? dc_sum[j] : (V){0};
    for (int i = len - 1; i >= 0; i--) {
        V step = t->step[i], drive = t->drive[i], dy = t->dy[i], dstep = t->dstep[i], ddrive = t->ddrive[i];
        for (int j = 0; j < many; j++) {
            V before = i ? t->after[j][i - 1] : start[j];
            if (c_const) g[j] += dy * cvec[j], cs[j] += dy * t->after[j][i];
            else g[j] += dy * crow[j * CHUNK + i], dc[j * PITCH + i] += dy * t->after[j][i];
            if (b_const) bs[j] += g[j] * drive, ddrive += g[j] * bvec[j];
            else db[j * PITCH + i] += g[j] * drive, ddrive += g[j] * brow[j * CHUNK + i];
            g[j] *= t->decay[j][i];
            V slope = g[j] * before;
            dr[j] += slope * step;
            dstep += slope * r[j];
        }
        t->dstep[i] = dstep;
        t->ddrive[i] = ddrive;
    }
    for (int j = 0; j < many; j++) {
        carry[j] = g[j], drate[j] = dr[j];
        if (b_const) db_sum[j] = bs[j];
        if (c_const) dc_sum[j] = cs[j];
    }
}

#define RETREAT_ARGS NAME(tiles) *t, const V *start, V *carry, const V *rate, V *drate, const T *brow, const T *crow, \
    const V *bvec, const V *cvec, V *db, V *dc, V *db_sum, V *dc_sum, int len
#define RETREAT_PASS t, start, carry, rate, drate, brow, crow, bvec, cvec, db, dc, db_sum, dc_sum, len
APART void NAME(retreat_many)(RETREAT_ARGS) { NAME(retreat_)(STATES, 0, 0, 0, RETREAT_PASS); }
APART void NAME(retreat_one)(RETREAT_ARGS) { NAME(retreat_)(1, 0, 0, 0, RETREAT_PASS); }
APART void NAME(retreat_many_gated)(RETREAT_ARGS) { NAME(retreat_)(STATES, 0, 0, 1, RETREAT_PASS); }
APART void NAME(retreat_any)(int b_const, int c_const, int gated, RETREAT_ARGS) {
    NAME(retreat_)(1, b_const, c_const, gated, RETREAT_PASS);
}

INLINE void NAME(retreat)(int many, int b_const, int c_const, int gated, RETREAT_ARGS) {
    if (many == 1 && (b_const || c_const || gated)) NAME(retreat_any)(b_const, c_const, gated, RETREAT_PASS);
    else if (many == 1) NAME(retreat_one)(RETREAT_PASS);
    else if (gated) NAME(retreat_many_gated)(RETREAT_PASS);
    else NAME(retreat_many)(RETREAT_PASS);
}

/* One block of channels over one chunk. */
APART void NAME(backward_block)(const scan_args *a, NAME(scratch) *s, int64_t b, int64_t k, int64_t d, int64_t block,
                                int64_t chunk, int len, int lanes) {
    const int b_const = a->b_groups == 0, c_const = a->c_groups == 0, gated = a->z != NULL;
    const int many = b_const || c_const ? 1 : STATES;
    const int64_t N = a->state, L = a->length, chunks = (L + CHUNK - 1) / CHUNK, row = (b * a->routes + k) * a->dim + d;
    const int64_t *os = a->dout_stride;
    NAME(tiles) *t = s->tiles;
    NAME(load_inputs)(t, a, b, k, d, len, lanes, 1);
    NAME(load_rows)(s->state, (const T *)a->checkpoints + (row * chunks + chunk) * N, chunks * N, N, lanes, 1);
    NAME(load_tile)(t->dy, (const T *)a->dout + b * os[0] + k * os[1] + d * os[2], os[2], os[3], t->pixel, len, lanes);
    V skip = {0};
    if (a->D) NAME(load_rows)(&skip, (const T *)a->D + k * a->dim + d, 1, 1, lanes, 1);
    if (gated) {
        const int64_t *zs = a->z_stride;
        NAME(load_tile)(t->gate, (const T *)a->z + b * zs[0] + k * zs[1] + d * zs[2], zs[2], zs[3], t->pixel, len, lanes);
        for (int i = 0; i < len; i++) {
            t->dout[i] = t->dy[i];
            t->dy[i] *= t->gate[i] * NAME(sigmoid)(t->gate[i]);
            t->y[i] = t->x[i] * skip;
        }
    }
    memset(t->dstep, 0, sizeof(V) * len);
    memset(t->ddrive, 0, sizeof(V) * len);
    for (int64_t n = 0, at = block * N, step; n < N; n += step, at += step) {
        step = n + many <= N ? many : 1;
        NAME(retreat)((int)step, b_const, c_const, gated, t, s->state + n, s->carry + at, s->rate + at, s->drate + at,
                      s->brow + n * CHUNK, s->crow + n * CHUNK, s->bvec + at, s->cvec + at, s->db + n * PITCH,
                      s->dc + n * PITCH, s->db_sum + at, s->dc_sum + at, len);
    }
    V dskip = s->dskip[block], dbias = s->dbias[block];
    for (int i = 0; i < len; i++) {
        V dy = t->dy[i], x = t->x[i];
        V dstep = t->dstep[i] * RATE_UNSCALE + t->ddrive[i] * x;
        if (a->delta_softplus) dstep *= t->slope[i];
        dskip += dy * x;
        dbias += dstep;
        t->dstep[i] = dstep;
        t->ddrive[i] = t->ddrive[i] * t->step[i] + dy * skip;
    }
    s->dskip[block] = dskip;
    s->dbias[block] = dbias;
    if (gated) {
        for (int i = 0; i < len; i++) {
            V gate = t->gate[i], sigmoid = NAME(sigmoid)(gate);
            t->y[i] *= t->dout[i] * sigmoid * (1 + gate * (1 - sigmoid));
        }
        NAME(store_tile)(t->y, (T *)a->dz + row * L, L, t->pixel, len, lanes, 0);
    }
    NAME(store_tile)(t->dstep, (T *)a->ddelta + row * L, L, t->pixel, len, lanes, 0);
    const int64_t u_row = a->shared_u ? b * a->dim + d : row;
    NAME(store_tile)(t->ddrive, (T *)a->du + u_row * L, L, t->pixel, len, lanes, a->shared_u && k);
}

/* Writes the lane sums of dB or dC of a chunk: rows of L, one a state. */
APART void NAME(store_matrix)(const V *sum, T *dst, int64_t length, const int64_t *pixel, int len, int64_t n) {
    for (int64_t j = 0; j < n; j++)
        for (int i = 0; i < len; i++) dst[j * length + pixel[i]] = NAME(sum_lanes)(sum[j * PITCH + i]);
}

APART void NAME(backward_slab)(const scan_args *a, NAME(scratch) *s, int64_t b, int64_t k, int64_t g, int64_t slab,
                               int64_t d0, int64_t d1) {
    const int b_const = a->b_groups == 0, c_const = a->c_groups == 0;
    const int64_t N = a->state, L = a->length, chunks = (L + CHUNK - 1) / CHUNK, bk = b * a->routes + k;
    const int64_t blocks = (d1 - d0 + LANES - 1) / LANES;
    NAME(tiles) *t = s->tiles;
    const T *B = a->B, *C = a->C;
    T *dB = a->dB, *dC = a->dC;
    if (!b_const) {
        const int64_t share = a->groups / a->b_groups;
        B += b * a->b_stride[0] + k * a->b_stride[1] + g / share * a->b_stride[2];
        dB += ((bk * a->b_groups + g / share) * share * a->slabs + g % share * a->slabs + slab) * N * L;
    }
    if (!c_const) {
        const int64_t share = a->groups / a->c_groups;
        C += b * a->c_stride[0] + k * a->c_stride[1] + g / share * a->c_stride[2];
        dC += ((bk * a->c_groups + g / share) * share * a->slabs + g % share * a->slabs + slab) * N * L;
    }
    const size_t rows = sizeof(V) * N * blocks;
    memset(s->drate, 0, rows);
    memset(s->carry, 0, rows);
    memset(s->db_sum, 0, rows);
    memset(s->dc_sum, 0, rows);
    memset(s->dskip, 0, sizeof(V) * blocks);
    memset(s->dbias, 0, sizeof(V) * blocks);
    for (int64_t d = d0, block = 0; d < d1; d += LANES, block++) {
        const int lanes = d1 - d < LANES ? (int)(d1 - d) : LANES;
        const int64_t channel = k * a->dim + d;
        NAME(load_rows)(s->rate + block * N, (const T *)a->A + channel * N, N, N, lanes, RATE_SCALE);
        if (b_const) NAME(load_rows)(s->bvec + block * N, B + channel * N, N, N, lanes, 1);
        if (c_const) NAME(load_rows)(s->cvec + block * N, C + channel * N, N, N, lanes, 1);
        if (a->dlast_state)
            NAME(load_rows)(s->carry + block * N, (const T *)a->dlast_state + (bk * a->dim + d) * N, N, N, lanes, 1);
    }
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        const int len = L - chunk * CHUNK < CHUNK ? (int)(L - chunk * CHUNK) : CHUNK;
        NAME(fill_pixels)(t->pixel, a, k, chunk * CHUNK, len);
        if (!b_const) NAME(load_matrix)(s->brow, B, a->b_stride[3], a->b_stride[4], t->pixel, len, N, CHUNK);
        if (!c_const) NAME(load_matrix)(s->crow, C, a->c_stride[3], a->c_stride[4], t->pixel, len, N, CHUNK);
        memset(s->db, 0, sizeof(V) * N * PITCH);
        memset(s->dc, 0, sizeof(V) * N * PITCH);
        for (int64_t d = d0, block = 0; d < d1; d += LANES, block++)
            NAME(backward_block)(a, s, b, k, d, block, chunk, len, d1 - d < LANES ? (int)(d1 - d) : LANES);
        if (!b_const) NAME(store_matrix)(s->db, dB, L, t->pixel, len, N);
        if (!c_const) NAME(store_matrix)(s->dc, dC, L, t->pixel, len, N);
    }
    for (int64_t d = d0, block = 0; d < d1; d += LANES, block++) {
        const int lanes = d1 - d < LANES ? (int)(d1 - d) : LANES;
        const int64_t row = bk * a->dim + d;
        NAME(store_rows)(s->drate + block * N, (T *)a->dA + row * N, N, N, lanes, 1);
        if (b_const) NAME(store_rows)(s->db_sum + block * N, dB + row * N, N, N, lanes, 1);
        if (c_const) NAME(store_rows)(s->dc_sum + block * N, dC + row * N, N, N, lanes, 1);
        if (a->D) NAME(store_rows)(s->dskip + block, (T *)a->dD + row, 1, 1, lanes, 1);
        if (a->delta_bias) NAME(store_rows)(s->dbias + block, (T *)a->ddelta_bias + row, 1, 1, lanes, 1);
    }
}

/* One task: a slab of channels of one batch element; `k` < 0 runs all routes in order. */
TARGET static void NAME(task)(const scan_args *a, NAME(scratch) *s, int backward, int64_t b, int64_t k, int64_t g, int64_t slab) {
    const int64_t width = a->dim / a->groups, d0 = g * width + slab * a->slab;
    const int64_t d1 = d0 + a->slab < (g + 1) * width ? d0 + a->slab : (g + 1) * width;
    const int64_t first = k < 0 ? 0 : k, last = k < 0 ? a->routes : k + 1;
    for (k = first; k < last; k++) {
        if (backward) NAME(backward_slab)(a, s, b, k, g, slab, d0, d1);
        else NAME(forward_slab)(a, s, b, k, g, d0, d1);
    }
}

/* Lays the scratch of a thread out in one block of memory; returns its size, and fills `s` if `base` is given. */
static size_t NAME(layout)(const scan_args *a, NAME(scratch) *s, char *base) {
    const size_t blocks = (a->slab + LANES - 1) / LANES, rows = sizeof(V) * a->state * blocks;
    const size_t sums = sizeof(V) * a->state * PITCH, matrix = sizeof(T) * a->state * CHUNK;
    char *p = base;
#define CARVE(field, type, bytes) do { if (base) s->field = (type *)p; p += ((bytes) + 63) / 64 * 64; } while (0)
    CARVE(tiles, NAME(tiles), sizeof(NAME(tiles)));
    CARVE(rate, V, rows);
    CARVE(state, V, rows);
    CARVE(carry, V, rows);
    CARVE(drate, V, rows);
    CARVE(db_sum, V, rows);
    CARVE(dc_sum, V, rows);
    CARVE(bvec, V, rows);
    CARVE(cvec, V, rows);
    CARVE(db, V, sums);
    CARVE(dc, V, sums);
    CARVE(dskip, V, sizeof(V) * blocks);
    CARVE(dbias, V, sizeof(V) * blocks);
    CARVE(brow, T, matrix);
    CARVE(crow, T, matrix);
#undef CARVE
    return (size_t)(p - base);
}

/* Runs all tasks on the given number of threads; returns 0, or 1 if memory ran out. Tasks never share an output, and their
 * cut depends on shapes alone, so results do not depend on the number of threads. */
static int NAME(run)(const scan_args *a, int backward) {
    /* routes that add into one map run one after the other */
    const int64_t parallel_routes = (backward ? a->shared_u : a->merge) ? 1 : a->routes;
    const int64_t tasks = a->batch * parallel_routes * a->groups * a->slabs;
    const size_t size = NAME(layout)(a, NULL, NULL);
    int64_t next = 0;
    /* a shared counter instead of `omp for`: no barrier but the last, and a thread without memory just takes no task */
#pragma omp parallel num_threads((int)(a->threads < tasks ? a->threads : tasks))
    {
        char *memory = malloc(size + 64);
        if (memory) {
            NAME(scratch) s;
            NAME(layout)(a, &s, (char *)(((uintptr_t)memory + 63) / 64 * 64));
            const unsigned mode = flush_denormals();
            for (;;) {
                int64_t task;
#pragma omp atomic capture
                task = next++;
                if (task >= tasks) break;
                const int64_t slab = task % a->slabs, g = task / a->slabs % a->groups, bk = task / a->slabs / a->groups;
                const int64_t k = parallel_routes == a->routes ? bk % parallel_routes : -1;
                NAME(task)(a, &s, backward, bk / parallel_routes, k, g, slab);
            }
            restore_denormals(mode);
        }
        free(memory);
    }
    return next < tasks;
}

#undef ADVANCE_ARGS
#undef ADVANCE_PASS
#undef RETREAT_ARGS
#undef RETREAT_PASS
#undef CHUNK
#undef PITCH
