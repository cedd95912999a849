/* A site: linear layers that share an input. Base and deltas of all its rows in one call.

   y = x·Wᵀ + b + Σ parts of each run's delta        without tiles: y += the parts; x bf16 [T, ≥ cols], y float32 [T, ≥ rows], W bf16 tiles */
#include "terms.h"

#include <stdatomic.h>

enum { SLICE = 256 }; /* rows at once: what projections and partial sums may hold */

typedef struct {
    const Site *site;
    const u16 *x;
    float *y;
    long ldx, ldy;
    int rows, runs;
    const Run *run;
    u8 *memory;
    const size_t *offset; /* of each part's input, run by run */
    _Atomic int next;     /* run that nobody has taken */
} Work;

static int is_vector(const Part *part) { return part->kind == BASE_SCALE || part->kind == VECTOR; }

static void prepare(void *argument, int piece, int pieces) {
    const Work *w = argument;
    for (int r = 0, k = 0; r < w->runs; r++)
        for (int p = 0; p < w->run[r].parts; p++, k++)
            if (k % pieces == piece && w->run[r].part[p].input == p && !is_vector(w->run[r].part + p))
                make_input(w->run[r].part + p, w->x + w->run[r].start * w->ldx, w->ldx, w->run[r].rows, w->memory + w->offset[k]);
}

/* What lies within rows from … to of the site. A part goes by chunks of its own rows, which may begin anywhere in them. */
static void add_part(const Work *w, const Run *run, const Part *part, const void *input, int from, int to) {
    if (part->kind == BOOK) {
        int begin = MAX(0, from - part->first), end = MIN(part->rows, to - part->first);
        if (begin < end) add_book(part, input, run->rows, begin, end, w->y + run->start * w->ldy + part->first, w->ldy);
        return;
    }
    float *sum = scratch(1, (size_t)run->rows * CHUNK * sizeof *sum);
    for (int row = MAX(0, from - part->first) / CHUNK * CHUNK; row < MIN(part->rows, to - part->first); row += CHUNK) {
        int begin = MAX(0, from - part->first - row), end = MIN(MIN(CHUNK, part->rows - row), to - part->first - row);
        if (!is_vector(part)) {
            memset(sum, 0, (size_t)run->rows * CHUNK * sizeof *sum);
            add_chunk(part, input, run->rows, row, sum);
        }
        for (int m = 0; m < run->rows; m++) {
            float *y = w->y + (run->start + m) * w->ldy + part->first + row;
            if (part->kind == BASE_SCALE) for (int j = begin; j < end; j++) y[j] *= part->row ? part->scale * part->row[row + j] : part->scale;
            else if (part->kind == VECTOR) for (int j = begin; j < end; j++) y[j] += part->row[row + j];
            else for (int j = begin; j < end; j++) y[j] += sum[m * CHUNK + j];
        }
    }
}

static void multiply(void *argument, int piece, int pieces) {
    const Work *w = argument;
    const Site *site = w->site;
    int from, to, blocks = (site->cols + 31) / 32, last = ROUND_UP(site->rows, 32);
    share((site->rows + CHUNK - 1) / CHUNK, piece, pieces, &from, &to);
    from *= CHUNK, to = MIN(to * CHUNK, last);
    for (int n = from; n < to && site->tiles; n += 32)
        product(w->x, w->ldx, w->rows, site->tiles + (size_t)(n / 32) * (size_t)blocks * PAIR, blocks, w->y + n, w->ldy, 0);
    for (int r = 0, k = 0; r < w->runs && w->memory; r++)
        for (int p = 0; p < w->run[r].parts; p++, k++) add_part(w, w->run + r, w->run[r].part + p, w->memory + w->offset[k], from, to);
}

/* Bytes of a run's inputs, which begin at `bytes`, and where each part's lies. */
static size_t place_inputs(const Run *run, size_t bytes, size_t *offset) {
    for (int p = 0; p < run->parts; p++) {
        int shared = run->part[p].input;
        offset[p] = shared == p ? bytes : offset[shared];
        if (shared == p) bytes += input_bytes(run->part + p, run->rows);
    }
    return bytes;
}

static void fetch(const void *memory, size_t bytes) {
    for (size_t i = 0; memory && i < bytes; i += 64) _mm_prefetch((const char *)memory + i, _MM_HINT_T1);
}

/* What a run will read, of books: it is asked for a run before. */
static void fetch_run(const Run *run) {
    for (int p = 0; p < run->parts; p++) {
        const Part *part = run->part + p;
        if (part->kind != BOOK) continue;
        int tiles = (part->rows + part->tile - 1) / part->tile, groups = (tiles + LANES - 1) / LANES;
        fetch(part->codes, (size_t)(groups * part->stages * part->segments) * 2 * (size_t)part->bits);
        fetch(part->row_levels, (size_t)part->rows);
        fetch(part->col_levels, (size_t)part->cols);
    }
}

/* A run is one thread's from its inputs to its last part: what it makes of x stays in that thread's caches. */
static void add_runs(void *argument, int piece, int pieces) {
    (void)piece, (void)pieces;
    Work *w = argument;
    for (int r; (r = atomic_fetch_add(&w->next, 1)) < w->runs;) {
        const Run *run = w->run + r;
        if (r + 1 < w->runs && run[1].part != run->part) fetch_run(run + 1);
        size_t offset[run->parts];
        u8 *memory = scratch(8, place_inputs(run, 0, offset));
        for (int p = 0; p < run->parts; p++) {
            if (run->part[p].input == p && !is_vector(run->part + p))
                make_input(run->part + p, w->x + run->start * w->ldx, w->ldx, run->rows, memory + offset[p]);
            add_part(w, run, run->part + p, memory + offset[p], 0, ROUND_UP(w->site->rows, 32));
        }
    }
}

static void add_bias(const Work *w) {
    for (int m = 0; m < w->rows; m++)
        for (int n = 0; n < w->site->rows; n++) w->y[m * w->ldy + n] += w->site->bias[n];
}

/* Books' inputs are large: no more of them than the caches hold. */
static int rows_at_once(const Run *run) {
    for (int p = 0; p < run->parts; p++)
        if (run->part[p].kind == BOOK) return LANES;
    return SLICE;
}

EXPORT int ds_layout(void) { return LAYOUT; }

EXPORT void ds_site(const Site *site, const u16 *x, long ldx, float *y, long ldy, int rows, const Run *run, int runs) {
    Run *cut = scratch(0, (size_t)(runs + SLICE / LANES) * sizeof *cut);
    for (int begin = 0; begin < rows; begin += SLICE) {
        int end = MIN(begin + SLICE, rows), count = 0, parts = 0;
        for (int r = 0; r < runs; r++) {
            int from = MAX(run[r].start, begin), to = MIN(run[r].start + run[r].rows, end);
            if (from >= to || !run[r].parts) continue;
            int most = rows_at_once(run + r);
            for (; from < to; from += most, parts += run[r].parts)
                cut[count++] = (Run){from - begin, MIN(most, to - from), run[r].parts, 0, run[r].part};
        }
        Work work = {site, x + begin * ldx, y + begin * ldy, ldx, ldy, end - begin, count, cut, NULL, NULL, 0};
        if (count < 2 * threads() && threads() > 1 && count) { /* too few runs for the threads: rows of the weights are shared out */
            size_t offset[parts], bytes = 0;
            for (int r = 0, k = 0; r < count; k += cut[r++].parts) bytes = place_inputs(cut + r, bytes, offset + k);
            work.memory = scratch(8, MAX(bytes, 1)), work.offset = offset;
            parallel(prepare, &work);
            parallel(multiply, &work);
        } else {
            parallel(multiply, &work);
            if (count) parallel(add_runs, &work);
        }
        if (site->bias) add_bias(&work);
    }
}
