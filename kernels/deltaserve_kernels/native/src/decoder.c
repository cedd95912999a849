/* What a Llama-like decoder does beside its linear layers: norms, rotary embedding, paged attention, gated activation.

   The KV cache is in pages of 16 positions:   K [page][kv head][size/2][16][2], V [page][kv head][8][size][2], bfloat16 */
#include "common.h"

#include <math.h>

enum { PAGE = 16, GROUP = 4, LARGEST_HEAD = 256 };

/* One layer's norms, by run of rows: weights of the base, or a tenant's own. */
typedef struct {
    int32_t start, rows;
    const u16 *const *weights; /* of all norms of the model */
} NormRun;

typedef struct {
    float *h; /* [T, size]; += y before it is normalised */
    const float *y;
    u16 *out;
    long ldy, ldout;
    int size, runs, index;
    float eps;
    const NormRun *run;
} Norm;

static void norm_rows(void *argument, int worker, int workers) {
    const Norm *w = argument;
    for (int r = 0; r < w->runs; r++) {
        const u16 *weight = w->run[r].weights[w->index];
        int from, to;
        share(w->run[r].rows, worker, workers, &from, &to);
        for (int row = w->run[r].start + from; row < w->run[r].start + to; row++) {
            float *h = w->h + (long)row * w->size;
            vf sum = vset(0);
            for (int i = 0; i < w->size; i += VW) {
                vf v = vload(h + i);
                if (w->y) vstore(h + i, v = vadd(v, vload(w->y + row * w->ldy + i)));
                sum = vfma(v, v, sum);
            }
            vf scale = vset(1.0f / sqrtf(vsum(sum) / (float)w->size + w->eps));
            for (int i = 0; i < w->size; i += VW)
                vstore_bf16(w->out + row * w->ldout + i, vmul(vmul(vload(h + i), scale), vload_bf16(weight + i)));
        }
    }
}

EXPORT void ds_add_norm(
    float *h, const float *y, long ldy, u16 *out, long ldout, int size, float eps, const NormRun *run, int runs, int index) {
    Norm work = {h, y, out, ldy, ldout, size, runs, index, eps, run};
    norm_rows(&work, 0, 1);
}

typedef struct {
    const float *y; /* [T, (heads + 2·kv heads)·size] */
    const float *cos_sin; /* [positions][size]: cosines, then sines of the first half */
    const int32_t *positions, *slots;
    u16 *q, *k, *v;
    long ldy;
    int rows, heads, kv_heads, size, runs, q_norm, k_norm;
    float eps;
    const NormRun *run;
} Rotary;

static void norm_head(float *x, const u16 *weight, int size, float eps) {
    float sum = 0;
    for (int i = 0; i < size; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / (float)size + eps);
    for (int i = 0; i < size; i++) x[i] *= scale * to_float(weight[i]);
}

static void rotate_rows(void *argument, int worker, int workers) {
    const Rotary *w = argument;
    int size = w->size, half = size / 2, from, to;
    float x[LARGEST_HEAD], t[LARGEST_HEAD];
    share(w->rows, worker, workers, &from, &to);
    for (int row = from, r = 0; row < to; row++) {
        while (w->run[r].start + w->run[r].rows <= row) r++;
        const float *c = w->cos_sin + (long)w->positions[row] * size, *s = c + half;
        long page = w->slots[row] / PAGE, at = w->slots[row] % PAGE;
        for (int head = 0; head < w->heads + w->kv_heads; head++) {
            memcpy(x, w->y + row * w->ldy + head * size, (size_t)size * sizeof *x);
            int norm = head < w->heads ? w->q_norm : w->k_norm;
            if (norm >= 0) norm_head(x, w->run[r].weights[norm], size, w->eps);
            for (int i = 0; i < half; i++) {
                t[i] = x[i] * c[i] - x[i + half] * s[i];
                t[i + half] = x[i + half] * c[i] + x[i] * s[i];
            }
            if (head < w->heads) {
                u16 *q = w->q + ((long)row * w->heads + head) * size;
                for (int i = 0; i < size; i++) q[i] = to_bf16(t[i]);
            } else {
                u16 *k = w->k + (page * w->kv_heads + head - w->heads) * size * PAGE;
                for (int i = 0; i < size; i++) k[i / 2 * 2 * PAGE + at * 2 + i % 2] = to_bf16(t[i]);
            }
        }
        for (int head = 0; head < w->kv_heads; head++) {
            const float *value = w->y + row * w->ldy + (w->heads + w->kv_heads + head) * size;
            u16 *v = w->v + (page * w->kv_heads + head) * size * PAGE + at / 2 * 2 * size + at % 2;
            for (int i = 0; i < size; i++) v[2 * i] = to_bf16(value[i]);
        }
    }
}

EXPORT void ds_rotary(const Rotary *work) { parallel(rotate_rows, (void *)work); }

typedef struct {
    const u16 *q, *k, *v;
    const int32_t *pages; /* of each sequence, [sequences][most pages] */
    const int32_t *sequences, *lengths; /* of each row: its sequence; positions it sees, itself the last */
    u16 *out;
    long ldout;
    int rows, heads, kv_heads, size, most_pages, window; /* window 0: none */
    float scale;
} Attention;

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
            vstore(scores + g * span + (p - first) * PAGE + u * VW, vmul(sum[g][u], vset(w->scale)));
    }
    for (int g = 0; g < group; g++) {
        float *s = scores + g * span;
        for (int i = 0; i < from - first * PAGE; i++) s[i] = -INFINITY;
        for (int i = length - first * PAGE; i < span; i++) s[i] = -INFINITY;
        vf most = vset(-INFINITY), sum = vset(0);
        for (int i = 0; i < span; i += VW) most = vmax(most, vload(s + i));
        most = vset(vlargest(most));
        for (int i = 0; i < span; i += VW) {
            vf e = vexp(vsub(vload(s + i), most));
            vstore(s + i, e);
        }
        for (int i = 0; i < from - first * PAGE; i++) s[i] = 0;
        for (int i = length - first * PAGE; i < span; i++) s[i] = 0;
        for (int i = 0; i < span; i += VW) {
            sum = vadd(sum, vload(s + i));
            vstore_bf16(weights + g * span + i, vload(s + i));
        }
        inverse[g] = 1.0f / vsum(sum);
    }
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

static void attend_rows(void *argument, int worker, int workers) {
    const Attention *w = argument;
    int each = w->heads / w->kv_heads, from, to;
    share(w->rows * w->kv_heads, worker, workers, &from, &to);
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

EXPORT void ds_attention(const Attention *work) { parallel(attend_rows, (void *)work); }

typedef struct {
    const float *y; /* [T, 2·size]: gate, up */
    u16 *out;
    long ldy, ldout;
    int rows, size;
} Gated;

static void gate_rows(void *argument, int worker, int workers) {
    const Gated *w = argument;
    int from, to;
    share(w->rows * (w->size / VW), worker, workers, &from, &to);
    for (int item = from; item < to; item++) {
        long row = item / (w->size / VW);
        int i = item % (w->size / VW) * VW;
        vf gate = vload(w->y + row * w->ldy + i), up = vload(w->y + row * w->ldy + w->size + i);
        vf sigmoid = vdiv(vset(1), vadd(vset(1), vexp(vsub(vset(0), gate))));
        vstore_bf16(w->out + row * w->ldout + i, vmul(vmul(gate, sigmoid), up));
    }
}

EXPORT void ds_silu_mul(const Gated *work) { parallel(gate_rows, (void *)work); }

/* h float32 [rows, size] = rows `ids` of the embedding, whose tiles [vocabulary/32][size/32][2][16][16][2] the head shares */
EXPORT void ds_embed(const int64_t *ids, const u16 *tiles, int rows, int size, float *h) {
    long blocks = (size + 31) / 32;
    for (int row = 0; row < rows; row++) {
        const u16 *first = tiles + ids[row] / 32 * blocks * PAIR + ids[row] % 32 / 16 * TILE + ids[row] % 16 * 2;
        for (int i = 0; i < size; i++) h[(long)row * size + i] = to_float(first[i / 32 * PAIR + i % 32 / 2 * 32 + i % 2]);
    }
}
