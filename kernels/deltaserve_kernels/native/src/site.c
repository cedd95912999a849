/* A site: linear layers that share an input. Base and deltas of all its rows in one call.

   y = x·Wᵀ + b + Σ parts of each run's delta        without tiles: y += the parts; x bf16 [T, ≥ cols], y float32 [T, ≥ rows], W bf16 tiles */
#include "terms.h"

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
} Work;

static int is_vector(const Part *part) { return part->kind == BASE_SCALE || part->kind == VECTOR; }

static void prepare(void *argument, int worker, int workers) {
    const Work *w = argument;
    for (int r = 0, k = 0; r < w->runs; r++)
        for (int p = 0; p < w->run[r].parts; p++, k++)
            if (k % workers == worker && w->run[r].part[p].input == p && !is_vector(w->run[r].part + p))
                make_input(w->run[r].part + p, w->x + w->run[r].start * w->ldx, w->ldx, w->run[r].rows, w->memory + w->offset[k]);
}

/* What lies within rows from … to of the site. A part goes by chunks of its own rows, which may begin anywhere in them. */
static void add_part(const Work *w, const Run *run, const Part *part, const void *input, int from, int to) {
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

static void multiply(void *argument, int worker, int workers) {
    const Work *w = argument;
    const Site *site = w->site;
    int from, to, blocks = (site->cols + 31) / 32, last = ROUND_UP(site->rows, 32);
    share((site->rows + CHUNK - 1) / CHUNK, worker, workers, &from, &to);
    from *= CHUNK, to = MIN(to * CHUNK, last);
    for (int n = from; n < to && site->tiles; n += 32)
        product(w->x, w->ldx, w->rows, site->tiles + (size_t)(n / 32) * (size_t)blocks * PAIR, blocks, w->y + n, w->ldy, 0);
    for (int r = 0, k = 0; r < w->runs; r++)
        for (int p = 0; p < w->run[r].parts; p++, k++) add_part(w, w->run + r, w->run[r].part + p, w->memory + w->offset[k], from, to);
    if (site->bias)
        for (int m = 0; m < w->rows; m++)
            for (int n = from; n < MIN(to, site->rows); n++) w->y[m * w->ldy + n] += site->bias[n];
}

EXPORT void ds_site(const Site *site, const u16 *x, long ldx, float *y, long ldy, int rows, const Run *run, int runs) {
    Run *cut = scratch(0, (size_t)MAX(runs, 1) * sizeof *cut);
    for (int begin = 0; begin < rows; begin += SLICE) {
        int end = MIN(begin + SLICE, rows), count = 0, parts = 0;
        size_t bytes = 0;
        for (int r = 0; r < runs; r++) {
            int from = MAX(run[r].start, begin), to = MIN(run[r].start + run[r].rows, end);
            if (from >= to || !run[r].parts) continue;
            cut[count++] = (Run){from - begin, to - from, run[r].parts, 0, run[r].part};
            parts += run[r].parts;
        }
        size_t offset[MAX(parts, 1)];
        for (int r = 0, k = 0; r < count; r++)
            for (int p = 0; p < cut[r].parts; p++, k++) {
                int shared = cut[r].part[p].input;
                offset[k] = shared == p ? bytes : offset[k - p + shared];
                if (shared == p) bytes += input_bytes(cut[r].part + p, cut[r].rows);
            }
        Work work = {site, x + begin * ldx, y + begin * ldy, ldx, ldy, end - begin, count, cut, scratch(8, bytes), offset};
        if (count) parallel(prepare, &work);
        parallel(multiply, &work);
    }
}
