/* What a Llama-like decoder does beside its linear layers and attention: norms, rotary embedding, gated activation. */
#include "common.h"

#include <math.h>

enum { PAGE = 16, LARGEST_HEAD = 256 };

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

static void norm_rows(void *argument, int piece, int pieces) {
    const Norm *w = argument;
    for (int r = 0; r < w->runs; r++) {
        const u16 *weight = w->run[r].weights[w->index];
        int from, to;
        share(w->run[r].rows, piece, pieces, &from, &to);
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

static void rotate_rows(void *argument, int piece, int pieces) {
    const Rotary *w = argument;
    int size = w->size, half = size / 2, from, to;
    float x[LARGEST_HEAD], t[LARGEST_HEAD];
    share(w->rows, piece, pieces, &from, &to);
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
    const float *y; /* [T, 2·size]: gate, up */
    u16 *out;
    long ldy, ldout;
    int rows, size;
} Gated;

static void gate_rows(void *argument, int piece, int pieces) {
    const Gated *w = argument;
    int from, to;
    share(w->rows * (w->size / VW), piece, pieces, &from, &to);
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
