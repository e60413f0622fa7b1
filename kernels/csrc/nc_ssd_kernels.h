/* The non-causal SSD for one instruction set; instances.h includes this file once for each.
 *
 * All of it is products of matrices, of which one is read number by number, with any steps, and the other as strips of WIDE
 * vectors that lie one behind the other: a panel. A tile of ROWS rows and a strip of columns stays in registers. Sums over
 * positions weigh their strips while they make them, and outputs are added to the skip, so that neither needs a map of its
 * own. The columns of a head are cut into spans, whose panels stay in the first-level cache.
 */
#undef ROWS
#undef PANEL
#undef TALL
#undef LINE
#undef LOOSE
#define ROWS (LANES == 16 ? 12 : 6) /* with these, tiles fill the registers */
#define WIDE 2
#define PANEL (WIDE * LANES)
#define TALL (16 * ROWS) /* rows, about, that are read by the same panels before others come */
#define LINE (64 / (int)sizeof(T)) /* numbers of a cache line */
#define LOOSE NAME(loose)

typedef T LOOSE __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias)); /* at any address */

/* out[i] = scale start[i] + sum_k matrix[i, k] panel[k] */
typedef struct {
    T *out;
    const T *start, *matrix; /* start: null for zeros */
    const V *panel;
    T scale;
    int64_t out_row, start_row;
    int64_t down, along;  /* steps of the matrix from i to i and from k to k */
    int64_t depth, pitch; /* strips that count, and strips from panel to panel */
} NAME(product);

INLINE void NAME(tile)(const NAME(product) t, const int rows) {
    V sum[ROWS][WIDE];
    const T *matrix[(ROWS + 2) / 3]; /* every third row: the two below it take the same step in their addresses */
    const V *strip = t.panel;
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < WIDE; j++) sum[i][j] = (V){0};
#pragma GCC unroll 4
    for (int i = 0; i < rows; i += 3) matrix[i / 3] = t.matrix + i * t.down;
    if (t.start)
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) __builtin_prefetch(t.start + i * t.start_row);
    for (int64_t k = 0; k < t.depth; k++, strip += WIDE) {
        V v[WIDE];
        for (int j = 0; j < WIDE; j++) v[j] = strip[j];
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const T factor = matrix[i / 3][i % 3 * t.down];
            for (int j = 0; j < WIDE; j++) sum[i][j] = FMA(SPLAT(factor), v[j], sum[i][j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i += 3) {
            matrix[i / 3] += t.along;
            __asm__("" : "+r"(matrix[i / 3])); /* else the compiler keeps a pointer for every row and has too few registers */
        }
    }
    if (t.start)
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < WIDE; j++) {
                const V start = *(const LOOSE *)(t.start + i * t.start_row + j * LANES);
                sum[i][j] = FMA(SPLAT(t.scale), start, sum[i][j]);
            }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < WIDE; j++) *(LOOSE *)(t.out + i * t.out_row + j * LANES) = sum[i][j];
}

/* The same product some rows further down. */
INLINE NAME(product) NAME(below)(NAME(product) t, int64_t rows) {
    t.out += rows * t.out_row, t.matrix += rows * t.down;
    if (t.start) t.start += rows * t.start_row;
    return t;
}

/* At most ROWS rows of a panel. */
INLINE void NAME(tiles)(NAME(product) t, int rows) {
    if (rows == ROWS) {
        NAME(tile)(t, ROWS);
        return;
    }
    for (; rows >= 4; rows -= 4, t = NAME(below)(t, 4)) NAME(tile)(t, 4);
    if (rows & 2) NAME(tile)(t, 2), t = NAME(below)(t, 2);
    if (rows & 1) NAME(tile)(t, 1);
}

/* At most ROWS rows of a panel that is wider than what is left of the columns. */
APART void NAME(edge)(NAME(product) t, int rows, int64_t left) {
    T edge[ROWS * PANEL] = {0}, *out = t.out;
    const int64_t row = t.out_row;
    if (t.start) {
        for (int i = 0; i < rows; i++) memcpy(edge + i * PANEL, t.start + i * t.start_row, sizeof(T) * left);
        t.start = edge, t.start_row = PANEL;
    }
    t.out = edge, t.out_row = PANEL, t.along = 1;
    NAME(tiles)(t, rows);
    for (int i = 0; i < rows; i++) memcpy(out + i * row, edge + i * PANEL, sizeof(T) * left);
}

/* All rows and columns by as many panels as these need; the matrix is read along its rows. */
APART void NAME(multiply)(NAME(product) t, int64_t rows, int64_t columns) {
    t.along = 1;
    for (int64_t i = 0; i < rows; i += ROWS, t = NAME(below)(t, ROWS)) {
        const int some = rows - i < ROWS ? (int)(rows - i) : ROWS;
        NAME(product) at = t;
        for (int64_t p = 0; p < columns; p += PANEL, at.out += PANEL, at.panel += t.pitch * WIDE) {
            if (t.start) at.start = t.start + p;
            if (columns - p < PANEL) NAME(edge)(at, some, columns - p);
            else NAME(tiles)(at, some);
        }
    }
}

INLINE V NAME(load)(const T *src, int64_t left) {
    V v = {0};
    if (left >= LANES) return *(const LOOSE *)src;
    memcpy(&v, src, sizeof(T) * left);
    return v;
}

INLINE void NAME(store)(T *dst, V v, int64_t left) {
    if (left >= LANES) *(LOOSE *)dst = v;
    else memcpy(dst, &v, sizeof(T) * left);
}

/* How a call is cut. Sums of all parts of a span lie one behind the other; a head has two panels that are turned over. */
typedef struct {
    const nc_ssd_args *a;
    int64_t pieces, spans;   /* spans of a head, of a batch element */
    int64_t part, parts;     /* positions of a part, and their number */
    int64_t tiles, blocks;   /* of rows; blocks are what threads share */
    int64_t each, turned;    /* vectors of the sums of a span, of a panel that is turned over */
    int64_t together;        /* batch elements that have memory at once */
    V *sums, *turns;
} NAME(plan);

/* Some columns of a head of a batch element, and their place in memory. */
typedef struct {
    int64_t b, m, g, p, columns;
    V *sums, *turned, *dturned;
} NAME(span);

static NAME(span) NAME(find_span)(const NAME(plan) *t, int64_t first, int64_t b, int64_t i) {
    const int64_t m = i / t->pieces, p = i % t->pieces * SPAN, left = t->a->size - p;
    V *turned = t->turns + 2 * (b * t->a->heads + m) * t->turned + p * WIDE;
    return (NAME(span)){first + b, m, m % t->a->groups, p, left < SPAN ? left : SPAN,
                        t->sums + (b * t->spans + i) * t->parts * t->each, turned, turned + t->turned};
}

static T NAME(rate)(const nc_ssd_args *a, int64_t m) { return a->positive ? -((const T *)a->A)[m] : ((const T *)a->A)[m]; }

static int64_t NAME(panels)(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

/* Makes panels of some rows, weighted where there are weights. */
INLINE void NAME(pack)(V *panel, const T *row, int64_t step, const T *dt, int64_t dt_step, T rate, int64_t depth,
                       int64_t columns) {
    for (int64_t k = 0; k < depth; k++, row += step) {
        const T weight = dt ? rate * dt[k * dt_step] : 1;
        int64_t p = 0;
        for (; p + LANES <= columns; p += LANES) {
            if (p % LINE == 0) __builtin_prefetch(row + AHEAD * step + p);
            panel[(p / PANEL * DEPTH + k) * WIDE + p % PANEL / LANES] = weight * *(const LOOSE *)(row + p);
        }
        if (p < columns)
            panel[(p / PANEL * DEPTH + k) * WIDE + p % PANEL / LANES] = weight * NAME(load)(row + p, columns - p);
    }
}

/* Sums over the positions of a part: of B and weighted inputs, in the backward pass of C and gradients. */
TARGET static void NAME(sum_part)(const nc_ssd_args *a, NAME(span) s, V *sums, int64_t first, int64_t last, int backward) {
    V panel[DEPTH * SPAN / LANES];
    const int64_t *stride = backward ? a->dout_stride : a->x_stride, *step = backward ? a->C_stride : a->B_stride;
    const T *map = (const T *)(backward ? a->dout : a->x) + s.b * stride[0] + s.m * stride[2] + s.p;
    const T *matrix = (const T *)(backward ? a->C : a->B) + s.b * step[0] + s.g * step[2];
    const T *dt = (const T *)a->dt + s.b * a->dt_stride[0] + s.m * a->dt_stride[2];
    const int64_t cuts = (last - first + DEPTH - 1) / DEPTH, depth = (last - first + cuts - 1) / cuts;
    NAME(product) t = {.out_row = PANEL, .start_row = PANEL, .scale = 1, .down = 1, .along = step[1]};
    if (s.columns % PANEL) memset(panel, 0, sizeof(panel));
    for (int64_t l = first; l < last; l += depth) {
        t.depth = last - l < depth ? last - l : depth;
        NAME(pack)(panel, map + l * stride[1], stride[1], backward ? 0 : dt + l * a->dt_stride[1], a->dt_stride[1],
                   NAME(rate)(a, s.m), t.depth, s.columns);
        for (int64_t i = 0; i < NAME(panels)(s.columns); i++) {
            t.panel = panel + i * DEPTH * WIDE;
            for (int64_t n = 0; n < a->state; n += ROWS) {
                t.out = (T *)(sums + (i * a->state + n) * WIDE), t.matrix = matrix + l * step[1] + n;
                t.start = l > first ? t.out : 0; /* short sums are added to long ones: less is rounded off */
                NAME(tiles)(t, a->state - n < ROWS ? (int)(a->state - n) : ROWS);
            }
        }
    }
}

/* Turns N rows of some columns over, into strips of panels. */
TARGET static void NAME(turn_panels)(V *panels, int64_t pitch, const T *src, int64_t row, int64_t n, int64_t columns) {
    for (int64_t i = 0; i < n; i += PANEL, panels += pitch * WIDE)
        NAME(turn)((T *)panels, PANEL, src + i * row, row, n - i < PANEL ? n - i : PANEL, columns);
}

/* Adds the sums of all parts up, in order. Forward keeps them; backward turns them and those of the forward pass over. */
TARGET static void NAME(finish_sums)(const NAME(plan) *t, NAME(span) s, int backward) {
    const nc_ssd_args *a = t->a;
    const int64_t width = a->heads / a->groups * a->size;
    T *all = (T *)a->sums + (s.b * a->groups + s.g) * a->state * width + s.m / a->groups * a->size + s.p;
    for (int64_t part = 1; part < t->parts; part++)
        for (int64_t i = 0; i < NAME(panels)(s.columns) * a->state * WIDE; i++) s.sums[i] += s.sums[part * t->each + i];
    for (int64_t p = 0; p < s.columns; p += PANEL) {
        const T *panel = (const T *)(s.sums + p / PANEL * a->state * WIDE);
        const int64_t some = s.columns - p < PANEL ? s.columns - p : PANEL;
        if (backward) NAME(turn_panels)(s.dturned + p * WIDE, a->size, panel, PANEL, a->state, some);
        else for (int64_t n = 0; n < a->state; n++) memcpy(all + n * width + p, panel + n * PANEL, sizeof(T) * some);
    }
    if (backward) NAME(turn_panels)(s.turned, a->size, all, width, a->state, s.columns);
}

/* Outputs at some positions. */
TARGET static void NAME(read)(const nc_ssd_args *a, NAME(span) s, int64_t first, int64_t rows) {
    NAME(product) t = {
        .out = (T *)a->out + ((s.b * a->length + first) * a->heads + s.m) * a->size + s.p, .out_row = a->heads * a->size,
        .start_row = a->x_stride[1], .panel = s.sums, .depth = a->state, .pitch = a->state,
        .matrix = (const T *)a->C + s.b * a->C_stride[0] + first * a->C_stride[1] + s.g * a->C_stride[2],
        .down = a->C_stride[1]};
    if (a->D) {
        t.start = (const T *)a->x + s.b * a->x_stride[0] + first * a->x_stride[1] + s.m * a->x_stride[2] + s.p;
        t.scale = ((const T *)a->D)[s.m];
    }
    NAME(multiply)(t, rows, s.columns);
}

/* Gradients of inputs, steps and parameters from those of the weighted inputs, in whose place the first of them are written;
 * and the weighted inputs. */
TARGET static void NAME(spread)(const nc_ssd_args *a, NAME(span) s, int64_t first, int64_t rows, T *weighted) {
    const int64_t at = (s.b * a->length + first) * a->heads + s.m;
    const T *x = (const T *)a->x + s.b * a->x_stride[0] + first * a->x_stride[1] + s.m * a->x_stride[2] + s.p;
    const T *dout = (const T *)a->dout + s.b * a->dout_stride[0] + first * a->dout_stride[1] + s.m * a->dout_stride[2] + s.p;
    const T *dt = (const T *)a->dt + s.b * a->dt_stride[0] + first * a->dt_stride[1] + s.m * a->dt_stride[2];
    const T rate = NAME(rate)(a, s.m), skip = a->D ? ((const T *)a->D)[s.m] : 0;
    T *dx = (T *)a->dx + at * a->size + s.p, *ddt = (T *)a->ddt + at, *drate = (T *)a->dterms + at;
    T *dskip = drate + a->batch * a->length * a->heads;
    for (int64_t i = 0; i < rows; i++, dx += a->heads * a->size, x += a->x_stride[1], dout += a->dout_stride[1]) {
        const T weight = rate * dt[i * a->dt_stride[1]];
        V by_weight = {0}, by_skip = {0};
        for (int64_t p = 0; p < s.columns; p += LANES) {
            const int64_t left = s.columns - p;
            const V in = NAME(load)(x + p, left), drive = NAME(load)(dx + p, left), out = NAME(load)(dout + p, left);
            by_weight = FMA(drive, in, by_weight);
            by_skip = FMA(out, in, by_skip);
            *(LOOSE *)(weighted + i * SPAN + p) = weight * in;
            NAME(store)(dx + p, weight * drive + skip * out, left);
        }
        const T dweight = NAME(sum_lanes)(by_weight), sign = a->positive ? -1 : 1;
        const int64_t j = i * a->heads;
        ddt[j] = (s.p ? ddt[j] : 0) + rate * dweight;
        drate[j] = (s.p ? drate[j] : 0) + sign * dt[i * a->dt_stride[1]] * dweight;
        if (a->D) dskip[j] = (s.p ? dskip[j] : 0) + NAME(sum_lanes)(by_skip);
    }
}

/* All gradients at some positions; those of B and C are added up over the spans of a group, in order. */
TARGET static void NAME(read_backward)(const nc_ssd_args *a, NAME(span) s, int64_t first, int64_t rows) {
    T weighted[TALL * SPAN];
    const int64_t at = s.b * a->length + first, matrices = (at * a->groups + s.g) * a->state;
    const int more = s.m >= a->groups || s.p;
    NAME(multiply)((NAME(product)){
        .out = (T *)a->dx + (at * a->heads + s.m) * a->size + s.p, .out_row = a->heads * a->size,
        .matrix = (const T *)a->B + s.b * a->B_stride[0] + first * a->B_stride[1] + s.g * a->B_stride[2],
        .down = a->B_stride[1], .panel = s.sums, .depth = a->state, .pitch = a->state}, rows, s.columns);
    NAME(spread)(a, s, first, rows, weighted);
    NAME(product) t = {
        .out = (T *)a->dB + matrices, .out_row = a->groups * a->state, .start_row = a->groups * a->state, .scale = 1,
        .matrix = weighted, .down = SPAN, .panel = s.dturned, .depth = s.columns, .pitch = a->size};
    t.start = more ? t.out : 0;
    NAME(multiply)(t, rows, a->state);
    t.out = (T *)a->dC + matrices, t.start = more ? t.out : 0, t.panel = s.turned;
    t.matrix = (const T *)a->dout + s.b * a->dout_stride[0] + first * a->dout_stride[1] + s.m * a->dout_stride[2] + s.p;
    t.down = a->dout_stride[1];
    NAME(multiply)(t, rows, a->state);
}

/* Parts are cut by length and heads alone: the sum of a part is rounded, and results depend on no threads and no batch. */
static NAME(plan) NAME(cut)(const nc_ssd_args *a) {
    NAME(plan) t = {.a = a, .pieces = (a->size + SPAN - 1) / SPAN, .tiles = (a->length + ROWS - 1) / ROWS};
    t.spans = a->heads * t.pieces;
    const int64_t wanted = (TASKS + t.spans - 1) / t.spans, most = (a->length + LEAST - 1) / LEAST;
    const int64_t parts = wanted < most ? wanted : most, share = TALL / ROWS * a->threads;
    t.part = (a->length + parts - 1) / parts;
    t.parts = (a->length + t.part - 1) / t.part;
    t.blocks = (t.tiles + share - 1) / share * a->threads;
    t.each = SPAN / LANES * a->state;
    t.turned = NAME(panels)(a->state) * a->size * WIDE;
    const int64_t enough = (8 * a->threads + t.spans * t.parts - 1) / (t.spans * t.parts);
    t.together = enough < a->batch ? enough : a->batch;
    return t;
}

/* Runs one pass; returns 0, or 1 if memory ran out. */
static int NAME(run)(const nc_ssd_args *a, int backward) {
    NAME(plan) t = NAME(cut)(a);
    const int64_t vectors = t.spans * t.parts * t.each + (backward ? 2 * a->heads * t.turned : 0);
    char *memory = malloc(sizeof(V) * t.together * vectors + 64);
    if (!memory) return 1;
    t.sums = (V *)(((uintptr_t)memory + 63) / 64 * 64);
    t.turns = t.sums + t.together * t.spans * t.parts * t.each;
#pragma omp parallel num_threads((int)a->threads)
    for (int64_t b = 0; b < a->batch; b += t.together) {
        const int64_t some = a->batch - b < t.together ? a->batch - b : t.together;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < some * t.spans * t.parts; task++) {
            const int64_t i = task / t.parts, part = task % t.parts, l = part * t.part;
            const NAME(span) s = NAME(find_span)(&t, b, i / t.spans, i % t.spans);
            NAME(sum_part)(a, s, s.sums + part * t.each, l, l + t.part < a->length ? l + t.part : a->length, backward);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < some * t.spans; i++)
            NAME(finish_sums)(&t, NAME(find_span)(&t, b, i / t.spans, i % t.spans), backward);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < some * t.blocks; task++) {
            const int64_t block = task % t.blocks, l = block * t.tiles / t.blocks * ROWS;
            const int64_t end = (block + 1) * t.tiles / t.blocks * ROWS, rows = (end < a->length ? end : a->length) - l;
            for (int64_t i = 0; i < t.spans; i++) {
                const NAME(span) s = NAME(find_span)(&t, b, task / t.blocks, i);
                if (backward) NAME(read_backward)(a, s, l, rows);
                else NAME(read)(a, s, l, rows);
            }
        }
    }
    free(memory);
    return 0;
}
