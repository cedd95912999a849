/* Orthonormal block transforms of activations: Hadamard in Sylvester's order, DCT-II. */
#include "terms.h"

#include <math.h>

#if defined(__AVX512F__)
/* The first four halvings lie within a vector: a lane and its partner, added, or the lane taken from the partner. */
static inline vf within(vf a) {
#define SIGNS(mask) _mm512_mask_blend_ps(mask, vset(1), vset(-1))
    a = vfma(a, SIGNS(0xaaaa), _mm512_permute_ps(a, 0xb1)); /* lane ^ 1 */
    a = vfma(a, SIGNS(0xcccc), _mm512_permute_ps(a, 0x4e)); /* ^ 2 */
    a = vfma(a, SIGNS(0xf0f0), _mm512_shuffle_f32x4(a, a, 0xb1)); /* ^ 4 */
    return vfma(a, SIGNS(0xff00), _mm512_shuffle_f32x4(a, a, 0x4e)); /* ^ 8 */
#undef SIGNS
}

static inline __attribute__((always_inline)) void halve(vf a[16], int vectors, int half) {
#pragma GCC unroll 16
    for (int i = 0; i < vectors; i++)
        if (!(i & half)) {
            vf b = a[i + half];
            a[i + half] = vsub(a[i], b), a[i] = vadd(a[i], b);
        }
}

/* Of up to 16 vectors, in registers. */
static inline __attribute__((always_inline)) void in_registers(int vectors, const float *x, const float *sign, float *out) {
    vf a[16];
#pragma GCC unroll 16
    for (int i = 0; i < vectors; i++) a[i] = within(sign ? vmul(vload(x + i * VW), vload(sign + i * VW)) : vload(x + i * VW));
    if (vectors > 1) halve(a, vectors, 1);
    if (vectors > 2) halve(a, vectors, 2);
    if (vectors > 4) halve(a, vectors, 4);
    if (vectors > 8) halve(a, vectors, 8);
#pragma GCC unroll 16
    for (int i = 0; i < vectors; i++) vstore(out + i * VW, a[i]);
}

static int begin_transform(const float *x, const float *sign, int size, float *out) {
    int block = MIN(size, 16 * VW);
    for (int i = 0; i < size; i += block) {
        const float *s = sign ? sign + i : NULL;
        switch (block / VW) {
        case 0: return 0;
        case 1: in_registers(1, x + i, s, out + i); break;
        case 2: in_registers(2, x + i, s, out + i); break;
        case 4: in_registers(4, x + i, s, out + i); break;
        case 8: in_registers(8, x + i, s, out + i); break;
        default: in_registers(16, x + i, s, out + i);
        }
    }
    return block;
}
#else
static int begin_transform(const float *x, const float *sign, int size, float *out) { (void)x, (void)sign, (void)size, (void)out; return 0; }
#endif

/* out = H · (sign ⊙ x), not normalised; size a power of two; sign may be none, out may be x. */
void walsh_hadamard(const float *x, const float *sign, int size, float *out) {
    int half = begin_transform(x, sign, size, out);
    if (!half) {
        for (int i = 0; i < size; i++) out[i] = sign ? sign[i] * x[i] : x[i];
        for (half = 1; half < MIN(VW, size); half *= 2)
            for (int start = 0; start < size; start += 2 * half)
                for (int i = start; i < start + half; i++) {
                    float a = out[i], b = out[i + half];
                    out[i] = a + b;
                    out[i + half] = a - b;
                }
    }
    for (; 4 * half <= size; half *= 4) /* two halvings at a time */
        for (int start = 0; start < size; start += 4 * half)
            for (int i = start; i < start + half; i += VW) {
                float *at = out + i;
                vf a = vload(at), b = vload(at + half), c = vload(at + 2 * half), d = vload(at + 3 * half);
                vf ab = vadd(a, b), cd = vadd(c, d);
                a = vsub(a, b), c = vsub(c, d);
                vstore(at, vadd(ab, cd));
                vstore(at + half, vadd(a, c));
                vstore(at + 2 * half, vsub(ab, cd));
                vstore(at + 3 * half, vsub(a, c));
            }
    for (; half < size; half *= 2)
        for (int start = 0; start < size; start += 2 * half)
            for (int i = start; i < start + half; i += VW) {
                vf a = vload(out + i), b = vload(out + i + half);
                vstore(out + i, vadd(a, b));
                vstore(out + i + half, vsub(a, b));
            }
}

/* The blocks of a dimension of n that lie in offset … offset + length; x points at `offset`, where a block starts. */
void transform(int kind, int size, const float *dct, const float *tail, int inverse, float *x, int n, int offset, int length) {
    float old[1024];
    for (int at = offset; at < MIN(offset + length, n);) {
        int block = size;
        if (n - at < size) {
            block = n - at;
            if (kind == HADAMARD) while (block & (block - 1)) block &= block - 1; /* its highest power of two */
        }
        float *b = x + at - offset;
        if (kind == HADAMARD) {
            walsh_hadamard(b, NULL, block, b);
            vf scale = vset(1.0f / sqrtf((float)block));
            int i = 0;
            for (; i + VW <= block; i += VW) vstore(b + i, vmul(vload(b + i), scale));
            for (; i < block; i++) b[i] /= sqrtf((float)block);
        } else {
            const float *matrix = block == size ? dct : tail; /* T and Tᵀ, [2, block, block] */
            memcpy(old, b, (size_t)block * sizeof *b);
            memset(b, 0, (size_t)block * sizeof *b);
            for (int j = 0; j < block; j++) {
                const float *line = matrix + (long)j * block + (inverse ? 0 : (long)block * block); /* T, then Tᵀ */
                for (int i = 0; i < block; i++) b[i] += old[j] * line[i];
            }
        }
        at += block;
    }
}
