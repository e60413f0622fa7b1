/* The convolutions for one scalar type and one instruction set; instances.h includes this file once for each pair.
 *
 * Lanes are channels. A block of channels of some rows is copied into a padded slab, where every tap of every filter is a
 * fixed distance and the vectors of a row lie side by side: in the map they are a power of two apart, so that few of them
 * fit into a cache at once.
 */
#undef LINE
#undef CHANNELS
#undef PIXEL
#define LINE (64 / (int)sizeof(V)) /* vectors of a cache line */
#define CHANNELS (LINE * LANES)
#define PIXEL NAME(pixel)

typedef struct {
    V v[LINE];
} PIXEL;

typedef struct {
    V *taps, *dtaps; /* all those of the first vector, then all of the next */
    PIXEL *x, *dout, *dx;
    int64_t *offset; /* of every tap, in pixels of a slab */
} NAME(room);

/* Distance of a tap of a filter from its middle, along one axis. */
INLINE int64_t NAME(distance)(const dilated_args *a, int64_t filter, int64_t tap) {
    return (tap - a->side / 2) * ((const int64_t *)a->dilations)[filter];
}

INLINE int64_t NAME(inside)(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

/* Copies rows of a block of channels with `radius` pixels around them: the nearest ones of the map, or zeros. */
INLINE void NAME(pad_rows)(const dilated_args *a, PIXEL *slab, const T *src, const int64_t *stride, int64_t first, int64_t rows,
                           int repeat, int lanes) {
    const int64_t R = a->radius, W = a->width, pitch = W + 2 * R;
    for (int64_t i = first - R; i < first + rows + R; i++, slab += pitch) {
        if (!repeat && (i < 0 || i >= a->height)) {
            memset(slab, 0, sizeof(PIXEL) * pitch);
            continue;
        }
        const T *row = src + NAME(inside)(i, a->height) * stride[2];
        for (int64_t j = 0; j < W; j++) {
            PIXEL x = {{{0}}};
            memcpy(&x, row + j * stride[3], sizeof(T) * lanes);
            slab[R + j] = x;
        }
        for (int64_t j = 0; j < R; j++) {
            slab[j] = repeat ? slab[R] : (PIXEL){{{0}}};
            slab[R + W + j] = repeat ? slab[R + W - 1] : (PIXEL){{{0}}};
        }
    }
}

/* Sums of all taps at GROUP pixels that follow each other, or at those before, with a sign of -1. */
INLINE void NAME(filter)(PIXEL *sum, const PIXEL *in, const NAME(room) *at, int64_t taps, int sign) {
    for (int k = 0; k < LINE; k++) {
        V part[GROUP] = {{0}};
        for (int64_t t = 0; t < taps; t++) {
            const V tap = at->taps[k * taps + t];
            const PIXEL *from = in + sign * at->offset[t];
            EACH part[j] = FMA(tap, from[j].v[k], part[j]);
        }
        EACH sum[j].v[k] = part[j];
    }
}

TARGET static void NAME(load_taps)(const dilated_args *a, const NAME(room) *at, int64_t d, int lanes) {
    const int64_t S = a->side, area = S * S, taps = a->filters * area;
    for (int64_t m = 0; m < a->filters; m++) {
        const T *weight = (const T *)a->weight + (m * a->dim + d) * area;
        for (int k = 0; k < LINE; k++, lanes -= LANES, weight += LANES * area) {
            const int some = lanes < 0 ? 0 : lanes < LANES ? lanes : LANES;
            NAME(load_rows)(at->taps + k * taps + m * area, weight, area, area, some, 1);
        }
        lanes += CHANNELS;
        for (int64_t t = 0; t < area; t++)
            at->offset[m * area + t] = NAME(distance)(a, m, t / S) * (a->width + 2 * a->radius) + NAME(distance)(a, m, t % S);
    }
}

TARGET static void NAME(store_taps)(const dilated_args *a, const NAME(room) *at, int64_t d, int lanes) {
    const int64_t area = a->side * a->side, taps = a->filters * area;
    for (int64_t m = 0; m < a->filters; m++)
        for (int k = 0; k * LANES < lanes; k++)
            NAME(store_rows)(at->dtaps + k * taps + m * area, (T *)a->dweight + (m * a->dim + d + k * LANES) * area, area, area,
                             lanes - k * LANES < LANES ? lanes - k * LANES : LANES);
}

INLINE void NAME(forward_rows)(const dilated_args *a, const NAME(room) *at, int64_t b, int64_t d, int64_t first, int64_t rows,
                               int lanes) {
    const int64_t R = a->radius, W = a->width, pitch = W + 2 * R, taps = a->filters * a->side * a->side;
    NAME(pad_rows)(a, at->x, (const T *)a->x + b * a->x_stride[0] + d, a->x_stride, first, rows, 1, lanes);
    for (int64_t i = 0; i < rows; i++) {
        const PIXEL *row = at->x + (R + i) * pitch + R;
        T *out = (T *)a->out + b * a->out_stride[0] + d + (first + i) * a->out_stride[2];
        for (int64_t j0 = 0; j0 < W; j0 += GROUP) {
            PIXEL sum[GROUP];
            NAME(filter)(sum, row + j0, at, taps, 1);
            for (int j = 0; j < GROUP && j0 + j < W; j++)
                memcpy(out + (j0 + j) * a->out_stride[3], &sum[j], sizeof(T) * lanes);
        }
    }
}

/* Gradients of the pixels as far as taps inside the map read them. */
INLINE void NAME(gather)(const dilated_args *a, const NAME(room) *at) {
    const int64_t R = a->radius, W = a->width, pitch = W + 2 * R, taps = a->filters * a->side * a->side;
    for (int64_t i = 0; i < a->height; i++)
        for (int64_t j0 = 0; j0 < W; j0 += GROUP) {
            PIXEL sum[GROUP];
            NAME(filter)(sum, at->dout + (R + i) * pitch + R + j0, at, taps, -1);
            for (int j = 0; j < GROUP && j0 + j < W; j++) at->dx[i * W + j0 + j] = sum[j];
        }
}

INLINE void NAME(add_tap)(PIXEL *dx, const PIXEL *dout, const NAME(room) *at, int64_t taps, int64_t t) {
    for (int k = 0; k < LINE; k++) dx->v[k] = FMA(at->taps[k * taps + t], dout->v[k], dx->v[k]);
}

/* Adds what taps outside the map read from its edge. */
TARGET static void NAME(scatter_edges)(const dilated_args *a, const NAME(room) *at) {
    const int64_t R = a->radius, H = a->height, W = a->width, S = a->side, taps = a->filters * S * S;
    for (int64_t t = 0; t < taps; t++) {
        const int64_t down = NAME(distance)(a, t / (S * S), t / S % S), right = NAME(distance)(a, t / (S * S), t % S);
        for (int64_t i = 0; i < H; i++) {
            const PIXEL *dout = at->dout + (R + i) * (W + 2 * R) + R;
            PIXEL *row = at->dx + NAME(inside)(i + down, H) * W;
            const int beyond = i + down < 0 || i + down >= H;
            const int64_t left = beyond ? W : -right < W ? -right : W, last = right < W ? W - right : 0;
            for (int64_t j = 0; j < left; j++) NAME(add_tap)(row + NAME(inside)(j + right, W), dout + j, at, taps, t);
            if (!beyond)
                for (int64_t j = last; j < W; j++) NAME(add_tap)(row + W - 1, dout + j, at, taps, t);
        }
    }
}

INLINE void NAME(add_products)(const NAME(room) *at, const PIXEL *x, const PIXEL *dout, int64_t taps, int many) {
    for (int k = 0; k < LINE; k++)
        for (int64_t t = 0; t < taps; t++) {
            V sum = at->dtaps[k * taps + t];
            for (int j = 0; j < many; j++) sum = FMA(dout[j].v[k], x[at->offset[t] + j].v[k], sum);
            at->dtaps[k * taps + t] = sum;
        }
}

INLINE void NAME(backward_map)(const dilated_args *a, const NAME(room) *at, int64_t b, int64_t d, int lanes) {
    const int64_t R = a->radius, H = a->height, W = a->width, taps = a->filters * a->side * a->side;
    NAME(pad_rows)(a, at->x, (const T *)a->x + b * a->x_stride[0] + d, a->x_stride, 0, H, 1, lanes);
    NAME(pad_rows)(a, at->dout, (const T *)a->dout + b * a->dout_stride[0] + d, a->dout_stride, 0, H, 0, lanes);
    for (int64_t i = 0; i < H; i++) {
        const int64_t row = (R + i) * (W + 2 * R) + R;
        int64_t j = 0;
        for (; j + GROUP <= W; j += GROUP) NAME(add_products)(at, at->x + row + j, at->dout + row + j, taps, GROUP);
        if (j < W) NAME(add_products)(at, at->x + row + j, at->dout + row + j, taps, (int)(W - j));
    }
    NAME(gather)(a, at);
    NAME(scatter_edges)(a, at);
    for (int64_t i = 0; i < H; i++) {
        T *dx = (T *)a->dx + b * a->dx_stride[0] + d + i * a->dx_stride[2];
        for (int64_t j = 0; j < W; j++) memcpy(dx + j * a->dx_stride[3], &at->dx[i * W + j], sizeof(T) * lanes);
    }
}

/* All batch elements of a block of channels, in order: gradients do not depend on the number of threads. */
TARGET static void NAME(backward_block)(const dilated_args *a, const NAME(room) *at, int64_t d, int lanes) {
    memset(at->dtaps, 0, sizeof(V) * LINE * a->filters * a->side * a->side);
    for (int64_t b = 0; b < a->batch; b++) {
        if (lanes == CHANNELS) NAME(backward_map)(a, at, b, d, CHANNELS);
        else NAME(backward_map)(a, at, b, d, lanes);
    }
    NAME(store_taps)(a, at, d, lanes);
}

TARGET static void NAME(forward_slab)(const dilated_args *a, const NAME(room) *at, int64_t b, int64_t d, int64_t first,
                                      int64_t rows, int lanes) {
    if (lanes == CHANNELS) NAME(forward_rows)(a, at, b, d, first, rows, CHANNELS);
    else NAME(forward_rows)(a, at, b, d, first, rows, lanes);
}

/* Rows of a slab: what fits into a cache, but no fewer than the rows around it. */
static int64_t NAME(slab_rows)(const dilated_args *a) {
    const int64_t R = a->radius, fit = CACHED / (int64_t)sizeof(PIXEL) / (a->width + 2 * R) - 2 * R;
    const int64_t least = 2 * R > 8 ? 2 * R : 8, rows = fit > least ? fit : least, slabs = (a->height + rows - 1) / rows;
    return (a->height + slabs - 1) / slabs;
}

/* Pixels of a padded slab; groups may end behind it. */
static int64_t NAME(slab_size)(const dilated_args *a, int64_t rows) {
    return (rows + 2 * a->radius) * (a->width + 2 * a->radius) + GROUP;
}

static size_t NAME(room_size)(const dilated_args *a, int64_t rows, int backward) {
    const int64_t taps = a->filters * a->side * a->side, slab = NAME(slab_size)(a, rows);
    const int64_t pixels = backward ? 2 * (taps + slab) + rows * a->width : taps + slab;
    return sizeof(PIXEL) * pixels + sizeof(int64_t) * taps;
}

static void NAME(furnish)(const dilated_args *a, NAME(room) *at, char *memory, int64_t rows, int backward) {
    const int64_t taps = a->filters * a->side * a->side, slab = NAME(slab_size)(a, rows);
    PIXEL *next = (PIXEL *)(((uintptr_t)memory + 63) / 64 * 64);
    at->taps = (V *)next, next += taps;
    at->x = next, next += slab;
    if (backward) {
        at->dtaps = (V *)next, next += taps;
        at->dout = next, next += slab;
        at->dx = next, next += rows * a->width;
    }
    at->offset = (int64_t *)next;
}

/* Runs all blocks of channels; returns 0, or 1 if memory ran out. */
static int NAME(run)(const dilated_args *a, int backward) {
    const int64_t blocks = (a->dim + CHANNELS - 1) / CHANNELS, rows = backward ? a->height : NAME(slab_rows)(a);
    const int64_t slabs = (a->height + rows - 1) / rows, tasks = backward ? blocks : blocks * slabs * a->batch;
    int failed = 0;
#pragma omp parallel num_threads(team(a->threads, tasks))
    {
        NAME(room) at;
        char *memory = malloc(NAME(room_size)(a, rows, backward) + 64);
        const unsigned mode = flush_denormals();
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
            NAME(furnish)(a, &at, memory, rows, backward);
#pragma omp for schedule(static)
            for (int64_t task = 0; task < tasks; task++) {
                const int64_t d = task % blocks * CHANNELS, first = task / blocks % slabs * rows;
                const int lanes = a->dim - d < CHANNELS ? (int)(a->dim - d) : CHANNELS;
                NAME(load_taps)(a, &at, d, lanes);
                if (backward) NAME(backward_block)(a, &at, d, lanes);
                else
                    NAME(forward_slab)(a, &at, task / blocks / slabs, d, first,
                                       a->height - first < rows ? a->height - first : rows, lanes);
            }
        }
        restore_denormals(mode);
        free(memory);
    }
    return failed;
}
