/* Paged attention. The KV cache is in pages of 16 positions, bfloat16:

   K [page][kv head][size/2][16][2], V [page][kv head][8][size][2]: columns of tiles as they are

   A row's sums have one order, whatever rows share its tiles. */
#include "common.h"

#include <math.h>

enum { PAGE = 16, GROUP = 4, LARGEST_HEAD = 256, TILE_ROWS = 16 };

typedef struct {
    const u16 *q, *k, *v;
    const int32_t *pages; /* of each sequence, [sequences][most pages] */
    const int32_t *sequences, *lengths; /* of each row: its sequence; positions it sees, itself the last */
    u16 *out;
    long ldout;
    int rows, heads, kv_heads, size, most_pages, window; /* window 0: none */
    float scale;
} Attention;

/* weights = exp(scale · (scores − largest)) of the places from … to, 0 elsewhere; → 1 / their sum */
static float soften(float *s, u16 *weights, int span, int from, int to, float scale) {
    vf most = vset(-INFINITY), sum = vset(0), factor = vset(scale);
    for (int i = 0; i < from; i++) s[i] = -INFINITY; /* what is there may be NaN */
    for (int i = to; i < span; i++) s[i] = -INFINITY;
    for (int i = 0; i < span; i += VW) most = vmax(most, vload(s + i));
    most = vset(vlargest(most));
    for (int i = 0; i < span; i += VW) vstore(s + i, vexp(vmul(vsub(vload(s + i), most), factor)));
    for (int i = 0; i < from; i++) s[i] = 0;
    for (int i = to; i < span; i++) s[i] = 0;
    for (int i = 0; i < span; i += VW) {
        sum = vadd(sum, vload(s + i));
        vstore_bf16(weights + i, vload(s + i));
    }
    return 1.0f / vsum(sum);
}

static inline __attribute__((always_inline)) void attend(
    const Attention *w, int group, const u16 *q, const u16 *k, const u16 *v, const int32_t *pages, int from, int length, u16 *out) {
    int size = w->size, first = from / PAGE, last = (length + PAGE - 1) / PAGE, span = (last - first) * PAGE;
    long stride = (long)w->kv_heads * size * PAGE;
    float *scores = scratch(1, (size_t)(group * span) * sizeof *scores);
    u16 *weights = scratch(2, (size_t)(group * span) * sizeof *weights);
    float inverse[GROUP];
    for (int p = first; p < last; p++) {
        const u16 *keys = k + pages[p] * stride;
        if (p + 1 < last) for (int i = 0; i < size / 2; i++) _mm_prefetch((const char *)(k + pages[p + 1] * stride + i * 32), _MM_HINT_T0);
        vf sum[GROUP][PAGE / VW];
        for (int g = 0; g < group; g++) for (int u = 0; u < PAGE / VW; u++) sum[g][u] = vset(0);
        for (int d = 0; d < size / 2; d++)
            for (int u = 0; u < PAGE / VW; u++) {
                vpairs key = vload_pairs(keys + d * 2 * PAGE + u * 2 * VW);
                for (int g = 0; g < group; g++) sum[g][u] = vdot(sum[g][u], key, vset_pair(q + g * size + 2 * d));
            }
        for (int g = 0; g < group; g++) for (int u = 0; u < PAGE / VW; u++)
            vstore(scores + g * span + (p - first) * PAGE + u * VW, sum[g][u]);
    }
    for (int g = 0; g < group; g++) inverse[g] = soften(scores + g * span, weights + g * span, span, from - first * PAGE, length - first * PAGE, w->scale);
    for (int d = 0; d < size; d += 2 * VW) {
        vf sum[GROUP][2];
        for (int g = 0; g < group; g++) sum[g][0] = sum[g][1] = vset(0);
        for (int p = first; p < last; p++) {
            const u16 *values = v + pages[p] * stride;
            for (int i = 0; i < PAGE / 2; i++) {
                int at = (p - first) * PAGE + 2 * i;
                if (first * PAGE + at >= length) break;
                vpairs a = vload_pairs(values + (long)i * 2 * size + 2 * d), b = a;
                if (d + VW < size) b = vload_pairs(values + (long)i * 2 * size + 2 * (d + VW));
                if (first * PAGE + at + 1 == length) a = vfirst(a), b = vfirst(b); /* what is not written yet may be NaN */
                for (int g = 0; g < group; g++) {
                    vpairs weight = vset_pair(weights + g * span + at);
                    sum[g][0] = vdot(sum[g][0], a, weight);
                    sum[g][1] = vdot(sum[g][1], b, weight);
                }
            }
        }
        for (int g = 0; g < group; g++) {
            vstore_bf16(out + g * size + d, vmul(sum[g][0], vset(inverse[g])));
            if (d + VW < size) vstore_bf16(out + g * size + d + VW, vmul(sum[g][1], vset(inverse[g])));
        }
    }
}

static void attend_rows(void *argument, int piece, int pieces) {
    const Attention *w = argument;
    int each = w->heads / w->kv_heads, from, to;
    share(w->rows * w->kv_heads, piece, pieces, &from, &to);
    for (int item = from; item < to; item++) {
        int row = item / w->kv_heads, head = item % w->kv_heads, length = w->lengths[row];
        int begin = w->window && length > w->window ? length - w->window : 0;
        const int32_t *pages = w->pages + (long)w->sequences[row] * w->most_pages;
        const u16 *k = w->k + (long)head * w->size * PAGE, *v = w->v + (long)head * w->size * PAGE;
        for (int g = 0; g < each; g += GROUP) {
            const u16 *q = w->q + ((long)row * w->heads + head * each + g) * w->size;
            u16 *out = w->out + row * w->ldout + (head * each + g) * w->size;
            switch (MIN(GROUP, each - g)) {
            case 1: attend(w, 1, q, k, v, pages, begin, length, out); break;
            case 2: attend(w, 2, q, k, v, pages, begin, length, out); break;
            case 3: attend(w, 3, q, k, v, pages, begin, length, out); break;
            default: attend(w, 4, q, k, v, pages, begin, length, out);
            }
        }
    }
}

#if defined(__AMX_BF16__)
typedef struct {
    const Attention *attention;
    const int32_t *starts; /* of blocks of rows of one sequence, blocks + 1 */
    int blocks;
} Blocks;

static void shape(int rows) { /* 0…3 sums, 4 queries, 5 weights, 6 keys, 7 values */
    u8 m = (u8)rows;
    shape_tiles((const u8[8]){m, m, m, m, m, m, 16, 8}, (const u8[8]){64, 64, 64, 64, 64, 2 * PAGE, 64, 64});
}

/* `rows` neighbours of one sequence, all query heads of one kv head: at most 16 rows of a tile. */
static void attend_block(const Attention *w, int row, int rows, int head) {
    int each = w->heads / w->kv_heads, size = w->size, count = rows * each, length = w->lengths[row + rows - 1];
    int begin = w->window && w->lengths[row] > w->window ? w->lengths[row] - w->window : 0;
    int first = begin / PAGE, last = (length + PAGE - 1) / PAGE, span = (last - first) * PAGE;
    long stride = (long)w->kv_heads * size * PAGE;
    const int32_t *pages = w->pages + (long)w->sequences[row] * w->most_pages;
    const u16 *k = w->k + (long)head * size * PAGE, *v = w->v + (long)head * size * PAGE;
    u16 *q = scratch(3, TILE_ROWS * LARGEST_HEAD * sizeof *q);
    float *scores = scratch(1, (size_t)(TILE_ROWS * span) * sizeof *scores), inverse[TILE_ROWS], ALIGNED sums[TILE_ROWS * 64];
    u16 *weights = scratch(2, (size_t)(TILE_ROWS * span) * sizeof *weights), ALIGNED tail[PAGE * LARGEST_HEAD];
    for (int m = 0; m < rows; m++)
        memcpy(q + m * each * size, w->q + ((long)(row + m) * w->heads + head * each) * size, (size_t)(each * size) * sizeof *q);
    for (int p = first; p < last; p++) {
        const u16 *keys = k + pages[p] * stride;
        if (p + 1 < last) for (int i = 0; i < size / 2; i++) _mm_prefetch((const char *)(k + pages[p + 1] * stride + i * 32), _MM_HINT_T0);
        _tile_zero(0);
        for (int d = 0; d < size; d += 32) {
            _tile_loadd(4, q + d, size * 2);
            _tile_loadd(6, keys + d * PAGE, 64);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, scores + (p - first) * PAGE, span * 4);
    }
    for (int i = 0; i < count; i++) {
        int own = w->lengths[row + i / each], from = w->window && own > w->window ? own - w->window : 0;
        inverse[i] = soften(scores + i * span, weights + i * span, span, from - first * PAGE, own - first * PAGE, w->scale);
    }
    memcpy(tail, v + pages[last - 1] * stride, (size_t)(PAGE * size) * sizeof *tail);
    for (int at = length - (last - 1) * PAGE; at < PAGE; at++) /* what is not written yet may be NaN */
        for (int d = 0; d < size; d++) tail[(at / 2 * size + d) * 2 + at % 2] = 0;
    for (int d = 0; d < size; d += 64) {
        int wide = size - d > 32; /* two or four tiles of 16 */
        _tile_zero(0);
        _tile_zero(1);
        if (wide) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int p = first; p < last; p++) {
            const u16 *values = (p + 1 < last ? v + pages[p] * stride : tail) + 2 * d;
            if (p + 2 < last) for (int i = 0; i < 8; i++) for (int j = 0; j < 4; j++) _mm_prefetch((const char *)(v + pages[p + 1] * stride + 2 * d + (i * size + j * 16) * 2), _MM_HINT_T0);
            _tile_loadd(5, weights + (p - first) * PAGE, span * 2);
            _tile_loadd(7, values, size * 4);
            _tile_dpbf16ps(0, 5, 7);
            _tile_loadd(7, values + 32, size * 4);
            _tile_dpbf16ps(1, 5, 7);
            if (!wide) continue;
            _tile_loadd(7, values + 64, size * 4);
            _tile_dpbf16ps(2, 5, 7);
            _tile_loadd(7, values + 96, size * 4);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, 256);
        _tile_stored(1, sums + 16, 256);
        if (wide) {
            _tile_stored(2, sums + 32, 256);
            _tile_stored(3, sums + 48, 256);
        }
        for (int i = 0; i < count; i++) {
            u16 *out = w->out + (row + i / each) * w->ldout + (head * each + i % each) * size + d;
            for (int j = 0; j < (wide ? 64 : 32); j += VW) vstore_bf16(out + j, vmul(vload(sums + i * 64 + j), vset(inverse[i])));
        }
    }
}

static void attend_blocks(void *argument, int piece, int pieces) {
    const Blocks *b = argument;
    const Attention *w = b->attention;
    int from, to, shaped = 0, each = w->heads / w->kv_heads;
    share(b->blocks * w->kv_heads, piece, pieces, &from, &to);
    for (int item = from; item < to; item++) {
        int block = item / w->kv_heads, rows = b->starts[block + 1] - b->starts[block];
        if (shaped != rows * each) shape(shaped = rows * each);
        attend_block(w, b->starts[block], rows, item % w->kv_heads);
    }
    if (shaped) _tile_release();
}

EXPORT void ds_attention(const Attention *work) {
    int each = work->heads / work->kv_heads, most = TILE_ROWS / MAX(each, 1), blocks = 0;
    if (work->size % 32 || most == 0) {
        parallel(attend_rows, (void *)work);
        return;
    }
    int32_t *starts = scratch(0, (size_t)(work->rows + 1) * sizeof *starts);
    for (int row = 0; row < work->rows; row++) {
        int same = row && work->sequences[row] == work->sequences[row - 1];
        if (!same || row - starts[blocks - 1] == most) starts[blocks++] = row;
    }
    starts[blocks] = work->rows;
    Blocks b = {work, starts, blocks};
    parallel(attend_blocks, &b);
}
#else
EXPORT void ds_attention(const Attention *work) { parallel(attend_rows, (void *)work); }
#endif
