/* Vectors of lanes and what the scans do with them, for one scalar type and one instruction set; see instances.h.
 *
 * Needs: T, TI (integer of its size), LANES (T in a register), IS_FLOAT, TARGET (function attribute), NAME(x) (a distinct
 * name for x), FMA(a, b, c), a * b + c rounded once where the processor can, and for floats CLAMP, SPLAT(x), and
 * HOLD(x), a SPLAT that is read into a register once instead of by every operation that uses it. BLOCK (0 for none): side
 * of the squares that TRANSPOSE(dst, dst_stride, src, src_stride) turns over, and rows of LANES that SUM_ROWS(dst, src,
 * src_stride, LANES) adds up, each in the order of NAME(sum_lanes). Lanes are channels; a tile is a row of
 * vectors, one a pixel.
 */
#undef INLINE
#undef APART
#undef V
#undef VI
#undef SELECT
#undef RATE_SCALE
#undef RATE_UNSCALE
#undef GROUP
#undef EACH
#undef ROUND_UP
#undef DECAY
#undef DECAY_WITHIN
#undef SQUARE_MAP
#undef SQUARE_TILE
#define INLINE TARGET static inline __attribute__((always_inline))
#define APART TARGET static __attribute__((noinline, unused))
#define V NAME(vec)
#define VI NAME(ivec)
#define SELECT(mask, yes, no) ((V)(((VI)(mask) & (VI)(yes)) | (~(VI)(mask) & (VI)(no))))

typedef T V __attribute__((vector_size(LANES * sizeof(T))));
typedef TI VI __attribute__((vector_size(LANES * sizeof(T))));

/* Functions work on a group of vectors stage by stage: each is a long chain of operations that wait for each other, and few
 * chains fit side by side into the queues of a processor unless their operations alternate in the program. */
#define GROUP 4
#define EACH for (int j = 0; j < GROUP; j++)
#define ROUND_UP(n) (((n) + GROUP - 1) / GROUP * GROUP)

#if IS_FLOAT
/* 2^x, relative error 2e-7: 0 becomes 2^-126 below -126, infinity from 128 on; NaN stays NaN. `within` promises that no x
 * lies beyond 126, which saves two operations of fourteen. */
INLINE void NAME(exp2)(V *x, const int within) {
    const V magic = HOLD(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer kept in the low bits */
    V shifted[GROUP], r[GROUP], p[GROUP], c;
    if (!within) EACH CLAMP(x[j], -126.0f, 128.0f);
    EACH shifted[j] = x[j] + magic;
    EACH r[j] = shifted[j] - magic;
    EACH r[j] = x[j] - r[j];
    c = HOLD(9.67151e-3f);
    EACH p[j] = FMA(SPLAT(1.32647e-3f), r[j], c);
    c = HOLD(5.550734e-2f);
    EACH p[j] = FMA(p[j], r[j], c);
    c = HOLD(2.4022242e-1f);
    EACH p[j] = FMA(p[j], r[j], c);
    c = HOLD(6.9314698e-1f);
    EACH p[j] = FMA(p[j], r[j], c);
    c = HOLD(1.0f);
    EACH p[j] = FMA(p[j], r[j], c);
    EACH x[j] = (V)((VI)p[j] + ((VI)shifted[j] << 23));
}
#define RATE_SCALE 1.44269504088896340736f /* rates are stored times log2(e), so that the decay is a power of two */
#define RATE_UNSCALE 0.69314718055994530942f
#define DECAY(x) NAME(exp2)(x, 0)
#define DECAY_WITHIN(x, within) NAME(exp2)(x, within)
#else
INLINE void NAME(exp)(V *x) {
    EACH for (int i = 0; i < LANES; i++) x[j][i] = exp(x[j][i]);
}
#define RATE_SCALE 1.0
#define RATE_UNSCALE 1.0
#define DECAY(x) NAME(exp)(x)
#define DECAY_WITHIN(x, within) ((void)(within), NAME(exp)(x))
#endif

/* x becomes exp(x) */
INLINE void NAME(natural_exp)(V *x) {
    EACH x[j] *= RATE_SCALE;
    DECAY(x);
}

/* log(1 + t) for 0 <= t <= 1, as 2 atanh(s) with s = t / (2 + t): s times a polynomial in s^2, relative error 4e-9 */
INLINE void NAME(log1p)(V *t) {
#if IS_FLOAT
    V q[GROUP], p[GROUP];
    EACH t[j] = t[j] / (t[j] + 2.0f);
    EACH q[j] = t[j] * t[j];
    EACH p[j] = FMA(SPLAT(0.281577783f), q[j], SPLAT(0.279651577f));
    EACH p[j] = FMA(p[j], q[j], SPLAT(0.400245952f));
    EACH p[j] = FMA(p[j], q[j], SPLAT(0.666663216f));
    EACH p[j] = FMA(p[j], q[j], SPLAT(2.0f));
    EACH t[j] *= p[j];
#else
    EACH for (int i = 0; i < LANES; i++) t[j][i] = log1p(t[j][i]);
#endif
}

/* softplus as PyTorch defines it: the identity beyond the threshold 20 */
INLINE void NAME(softplus)(V *x) {
    V soft[GROUP];
    EACH soft[j] = SELECT(x[j] > 0, -x[j], x[j]);
    NAME(natural_exp)(soft);
    NAME(log1p)(soft);
    EACH soft[j] += SELECT(x[j] > 0, x[j], (V){0});
    EACH x[j] = SELECT(x[j] > 20, x[j], soft[j]);
}

INLINE void NAME(sigmoid)(V *x) {
    EACH x[j] = -x[j];
    NAME(natural_exp)(x);
    EACH x[j] = 1 / (1 + x[j]);
}

/* x becomes x sigmoid(x) */
INLINE void NAME(silu)(V *x) {
    V gate[GROUP];
    EACH gate[j] = x[j];
    NAME(sigmoid)(gate);
    EACH x[j] *= gate[j];
}

/* Where a tile lies in a map: its channels (stride sd) at given pixels (stride sl). `run` is the distance between pixels
 * that follow each other, 0 if it varies. */
typedef struct {
    const int64_t *pixel;
    int64_t run;
    int len, lanes;
} NAME(place);

#if BLOCK
/* First number of the square of channels from c on and pixels i to i + BLOCK - 1, and the square in the tile. */
#define SQUARE_MAP(map) ((map) + c * sd + at.pixel[at.run > 0 ? i : i + BLOCK - 1])
#define SQUARE_TILE(tile) ((T *)((tile) + (at.run > 0 ? i : i + BLOCK - 1)) + c)
#endif

/* Reads a tile; missing lanes become 0. */
APART void NAME(load_tile)(V *tile, const T *src, int64_t sd, int64_t sl, NAME(place) at) {
    int first = 0;
    if (at.lanes == LANES && sd == 1) {
        for (int i = 0; i < at.len; i++) memcpy(&tile[i], src + at.pixel[i] * sl, sizeof(V));
        return;
    }
    if (at.lanes < LANES) memset(tile, 0, sizeof(V) * at.len);
#if BLOCK
    if ((at.run == 1 || at.run == -1) && sl == 1 && at.lanes == LANES)
        for (int i = 0; i + BLOCK <= at.len; i += BLOCK, first = i)
            for (int c = 0; c < LANES; c += BLOCK) TRANSPOSE(SQUARE_TILE(tile), at.run * LANES, SQUARE_MAP(src), sd);
#endif
    for (int c = 0; c < at.lanes; c++) {
        const T *row = src + c * sd;
        T *dst = (T *)tile + c;
        for (int i = first; i < at.len; i++) dst[i * LANES] = row[at.pixel[i] * sl];
    }
}

/* Writes a tile, or adds it. */
APART void NAME(store_tile)(const V *tile, T *dst, int64_t sd, int64_t sl, NAME(place) at, int add) {
    int first = 0;
    if (at.lanes == LANES && sd == 1) {
        for (int i = 0; i < at.len; i++) {
            V sum = {0};
            if (add) memcpy(&sum, dst + at.pixel[i] * sl, sizeof(V));
            sum += tile[i];
            memcpy(dst + at.pixel[i] * sl, &sum, sizeof(V));
        }
        return;
    }
#if BLOCK
    if ((at.run == 1 || at.run == -1) && sl == 1 && at.lanes == LANES)
        for (int i = 0; i + BLOCK <= at.len; i += BLOCK, first = i)
            for (int c = 0; c < LANES; c += BLOCK) {
                T square[BLOCK * BLOCK], *to = SQUARE_MAP(dst);
                if (!add) {
                    TRANSPOSE(to, sd, SQUARE_TILE(tile), at.run * LANES);
                    continue;
                }
                TRANSPOSE(square, BLOCK, SQUARE_TILE(tile), at.run * LANES);
                for (int k = 0; k < BLOCK; k++)
                    for (int j = 0; j < BLOCK; j++) to[k * sd + j] += square[k * BLOCK + j];
            }
#endif
    for (int c = 0; c < at.lanes; c++) {
        T *row = dst + c * sd;
        const T *src = (const T *)tile + c;
        if (add) for (int i = first; i < at.len; i++) row[at.pixel[i] * sl] += src[i * LANES];
        else for (int i = first; i < at.len; i++) row[at.pixel[i] * sl] = src[i * LANES];
    }
}

/* Turns a matrix over: column j of `src` becomes row j of `dst`. */
APART void NAME(turn)(T *dst, int64_t dst_row, const T *src, int64_t src_row, int64_t rows, int64_t columns) {
    int64_t row = 0, column = 0;
#if BLOCK
    row = rows / BLOCK * BLOCK, column = columns / BLOCK * BLOCK;
    for (int64_t i = 0; i < row; i += BLOCK)
        for (int64_t j = 0; j < column; j += BLOCK) TRANSPOSE(dst + j * dst_row + i, dst_row, src + i * src_row + j, src_row);
#endif
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < row ? column : 0; j < columns; j++) dst[j * dst_row + i] = src[i * src_row + j];
}

/* Reads a matrix (lanes, N) of rows of N into vectors; missing lanes become 0. */
APART void NAME(load_rows)(V *dst, const T *src, int64_t row, int64_t n, int lanes, T scale) {
    int64_t first = 0;
    if (lanes < LANES) memset(dst, 0, sizeof(V) * n);
#if BLOCK
    if (lanes == LANES)
        for (; first + BLOCK <= n; first += BLOCK) {
            for (int c = 0; c < LANES; c += BLOCK) TRANSPOSE((T *)(dst + first) + c, LANES, src + c * row + first, row);
            for (int j = 0; j < BLOCK; j++) dst[first + j] *= scale;
        }
#endif
    for (int c = 0; c < lanes; c++)
        for (int64_t j = first; j < n; j++) ((T *)&dst[j])[c] = src[c * row + j] * scale;
}

APART void NAME(store_rows)(const V *src, T *dst, int64_t row, int64_t n, int lanes) {
    int64_t first = 0;
#if BLOCK
    if (lanes == LANES)
        for (; first + BLOCK <= n; first += BLOCK)
            for (int c = 0; c < LANES; c += BLOCK) TRANSPOSE(dst + c * row + first, row, (const T *)(src + first) + c, LANES);
#endif
    for (int c = 0; c < lanes; c++)
        for (int64_t j = first; j < n; j++) dst[c * row + j] = ((const T *)&src[j])[c];
}

/* Reads a matrix B or C (stride sn along its n states) at given pixels: n rows of `pitch`, with zeros up to a group. */
APART void NAME(load_matrix)(T *dst, int64_t pitch, const T *src, int64_t n, int64_t sn, int64_t sl, NAME(place) at) {
    int64_t state = 0;
#if BLOCK
    if (sn == 1) {
        const int whole = at.len / BLOCK * BLOCK;
        for (; state + BLOCK <= n; state += BLOCK) {
            for (int i = 0; i < whole; i += BLOCK) {
                if (at.run) {
                    TRANSPOSE(dst + state * pitch + i, pitch, src + state + at.pixel[i] * sl, at.run * sl);
                    continue;
                }
                T square[BLOCK * BLOCK];
                for (int j = 0; j < BLOCK; j++)
                    memcpy(square + j * BLOCK, src + state + at.pixel[i + j] * sl, sizeof(T) * BLOCK);
                TRANSPOSE(dst + state * pitch + i, pitch, square, BLOCK);
            }
            for (int64_t j = state; j < state + BLOCK; j++)
                for (int i = whole; i < at.len; i++) dst[j * pitch + i] = src[j + at.pixel[i] * sl];
        }
    }
#endif
    for (int64_t j = state; j < n; j++) {
        if (at.run == 1 && sl == 1) memcpy(dst + j * pitch, src + j * sn + at.pixel[0], sizeof(T) * at.len);
        else for (int i = 0; i < at.len; i++) dst[j * pitch + i] = src[j * sn + at.pixel[i] * sl];
    }
    for (int64_t j = 0; j < n; j++)
        for (int i = at.len; i < ROUND_UP(at.len); i++) dst[j * pitch + i] = 0;
}

/* Largest magnitude among the lanes of vectors; NaN counts as nothing. */
APART T NAME(largest)(const V *v, int64_t n) {
    V most = {0};
    T lane[LANES], all = 0;
    for (int64_t i = 0; i < n; i++) {
        V magnitude = SELECT(v[i] < 0, -v[i], v[i]);
        most = SELECT(magnitude > most, magnitude, most);
    }
    memcpy(lane, &most, sizeof(V));
    for (int i = 0; i < LANES; i++) all = lane[i] > all ? lane[i] : all;
    return all;
}

INLINE T NAME(sum_lanes)(V v) {
    T s[LANES];
    memcpy(s, &v, sizeof(V));
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}
