/* Orthonormal block transforms of activations: Hadamard in Sylvester's order, DCT-II. */
#include "terms.h"

#include <math.h>

#if defined(__AVX512F__)
/* The first four halvings lie within a vector: a lane and its partner, added, or the lane taken from the partner. */
static inline vf within(vf a) {
    const __m512i one = _mm512_castps_si512(vset(-0.0f));
    vf b = _mm512_permute_ps(a, 0xb1); /* lane ^ 1 */
    a = vadd(b, _mm512_castsi512_ps(_mm512_mask_xor_epi32(_mm512_castps_si512(a), 0xaaaa, _mm512_castps_si512(a), one)));
    b = _mm512_permute_ps(a, 0x4e); /* ^ 2 */
    a = vadd(b, _mm512_castsi512_ps(_mm512_mask_xor_epi32(_mm512_castps_si512(a), 0xcccc, _mm512_castps_si512(a), one)));
    b = _mm512_shuffle_f32x4(a, a, 0xb1); /* ^ 4 */
    a = vadd(b, _mm512_castsi512_ps(_mm512_mask_xor_epi32(_mm512_castps_si512(a), 0xf0f0, _mm512_castps_si512(a), one)));
    b = _mm512_shuffle_f32x4(a, a, 0x4e); /* ^ 8 */
    return vadd(b, _mm512_castsi512_ps(_mm512_mask_xor_epi32(_mm512_castps_si512(a), 0xff00, _mm512_castps_si512(a), one)));
}
#endif

/* In place, not normalised; size a power of two. Two halvings at a time. */
void walsh_hadamard(float *x, int size) {
    int half = 1;
#if defined(__AVX512F__)
    if (size >= VW) {
        for (int i = 0; i < size; i += VW) vstore(x + i, within(vload(x + i)));
        half = VW;
    }
#endif
    for (; half < MIN(VW, size); half *= 2)
        for (int start = 0; start < size; start += 2 * half)
            for (int i = start; i < start + half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    for (; 4 * half <= size; half *= 4)
        for (int start = 0; start < size; start += 4 * half)
            for (int i = start; i < start + half; i += VW) {
                vf a = vload(x + i), b = vload(x + i + half), c = vload(x + i + 2 * half), d = vload(x + i + 3 * half);
                vf ab = vadd(a, b), cd = vadd(c, d);
                a = vsub(a, b), c = vsub(c, d);
                vstore(x + i, vadd(ab, cd));
                vstore(x + i + half, vadd(a, c));
                vstore(x + i + 2 * half, vsub(ab, cd));
                vstore(x + i + 3 * half, vsub(a, c));
            }
    for (; half < size; half *= 2)
        for (int start = 0; start < size; start += 2 * half)
            for (int i = start; i < start + half; i += VW) {
                vf a = vload(x + i), b = vload(x + i + half);
                vstore(x + i, vadd(a, b));
                vstore(x + i + half, vsub(a, b));
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
            walsh_hadamard(b, block);
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
