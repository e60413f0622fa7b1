/* Vectors of lanes and what the scans do with them, for one scalar type and one instruction set; see instances.h.
 *
 * Needs: T, TI (integer of its size), LANES (64 bytes of T), IS_FLOAT, TARGET (function attribute), NAME(x) (a distinct
 * name for x), and CLAMP for floats. Lanes are channels; a tile is a row of vectors, one a pixel.
 */
#undef INLINE
#undef APART
#undef V
#undef VI
#undef SELECT
#undef RATE_SCALE
#undef RATE_UNSCALE
#undef EXP
#undef DECAY
#define INLINE TARGET static inline __attribute__((always_inline))
#define APART TARGET static __attribute__((noinline, unused))
#define V NAME(vec)
#define VI NAME(ivec)
#define SELECT(mask, yes, no) ((V)(((VI)(mask) & (VI)(yes)) | (~(VI)(mask) & (VI)(no))))

typedef T V __attribute__((vector_size(64)));
typedef TI VI __attribute__((vector_size(64)));

#if IS_FLOAT
/* 2^x, relative error 1.2e-7: 0 becomes 2^-126 below -126, infinity from 128 on; NaN stays NaN. */
INLINE V NAME(exp2)(V x) {
    const V magic = (V){0} + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer kept in the low bits */
    CLAMP(x, -126.0f, 128.0f);
    V shifted = x + magic;
    V r = x - (shifted - magic);
    V p = (V){0} + 1.53533620e-4f;
    p = p * r + 1.33988750e-3f;
    p = p * r + 9.61843692e-3f;
    p = p * r + 5.55033237e-2f;
    p = p * r + 2.40226477e-1f;
    p = p * r + 6.93147182e-1f;
    p = p * r + 1.0f;
    return (V)((VI)p + ((VI)shifted << 23));
}
#define RATE_SCALE 1.44269504088896340736f /* rates are stored times log2(e), so that the decay is a power of two */
#define RATE_UNSCALE 0.69314718055994530942f
#define EXP(x) NAME(exp2)((x) * RATE_SCALE)
#define DECAY(x) NAME(exp2)(x)
#else
INLINE V NAME(exp)(V x) {
    for (int i = 0; i < LANES; i++) x[i] = exp(x[i]);
    return x;
}
#define RATE_SCALE 1.0
#define RATE_UNSCALE 1.0
#define EXP(x) NAME(exp)(x)
#define DECAY(x) NAME(exp)(x)
#endif

/* log(1 + t) for 0 <= t <= 1, as 2 atanh(t / (2 + t)) */
INLINE V NAME(log1p)(V t) {
#if IS_FLOAT
    V s = t / (t + 2.0f), q = s * s;
    V p = (V){0} + 2.0f / 15;
    p = p * q + 2.0f / 13;
    p = p * q + 2.0f / 11;
    p = p * q + 2.0f / 9;
    p = p * q + 2.0f / 7;
    p = p * q + 2.0f / 5;
    p = p * q + 2.0f / 3;
    p = p * q + 2.0f;
    return p * s;
#else
    for (int i = 0; i < LANES; i++) t[i] = log1p(t[i]);
    return t;
#endif
}

/* softplus as PyTorch defines it: the identity beyond the threshold 20 */
INLINE V NAME(softplus)(V x) {
    V magnitude = SELECT(x < 0, -x, x);
    V soft = SELECT(x > 0, x, (V){0}) + NAME(log1p)(EXP(-magnitude));
    return SELECT(x > 20, x, soft);
}

INLINE V NAME(sigmoid)(V x) { return 1 / (1 + EXP(-x)); }

/* Reads lanes of channels (stride sd) at given pixels (stride sl) into a tile; missing lanes become 0. */
APART void NAME(load_tile)(V *tile, const T *src, int64_t sd, int64_t sl, const int64_t *pixel, int len, int lanes) {
    if (lanes == LANES && sd == 1) {
        for (int i = 0; i < len; i++) memcpy(&tile[i], src + pixel[i] * sl, sizeof(V));
        return;
    }
    if (lanes < LANES) memset(tile, 0, sizeof(V) * len);
    for (int c = 0; c < lanes; c++) {
        const T *row = src + c * sd;
        T *dst = (T *)tile + c;
        for (int i = 0; i < len; i++) dst[i * LANES] = row[pixel[i] * sl];
    }
}

/* Writes a tile into rows (stride length) at given pixels, or adds it. */
APART void NAME(store_tile)(const V *tile, T *dst, int64_t length, const int64_t *pixel, int len, int lanes, int add) {
    for (int c = 0; c < lanes; c++) {
        T *row = dst + c * length;
        const T *src = (const T *)tile + c;
        if (add) for (int i = 0; i < len; i++) row[pixel[i]] += src[i * LANES];
        else for (int i = 0; i < len; i++) row[pixel[i]] = src[i * LANES];
    }
}

/* Reads a matrix (lanes, N) of rows of N into vectors; missing lanes become 0. */
APART void NAME(load_rows)(V *dst, const T *src, int64_t row, int64_t n, int lanes, T scale) {
    memset(dst, 0, sizeof(V) * n);
    for (int c = 0; c < lanes; c++)
        for (int64_t j = 0; j < n; j++) ((T *)&dst[j])[c] = src[c * row + j] * scale;
}

APART void NAME(store_rows)(const V *src, T *dst, int64_t row, int64_t n, int lanes, T scale) {
    for (int c = 0; c < lanes; c++)
        for (int64_t j = 0; j < n; j++) dst[c * row + j] = ((const T *)&src[j])[c] * scale;
}

/* Reads a matrix B or C at given pixels: n rows of `pitch`. */
APART void NAME(load_matrix)(T *dst, const T *src, int64_t sn, int64_t sl, const int64_t *pixel, int len, int64_t n,
                              int64_t pitch) {
    for (int64_t j = 0; j < n; j++)
        for (int i = 0; i < len; i++) dst[j * pitch + i] = src[j * sn + pixel[i] * sl];
}

INLINE T NAME(sum_lanes)(V v) {
    T s[LANES];
    memcpy(s, &v, sizeof(V));
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}
