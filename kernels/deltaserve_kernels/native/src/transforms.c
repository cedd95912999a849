/* Orthonormal block transforms of activations: Hadamard in Sylvester's order, DCT-II. */
#include "terms.h"

#include <math.h>

/* Rows may lie side by side, as `lanes`: then the first halvings, those within a row of lanes, are left out. */
#if defined(__AVX512F__)
static inline __attribute__((always_inline)) vf load_signed(const float *x, const float *sign, int at, int lanes) {
    vf a = vload(x + at);
    if (!sign) return a;
    if (lanes == 1) return vmul(a, vload(sign + at));
    if (lanes == 16) return vmul(a, vset(sign[at / 16]));
    const __m512i fourth = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return vmul(a, _mm512_permutexvar_ps(fourth, _mm512_castps128_ps512(_mm_loadu_ps(sign + at / 4))));
}

/* The halvings that lie within a vector: a lane and its partner, added, or the lane taken from the partner. */
static inline __attribute__((always_inline)) vf within(vf a, int lanes) {
#define SIGNS(mask) _mm512_mask_blend_ps(mask, vset(1), vset(-1))
    if (lanes == 1) {
        a = vfma(a, SIGNS(0xaaaa), _mm512_permute_ps(a, 0xb1)); /* lane ^ 1 */
        a = vfma(a, SIGNS(0xcccc), _mm512_permute_ps(a, 0x4e)); /* ^ 2 */
    }
    if (lanes <= 4) {
        a = vfma(a, SIGNS(0xf0f0), _mm512_shuffle_f32x4(a, a, 0xb1)); /* ^ 4 */
        a = vfma(a, SIGNS(0xff00), _mm512_shuffle_f32x4(a, a, 0x4e)); /* ^ 8 */
    }
    return a;
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
static inline __attribute__((always_inline)) void in_registers(int vectors, const float *x, const float *sign, int lanes, float *out) {
    vf a[16];
#pragma GCC unroll 16
    for (int i = 0; i < vectors; i++) a[i] = within(load_signed(x, sign, i * VW, lanes), lanes);
    if (vectors > 1) halve(a, vectors, 1);
    if (vectors > 2) halve(a, vectors, 2);
    if (vectors > 4) halve(a, vectors, 4);
    if (vectors > 8) halve(a, vectors, 8);
#pragma GCC unroll 16
    for (int i = 0; i < vectors; i++) vstore(out + i * VW, a[i]);
}

/* → the half that comes next; 0: nothing was done */
static inline __attribute__((always_inline)) int begin_transform(const float *x, const float *sign, int floats, int lanes, float *out) {
    int block = MIN(floats, 16 * VW);
    for (int i = 0; i < floats; i += block) {
        const float *s = sign ? sign + i / lanes : NULL;
        switch (block / VW) {
        case 0: return 0;
        case 1: in_registers(1, x + i, s, lanes, out + i); break;
        case 2: in_registers(2, x + i, s, lanes, out + i); break;
        case 4: in_registers(4, x + i, s, lanes, out + i); break;
        case 8: in_registers(8, x + i, s, lanes, out + i); break;
        default: in_registers(16, x + i, s, lanes, out + i);
        }
    }
    return block;
}
#else
static int begin_transform(const float *x, const float *sign, int floats, int lanes, float *out) {
    (void)x, (void)sign, (void)floats, (void)lanes, (void)out;
    return 0;
}
#endif

static inline __attribute__((always_inline)) void turn(const float *x, const float *sign, int floats, const int lanes, float *out) {
    int half = begin_transform(x, sign, floats, lanes, out);
    if (!half) {
        for (int i = 0; i < floats; i++) out[i] = sign ? sign[i / lanes] * x[i] : x[i];
        for (half = lanes; half < MIN(VW, floats); half *= 2)
            for (int start = 0; start < floats; start += 2 * half)
                for (int i = start; i < start + half; i++) {
                    float a = out[i], b = out[i + half];
                    out[i] = a + b;
                    out[i + half] = a - b;
                }
    }
    for (; 4 * half <= floats; half *= 4) /* two halvings at a time */
        for (int start = 0; start < floats; start += 4 * half)
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
    for (; half < floats; half *= 2)
        for (int start = 0; start < floats; start += 2 * half)
            for (int i = start; i < start + half; i += VW) {
                vf a = vload(out + i), b = vload(out + i + half);
                vstore(out + i, vadd(a, b));
                vstore(out + i + half, vsub(a, b));
            }
}

/* out = H · (sign ⊙ x), not normalised, of each of `lanes` columns; x [size, lanes]; size a power of two; lanes 1, 4 or 16;
   sign [size] or none; out may be x. The bits do not depend on lanes. */
void walsh_hadamard(const float *x, const float *sign, int size, int lanes, float *out) {
    if (lanes == 1) turn(x, sign, size, 1, out);
    else if (lanes == 4) turn(x, sign, size * 4, 4, out);
    else turn(x, sign, size * 16, 16, out);
}

/* to[j, i] = from[i, j], of [rows, cols] */
void transpose(const float *from, long ldfrom, int rows, int cols, float *to, long ldto) {
    int i = 0;
    for (; i + 4 <= rows; i += 4) {
        const float *a = from + i * ldfrom;
        int j = 0;
        for (; j + 4 <= cols; j += 4) {
            __m128 p = _mm_loadu_ps(a + j), q = _mm_loadu_ps(a + ldfrom + j), r = _mm_loadu_ps(a + 2 * ldfrom + j);
            __m128 s = _mm_loadu_ps(a + 3 * ldfrom + j);
            _MM_TRANSPOSE4_PS(p, q, r, s);
            float *b = to + j * ldto + i;
            _mm_storeu_ps(b, p), _mm_storeu_ps(b + ldto, q), _mm_storeu_ps(b + 2 * ldto, r), _mm_storeu_ps(b + 3 * ldto, s);
        }
        for (; j < cols; j++) for (int k = 0; k < 4; k++) to[j * ldto + i + k] = a[k * ldfrom + j];
    }
    for (; i < rows; i++) for (int j = 0; j < cols; j++) to[j * ldto + i] = from[i * ldfrom + j];
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
            walsh_hadamard(b, NULL, block, 1, b);
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
