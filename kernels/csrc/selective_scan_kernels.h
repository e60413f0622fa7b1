/* The scan for one scalar type and one instruction set; instances.h includes this file once for each pair.
 *
 * Lanes are channels, so sums over states need no shuffle and any state size fills the vectors. A chunk of 64 positions of
 * a vector of channels is a tile (2 or 4 KiB); maps are read into tiles through the route and written back the same way, so the
 * recurrence itself sees neither routes nor strides. For routes that do not follow memory a task copies its part of maps whose
 * pixels are innermost, so that channels are. The recurrence runs state by state over a chunk, a group of positions at a
 * time: decay rate and state stay in registers, and the exponentials are independent of each other. Tiles are filled up to
 * a whole group with steps of 0, which leave the state as it is.
 */
#define CHUNK VISIONSSM_CHUNK
#define PITCH (CHUNK + 1) /* tiles of exactly 4 KiB would all compete for the same cache sets */
#define MAX_PARTS 9

/* Scratch of one thread, carved out of one aligned block; the sizes of the last rows depend on the states N. */
typedef struct {
    V x[PITCH], step[PITCH], drive[PITCH], y[PITCH];
    V slope[PITCH], dy[PITCH], gate[PITCH], gated[PITCH], dout[PITCH], dstep[PITCH], ddrive[PITCH];
    V decay[PITCH], after[PITCH];
    int64_t pixel[CHUNK], run; /* see NAME(place) */
    T longest;                 /* step */
} NAME(tiles);

typedef struct {
    NAME(tiles) *tiles;
    V *rate, *state, *carry, *drate, *db_sum, *dc_sum; /* [blocks][N] each */
    V *bvec, *cvec;                            /* [blocks][N]: constant B and C */
    V *db, *dc;                                /* [N][PITCH]: sums over the blocks of a slab */
    V *dskip, *dbias;                          /* [blocks] */
    T *brow, *crow;                            /* [N][CHUNK] */
    char *lent;                                /* copies of maps, NULL where no task takes any */
    int64_t *done, turn;                       /* chunks that the task has added to dB and dC, for others and for itself */
} NAME(scratch);

APART void NAME(fill_pixels)(NAME(tiles) *t, const scan_args *a, int64_t k, int64_t start, int len) {
    if (a->index)
        for (int i = 0; i < len; i++) t->pixel[i] = a->index[k * a->length + start + i];
    else
        for (int i = 0; i < len; i++) t->pixel[i] = a->reverse ? a->length - 1 - start - i : start + i;
    t->run = len > 1 ? t->pixel[1] - t->pixel[0] : 1;
    for (int i = 2; i < len; i++)
        if (t->pixel[i] != t->pixel[i - 1] + t->run) t->run = 0;
}

INLINE NAME(place) NAME(place_of)(const NAME(tiles) *t, int len, int lanes) {
    return (NAME(place)){t->pixel, t->run, len, lanes};
}

/* Reads a tile of a map (B, K, D, L), or writes one or adds it. */
INLINE void NAME(load_map)(NAME(tiles) *t, V *tile, const void *map, const int64_t *stride, int64_t b, int64_t k, int64_t d,
                           int len, int lanes) {
    NAME(load_tile)(tile, (const T *)map + b * stride[0] + k * stride[1] + d * stride[2], stride[2], stride[3],
                    NAME(place_of)(t, len, lanes));
}

INLINE void NAME(store_map)(NAME(tiles) *t, const V *tile, void *map, const int64_t *stride, int64_t b, int64_t k, int64_t d,
                            int len, int lanes, int add) {
    NAME(store_tile)(tile, (T *)map + b * stride[0] + k * stride[1] + d * stride[2], stride[2], stride[3],
                     NAME(place_of)(t, len, lanes), add);
}

/* Derivatives of softplus at a group. */
APART void NAME(slopes)(V *slope, const V *raw) {
    V x[GROUP];
    EACH x[j] = raw[j];
    NAME(sigmoid)(x);
    EACH slope[j] = SELECT(raw[j] > 20, (V){0} + 1, x[j]);
}

/* silu of a tile up to a whole group */
APART void NAME(silu_tile)(V *out, const V *gate, int len) {
    for (int i = 0; i < len; i += GROUP) {
        V x[GROUP];
        EACH x[j] = gate[i + j];
        NAME(silu)(x);
        EACH out[i + j] = x[j];
    }
}

/* derivative of silu */
APART void NAME(silu_slope)(V *out, const V *gate, int len) {
    for (int i = 0; i < len; i += GROUP) {
        V x[GROUP];
        EACH x[j] = gate[i + j];
        NAME(sigmoid)(x);
        EACH out[i + j] = x[j] * (1 + gate[i + j] * (1 - x[j]));
    }
}

/* Reads delta, finishes it (bias, softplus) and multiplies it with the input. */
APART void NAME(load_inputs)(NAME(tiles) *t, const scan_args *a, int64_t b, int64_t k, int64_t d, int len, int lanes, int slope) {
    NAME(load_map)(t, t->x, a->u, a->u_stride, b, k, d, len, lanes);
    NAME(load_map)(t, t->step, a->delta, a->delta_stride, b, k, d, len, lanes);
    if (a->delta_bias) {
        V bias;
        NAME(load_rows)(&bias, (const T *)a->delta_bias + k * a->dim + d, 1, 1, lanes, 1);
        for (int i = 0; i < len; i++) t->step[i] += bias;
    }
    for (int i = len; i < ROUND_UP(len); i++) t->x[i] = t->step[i] = (V){0};
    if (a->delta_softplus)
        for (int i = 0; i < len; i += GROUP) {
            if (slope) NAME(slopes)(t->slope + i, t->step + i);
            V soft[GROUP];
            EACH soft[j] = t->step[i + j];
            NAME(softplus)(soft);
            EACH t->step[i + j] = soft[j];
        }
    for (int i = len; i < ROUND_UP(len); i++) t->step[i] = (V){0};
    t->longest = NAME(largest)(t->step, len);
    for (int i = 0; i < ROUND_UP(len); i++) t->drive[i] = t->step[i] * t->x[i];
}

/* One state of a chunk: advances it and adds its share of the output. */
INLINE void NAME(advance_)(const int within, const int b_const, const int c_const, NAME(tiles) *t, V *state, V rate,
                           const T *brow, const T *crow, V bvec, V cvec, int len) {
    V h = *state;
    for (int i = 0; i < len; i += GROUP) {
        V decay[GROUP], in[GROUP];
        EACH decay[j] = t->step[i + j] * rate;
        DECAY_WITHIN(decay, within);
        EACH in[j] = b_const ? t->drive[i + j] * bvec : t->drive[i + j] * brow[i + j];
        EACH {
            h = FMA(decay[j], h, in[j]); /* the only operation that waits for the position before */
            t->y[i + j] += c_const ? h * cvec : h * crow[i + j];
        }
    }
    *state = h;
}

/* The variants that are compiled apart; constant B and C are rare and share one. */
APART void NAME(advance)(NAME(tiles) *t, V *state, V rate, const T *brow, const T *crow, int len) {
    NAME(advance_)(0, 0, 0, t, state, rate, brow, crow, rate, rate, len);
}
/* where the longest step times every rate is known to be small */
APART void NAME(advance_within)(NAME(tiles) *t, V *state, V rate, const T *brow, const T *crow, int len) {
    NAME(advance_)(1, 0, 0, t, state, rate, brow, crow, rate, rate, len);
}
APART void NAME(advance_any)(int b_const, int c_const, NAME(tiles) *t, V *state, V rate, const T *brow, const T *crow, V bvec,
                             V cvec, int len) {
    NAME(advance_)(0, b_const, c_const, t, state, rate, brow, crow, bvec, cvec, len);
}

APART void NAME(forward_slab)(const scan_args *a, NAME(scratch) *s, int64_t b, int64_t k, int64_t g, int64_t d0, int64_t d1) {
    const int b_const = a->b_groups == 0, c_const = a->c_groups == 0;
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
        NAME(fill_pixels)(t, a, k, chunk * CHUNK, len);
        if (!b_const) NAME(load_matrix)(s->brow, CHUNK, B, N, a->b_stride[3], a->b_stride[4], NAME(place_of)(t, len, 0));
        if (!c_const) NAME(load_matrix)(s->crow, CHUNK, C, N, a->c_stride[3], a->c_stride[4], NAME(place_of)(t, len, 0));
        for (int64_t d = d0, block = 0; d < d1; d += LANES, block++) {
            const int lanes = d1 - d < LANES ? (int)(d1 - d) : LANES;
            const int64_t row = bk * a->dim + d;
            V *state = s->state + block * N;
            if (a->checkpoints)
                NAME(store_rows)(state, (T *)a->checkpoints + (row * chunks + chunk) * N, chunks * N, N, lanes);
            NAME(load_inputs)(t, a, b, k, d, len, lanes, 0);
            V skip = {0};
            if (a->D) NAME(load_rows)(&skip, (const T *)a->D + k * a->dim + d, 1, 1, lanes, 1);
            for (int i = 0; i < ROUND_UP(len); i++) t->y[i] = t->x[i] * skip;
            const V *rate = s->rate + block * N, *bvec = s->bvec + block * N, *cvec = s->cvec + block * N;
            const int within = t->longest * NAME(largest)(rate, N) < 126;
            for (int64_t n = 0; n < N; n++)
                if (b_const || c_const)
                    NAME(advance_any)(b_const, c_const, t, state + n, rate[n], s->brow + n * CHUNK, s->crow + n * CHUNK, bvec[n],
                                      cvec[n], len);
                else if (within) NAME(advance_within)(t, state + n, rate[n], s->brow + n * CHUNK, s->crow + n * CHUNK, len);
                else NAME(advance)(t, state + n, rate[n], s->brow + n * CHUNK, s->crow + n * CHUNK, len);
            if (a->z) {
                NAME(load_map)(t, t->gate, a->z, a->z_stride, b, k, d, len, lanes);
                NAME(silu_tile)(t->gate, t->gate, len);
                for (int i = 0; i < len; i++) t->y[i] *= t->gate[i];
            }
            NAME(store_map)(t, t->y, a->out, a->out_stride, b, k, d, len, lanes, a->merge && k);
        }
    }
    for (int64_t d = d0, block = 0; d < d1; d += LANES, block++)
        NAME(store_rows)(s->state + block * N, (T *)a->last_state + (bk * a->dim + d) * N, N, N,
                         d1 - d < LANES ? (int)(d1 - d) : LANES);
}

/* One state of a chunk: recomputes it from the checkpoint, then runs the adjoint recurrence backwards. Its sums for B and C
 * go to `db` and `dc`, over positions where they vary and to one vector where they are constant. */
INLINE void NAME(retreat_)(const int b_const, const int c_const, const int gated, NAME(tiles) *t, V start, V *carry, V rate,
                           V *drate, const T *brow, const T *crow, V bvec, V cvec, V *db, V *dc, int len) {
    V h = start, g = *carry, dr = *drate, bs = *db, cs = *dc;
    for (int i = 0; i < len; i += GROUP) {
        V decay[GROUP], in[GROUP];
        EACH decay[j] = t->step[i + j] * rate;
        DECAY(decay);
        EACH in[j] = b_const ? t->drive[i + j] * bvec : t->drive[i + j] * brow[i + j];
        EACH {
            h = FMA(decay[j], h, in[j]);
            t->decay[i + j] = decay[j];
            t->after[i + j] = h;
            if (gated) t->y[i + j] += c_const ? h * cvec : h * crow[i + j];
        }
    }
    for (int i = len - 1; i >= 0; i--) {
        const V dy = t->dy[i], after = t->after[i], before = i ? t->after[i - 1] : start;
        g += c_const ? dy * cvec : dy * crow[i];
        if (c_const) cs += dy * after;
        else dc[i] += dy * after;
        if (b_const) bs += g * t->drive[i];
        else db[i] += g * t->drive[i];
        t->ddrive[i] += b_const ? g * bvec : g * brow[i];
        g *= t->decay[i];
        const V slope = g * before;
        dr += slope * t->step[i];
        t->dstep[i] += slope * rate;
    }
    *carry = g, *drate = dr;
    if (b_const) *db = bs;
    if (c_const) *dc = cs;
}

#define RETREAT_ARGS NAME(tiles) *t, V start, V *carry, V rate, V *drate, const T *brow, const T *crow, V bvec, V cvec, V *db, \
    V *dc, int len
#define RETREAT_PASS t, start, carry, rate, drate, brow, crow, bvec, cvec, db, dc, len
APART void NAME(retreat_plain)(RETREAT_ARGS) { NAME(retreat_)(0, 0, 0, RETREAT_PASS); }
APART void NAME(retreat_gated)(RETREAT_ARGS) { NAME(retreat_)(0, 0, 1, RETREAT_PASS); }
APART void NAME(retreat_any)(int b_const, int c_const, int gated, RETREAT_ARGS) {
    NAME(retreat_)(b_const, c_const, gated, RETREAT_PASS);
}

INLINE void NAME(retreat)(int b_const, int c_const, int gated, RETREAT_ARGS) {
    if (b_const || c_const) NAME(retreat_any)(b_const, c_const, gated, RETREAT_PASS);
    else if (gated) NAME(retreat_gated)(RETREAT_PASS);
    else NAME(retreat_plain)(RETREAT_PASS);
}

/* One block of channels over one chunk. */
APART void NAME(backward_block)(const scan_args *a, NAME(scratch) *s, int64_t b, int64_t k, int64_t d, int64_t block,
                                int64_t chunk, int len, int lanes) {
    const int b_const = a->b_groups == 0, c_const = a->c_groups == 0, gated = a->z != NULL;
    const int64_t N = a->state, L = a->length, chunks = (L + CHUNK - 1) / CHUNK, row = (b * a->routes + k) * a->dim + d;
    NAME(tiles) *t = s->tiles;
    NAME(load_inputs)(t, a, b, k, d, len, lanes, 1);
    NAME(load_rows)(s->state, (const T *)a->checkpoints + (row * chunks + chunk) * N, chunks * N, N, lanes, 1);
    NAME(load_map)(t, t->dy, a->dout, a->dout_stride, b, k, d, len, lanes);
    V skip = {0};
    if (a->D) NAME(load_rows)(&skip, (const T *)a->D + k * a->dim + d, 1, 1, lanes, 1);
    if (gated) {
        NAME(load_map)(t, t->gate, a->z, a->z_stride, b, k, d, len, lanes);
        NAME(silu_tile)(t->gated, t->gate, len);
        for (int i = 0; i < len; i++) {
            t->dout[i] = t->dy[i];
            t->dy[i] *= t->gated[i];
        }
        for (int i = 0; i < ROUND_UP(len); i++) t->y[i] = t->x[i] * skip;
    }
    memset(t->dstep, 0, sizeof(V) * len);
    memset(t->ddrive, 0, sizeof(V) * len);
    for (int64_t n = 0, at = block * N; n < N; n++, at++)
        NAME(retreat)(b_const, c_const, gated, t, s->state[n], s->carry + at, s->rate[at], s->drate + at, s->brow + n * CHUNK,
                      s->crow + n * CHUNK, s->bvec[at], s->cvec[at], b_const ? s->db_sum + at : s->db + n * PITCH,
                      c_const ? s->dc_sum + at : s->dc + n * PITCH, len);
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
        NAME(silu_slope)(t->gated, t->gate, len);
        for (int i = 0; i < len; i++) t->y[i] *= t->dout[i] * t->gated[i];
        NAME(store_map)(t, t->y, a->dz, a->dz_stride, b, k, d, len, lanes, 0);
    }
    NAME(store_map)(t, t->dstep, a->ddelta, a->ddelta_stride, b, k, d, len, lanes, 0);
    NAME(store_map)(t, t->ddrive, a->du, a->du_stride, b, k, d, len, lanes, a->shared_u && k);
}

/* Writes the lane sums of a chunk of dB or dC (stride sn along its n states), or adds them. */
APART void NAME(store_matrix)(const V *sum, T *dst, int64_t n, int64_t sn, int64_t sl, NAME(place) at, int add) {
    int64_t state = 0;
#if BLOCK
    if (sn == 1)
        for (; state + BLOCK <= n; state += BLOCK)
            for (int i = 0; i < at.len; i++) {
                T sums[BLOCK], *to = dst + state + at.pixel[i] * sl;
                SUM_ROWS(sums, (const T *)(sum + state * PITCH + i), PITCH * LANES, LANES);
                for (int j = 0; j < BLOCK; j++) to[j] = add ? to[j] + sums[j] : sums[j];
            }
#endif
    for (int64_t j = state; j < n; j++) {
        T *row = dst + j * sn, sums[CHUNK];
        int first = 0;
#if BLOCK
        for (; first + BLOCK <= at.len; first += BLOCK)
            SUM_ROWS(sums + first, (const T *)(sum + j * PITCH + first), LANES, LANES);
#endif
        for (int i = first; i < at.len; i++) sums[i] = NAME(sum_lanes)(sum[j * PITCH + i]);
        if (add && at.run == 1 && sl == 1) for (int i = 0; i < at.len; i++) row[at.pixel[0] + i] += sums[i];
        else if (add) for (int i = 0; i < at.len; i++) row[at.pixel[i] * sl] += sums[i];
        else for (int i = 0; i < at.len; i++) row[at.pixel[i] * sl] = sums[i];
    }
}

/* The sums of a group to which a slab adds. Slabs take turns, so that none needs memory of its own, and add chunk by chunk in
 * the order of their numbers, so that results do not depend on threads. */
typedef struct {
    T *sum;
    const int64_t *stride, *before; /* before: what the slab before has added, NULL for the first */
} NAME(sums);

/* `share`: common groups in a group of the matrix. */
INLINE NAME(sums) NAME(sums_of)(void *even, void *odd, const int64_t *stride, const int64_t *done, int64_t b, int64_t k,
                                int64_t g, int64_t share, int64_t number) {
    T *sum = number % VISIONSSM_SUMS ? odd : even;
    return (NAME(sums)){sum + b * stride[0] + k * stride[1] + g / share * stride[2], stride,
                        number < VISIONSSM_SUMS ? NULL : done - VISIONSSM_SUMS};
}

INLINE void NAME(add_sums)(NAME(sums) to, const NAME(scratch) *s, const V *sum, int64_t n, int len) {
    if (to.before) wait_beyond(to.before, s->turn);
    NAME(store_matrix)(sum, to.sum, n, to.stride[3], to.stride[4], NAME(place_of)(s->tiles, len, 0), to.before != NULL);
}

APART void NAME(backward_slab)(const scan_args *a, NAME(scratch) *s, int64_t b, int64_t k, int64_t g, int64_t slab,
                               int64_t d0, int64_t d1) {
    const int b_const = a->b_groups == 0, c_const = a->c_groups == 0;
    const int64_t N = a->state, L = a->length, chunks = (L + CHUNK - 1) / CHUNK, bk = b * a->routes + k;
    const int64_t blocks = (d1 - d0 + LANES - 1) / LANES;
    NAME(tiles) *t = s->tiles;
    const T *B = a->B, *C = a->C;
    NAME(sums) dB = {0}, dC = {0};
    if (!b_const) {
        const int64_t share = a->groups / a->b_groups, number = g % share * a->slabs + slab;
        B += b * a->b_stride[0] + k * a->b_stride[1] + g / share * a->b_stride[2];
        dB = NAME(sums_of)(a->dB, a->dB_odd, a->db_stride, s->done, b, k, g, share, number);
    }
    if (!c_const) {
        const int64_t share = a->groups / a->c_groups, number = g % share * a->slabs + slab;
        C += b * a->c_stride[0] + k * a->c_stride[1] + g / share * a->c_stride[2];
        dC = NAME(sums_of)(a->dC, a->dC_odd, a->dc_stride, s->done, b, k, g, share, number);
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
        NAME(fill_pixels)(t, a, k, chunk * CHUNK, len);
        if (!b_const) NAME(load_matrix)(s->brow, CHUNK, B, N, a->b_stride[3], a->b_stride[4], NAME(place_of)(t, len, 0));
        if (!c_const) NAME(load_matrix)(s->crow, CHUNK, C, N, a->c_stride[3], a->c_stride[4], NAME(place_of)(t, len, 0));
        memset(s->db, 0, sizeof(V) * N * PITCH);
        memset(s->dc, 0, sizeof(V) * N * PITCH);
        for (int64_t d = d0, block = 0; d < d1; d += LANES, block++)
            NAME(backward_block)(a, s, b, k, d, block, chunk, len, d1 - d < LANES ? (int)(d1 - d) : LANES);
        if (!b_const) NAME(add_sums)(dB, s, s->db, N, len);
        if (!c_const) NAME(add_sums)(dC, s, s->dc, N, len);
        __atomic_store_n(s->done, ++s->turn, __ATOMIC_RELEASE);
    }
    for (int64_t d = d0, block = 0; d < d1; d += LANES, block++) {
        const int lanes = d1 - d < LANES ? (int)(d1 - d) : LANES;
        const int64_t row = bk * a->dim + d;
        NAME(store_rows)(s->drate + block * N, (T *)a->dA + row * N, N, N, lanes);
        if (b_const) NAME(store_rows)(s->db_sum + block * N, (T *)a->dB + row * N, N, N, lanes);
        if (c_const) NAME(store_rows)(s->dc_sum + block * N, (T *)a->dC + row * N, N, N, lanes);
        if (a->D) NAME(store_rows)(s->dskip + block, (T *)a->dD + row, 1, 1, lanes);
        if (a->delta_bias) NAME(store_rows)(s->dbias + block, (T *)a->ddelta_bias + row, 1, 1, lanes);
    }
}

/* What a task may take a copy of: its channels of a map, or the states of its group of B or C. */
typedef struct {
    const void **data;     /* in the arguments of the task, as are the strides */
    int64_t *stride, rank; /* (B, K, D, L) or (B, K, G, N, L) */
    int64_t group, first, count;
    int shared, result; /* the same for all routes; written */
    T *copy, *home;     /* home: where the part lies, NULL while there is no copy */
    int64_t home_stride;
} NAME(part);

/* Lists the parts in `a`, the arguments of a task, and returns how many there are. */
static int NAME(list_parts)(NAME(part) *parts, scan_args *a, int backward, int64_t g, int64_t d0, int64_t d1) {
    int n = 0;
#define PART(name, strides, ...) parts[n++] = (NAME(part)){(const void **)&a->name, a->strides, __VA_ARGS__, NULL, NULL, 0}
#define MAP(name, shared, result) PART(name, name##_stride, 4, 0, d0, d1 - d0, shared, result)
    MAP(u, a->shared_u != 0, 0);
    MAP(delta, 0, 0);
    MAP(z, 0, 0);
    if (backward) {
        MAP(dout, a->merge != 0, 0);
        MAP(du, a->shared_u != 0, 1);
        MAP(ddelta, 0, 1);
        MAP(dz, 0, 1);
    } else MAP(out, a->merge != 0, 1);
    if (BLOCK && a->state >= BLOCK) { /* without squares copies of these save nothing */
        if (a->b_groups) PART(B, b_stride, 5, g * a->b_groups / a->groups, 0, a->state, 0, 0);
        if (a->c_groups) PART(C, c_stride, 5, g * a->c_groups / a->groups, 0, a->state, 0, 0);
    }
#undef MAP
#undef PART
    return n;
}

/* Whether pixels are innermost, so that a route that does not follow memory would read number by number. */
static int NAME(is_planar)(const NAME(part) *p) {
    return *p->data && p->stride[p->rank - 2] != 1 && p->stride[p->rank - 1] == 1;
}

static size_t NAME(copy_size)(const NAME(part) *p, int64_t length) {
    return (sizeof(T) * p->count * length + 63) / 64 * 64;
}

/* Puts copies with channels innermost in the place of planar parts, either of those that all routes share or of the others;
 * returns the memory that is left. */
static char *NAME(lend)(NAME(part) *parts, int n, int shared, int64_t b, int64_t k, int64_t length, char *memory) {
    for (NAME(part) *p = parts; p < parts + n; p++) {
        if (p->shared != shared || !NAME(is_planar)(p)) continue;
        int64_t *inner = p->stride + p->rank - 2;
        p->home = (T *)*p->data + b * p->stride[0] + k * p->stride[1] + p->first * inner[0];
        if (p->rank == 5) p->home += p->group * p->stride[2];
        p->home_stride = inner[0];
        p->copy = (T *)memory;
        if (!p->result) NAME(turn)(p->copy, p->count, p->home, p->home_stride, p->count, length);
        *p->data = p->copy - p->first; /* channels keep their numbers */
        memset(p->stride, 0, sizeof(int64_t) * p->rank);
        inner[0] = 1;
        inner[1] = p->count;
        memory += NAME(copy_size)(p, length);
    }
    return memory;
}

/* Ends what `lend` began: writes results to where they belong. */
static void NAME(give_back)(NAME(part) *parts, int n, int shared, int64_t length) {
    for (NAME(part) *p = parts; p < parts + n; p++) {
        if (p->shared != shared || !p->home) continue;
        if (p->result) NAME(turn)(p->home, p->home_stride, p->copy, p->count, length, p->count);
        p->home = NULL;
    }
}

/* Whether a route follows memory, forwards or backwards. */
static int NAME(follows_memory)(const scan_args *a, int64_t k) {
    if (!a->index || a->length == 1) return 1;
    const int32_t *pixel = a->index + k * a->length, step = pixel[1] - pixel[0];
    int64_t l = 1;
    if (step == 1 || step == -1)
        while (l < a->length && pixel[l] - pixel[l - 1] == step) l++;
    return l == a->length;
}

/* Bytes of the copies that a task takes at once; 0 where all routes follow memory and read squares of the maps as they lie. */
static size_t NAME(lent_size)(const scan_args *a, int backward) {
    scan_args own = *a;
    NAME(part) parts[MAX_PARTS];
    size_t size = 0;
    for (int n = NAME(list_parts)(parts, &own, backward, 0, 0, a->slab); n > 0; n--)
        if (NAME(is_planar)(parts + n - 1)) size += NAME(copy_size)(parts + n - 1, a->length);
    for (int64_t k = 0; k < a->routes; k++)
        if (!NAME(follows_memory)(a, k)) return size;
    return 0;
}

/* One task: a slab of channels of one batch element; `k` < 0 runs all routes in order. */
TARGET static void NAME(task)(const scan_args *a, NAME(scratch) *s, int backward, int64_t b, int64_t k, int64_t g, int64_t slab) {
    const int64_t width = a->dim / a->groups, d0 = g * width + slab * a->slab;
    const int64_t d1 = d0 + a->slab < (g + 1) * width ? d0 + a->slab : (g + 1) * width;
    const int64_t first = k < 0 ? 0 : k, last = k < 0 ? a->routes : k + 1;
    scan_args own = *a;
    NAME(part) parts[MAX_PARTS];
    const int n = s->lent ? NAME(list_parts)(parts, &own, backward, g, d0, d1) : 0;
    char *memory = NAME(lend)(parts, n, 1, b, 0, a->length, s->lent);
    const scan_args each = own;
    for (k = first; k < last; k++) {
        if (n && !NAME(follows_memory)(a, k)) NAME(lend)(parts, n, 0, b, k, a->length, memory);
        if (backward) NAME(backward_slab)(&own, s, b, k, g, slab, d0, d1);
        else NAME(forward_slab)(&own, s, b, k, g, d0, d1);
        NAME(give_back)(parts, n, 0, a->length);
        own = each;
    }
    NAME(give_back)(parts, n, 1, a->length);
}

/* Lays the scratch of a thread out in one block of memory; returns its size, and fills `s` if `base` is given. */
static size_t NAME(layout)(const scan_args *a, size_t lent, NAME(scratch) *s, char *base) {
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
    CARVE(lent, char, lent);
#undef CARVE
    if (base && !lent) s->lent = NULL;
    return (size_t)(p - base);
}

/* Runs all tasks on the given number of threads; returns 0, or 1 if memory ran out. Tasks share no output but the sums for
 * B and C, to which they add in a fixed order, and their cut depends on shapes alone, so results do not depend on the number of
 * threads. Those who wait for others never wait for long or for good: these were handed out before them. */
static int NAME(run)(const scan_args *a, int backward) {
    /* routes that add into one map run one after the other */
    const int64_t parallel_routes = (backward ? a->shared_u : a->merge) ? 1 : a->routes;
    const int64_t tasks = a->batch * parallel_routes * a->groups * a->slabs;
    const size_t lent = NAME(lent_size)(a, backward), size = NAME(layout)(a, lent, NULL, NULL);
    int64_t next = 0, *done = calloc(tasks, sizeof(int64_t));
    if (!done) return 1;
    /* a shared counter instead of `omp for`: no barrier but the last, and a thread without memory just takes no task */
#pragma omp parallel num_threads(team(a->threads, tasks))
    {
        char *memory = THREAD < tasks ? malloc(size + 64) : NULL;
        if (memory) {
            NAME(scratch) s;
            NAME(layout)(a, lent, &s, (char *)(((uintptr_t)memory + 63) / 64 * 64));
            const unsigned mode = flush_denormals();
            for (;;) {
                int64_t task;
#pragma omp atomic capture
                task = next++;
                if (task >= tasks) break;
                const int64_t slab = task % a->slabs, g = task / a->slabs % a->groups, bk = task / a->slabs / a->groups;
                const int64_t k = parallel_routes == a->routes ? bk % parallel_routes : -1;
                s.done = done + task, s.turn = 0;
                NAME(task)(a, &s, backward, bk / parallel_routes, k, g, slab);
            }
            restore_denormals(mode);
        }
        free(memory);
    }
    free(done);
    return next < tasks;
}

#undef RETREAT_ARGS
#undef RETREAT_PASS
#undef CHUNK
#undef PITCH
#undef MAX_PARTS
