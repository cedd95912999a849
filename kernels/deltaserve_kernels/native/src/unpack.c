/* Packed codes, as `packing.py` lays them out: lanes of 32 (a pair of columns of 16 rows) or of 16. A code's planes follow
   one another, the lowest bits first; lane i of a plane of w bits is in byte i mod n, shifted by w · (i div n), n its bytes;
   one bit in 32 lanes: bit i. */
#include "common.h"

#if defined(__AVX512F__)
static inline __m512i shifts16(int width) {
    static const u16 ALIGNED table[3][32] = {
        {0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4, 6, 6, 6, 6, 6, 6, 6, 6},
        {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4},
        {0}};
    return _mm512_load_si512(table[width == 2 ? 0 : width == 4 ? 1 : 2]);
}

static inline __m512i plane32(const u8 *p, int width) {
    if (width == 1) {
        u32 mask;
        memcpy(&mask, p, 4);
        return _mm512_maskz_set1_epi16(mask, 1);
    }
    __m256i bytes;
    if (width == 2) bytes = _mm256_set1_epi64x(*(const int64_t *)p);
    else if (width == 4) bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)p));
    else return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)p));
    __m512i words = _mm512_srlv_epi16(_mm512_cvtepu8_epi16(bytes), shifts16(width));
    return _mm512_and_si512(words, _mm512_set1_epi16((short)((1 << width) - 1)));
}

static inline __attribute__((always_inline)) __m512i codes32(const u8 *p, int bits) {
    __m512i code = _mm512_setzero_si512();
    int done = 0;
    for (int i = 0; i < 4; i++)
        if (PLANES[i] <= bits - done) {
            code = _mm512_or_si512(code, _mm512_slli_epi16(plane32(p, PLANES[i]), (unsigned)done));
            p += 4 * PLANES[i];
            done += PLANES[i];
        }
    return code;
}

static void unpack_signs(const u8 *codes, const u16 *table, int groups, u16 *out) {
    __m512i zero = _mm512_set1_epi16((short)table[0]), one = _mm512_set1_epi16((short)table[1]);
    for (int g = 0; g < groups; g++) {
        u32 mask;
        memcpy(&mask, codes + 4 * g, 4);
        _mm512_storeu_si512(out + 32 * g, _mm512_mask_blend_epi16(mask, zero, one));
    }
}

static inline __attribute__((always_inline)) void unpack_of(
    int bits, const u8 *codes, const u16 *table, int groups, u16 *out) {
    __m512i t[8];
    for (int i = 0; i < (bits <= 5 ? 1 : 1 << (bits - 5)); i++) t[i] = _mm512_loadu_si512(table + i * 32);
    for (int g = 0; g < groups; g++, codes += 4 * bits, out += 32) {
        __m512i code = codes32(codes, bits), value;
        if (bits <= 5) value = _mm512_permutexvar_epi16(code, t[0]);
        else {
            value = _mm512_permutex2var_epi16(t[0], code, t[1]);
            if (bits > 6) {
                __mmask32 second = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
                value = _mm512_mask_mov_epi16(value, second, _mm512_permutex2var_epi16(t[2], code, t[3]));
            }
            if (bits > 7) {
                __mmask32 second = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
                __m512i upper = _mm512_permutex2var_epi16(t[4], code, t[5]);
                upper = _mm512_mask_mov_epi16(upper, second, _mm512_permutex2var_epi16(t[6], code, t[7]));
                value = _mm512_mask_mov_epi16(value, _mm512_test_epi16_mask(code, _mm512_set1_epi16(128)), upper);
            }
        }
        _mm512_storeu_si512(out, value);
    }
}

#if !defined(__AMX_BF16__) /* whose products add in another order: a row must not see how many there are */
static inline __attribute__((always_inline)) void few_rows(
    const int bits, const int rows, const int pairs, const u8 *codes, size_t stride, const u16 *table, int blocks, const u16 *x,
    long ldx, float *y, long ldy) {
    const __m512i first = bits == 1 ? _mm512_set1_epi16((short)table[0]) : _mm512_loadu_si512(table);
    const __m512i second = _mm512_set1_epi16((short)table[1]);
    vf sum[4][4];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * pairs; v++) sum[m][v] = vload(y + m * ldy + v * VW);
    for (int k = 0; k < blocks; k++) {
        for (int line = 0; line < 2 * bits * pairs; line++) /* 16 KB ahead: the next chunks, whose codes follow */
            _mm_prefetch((const char *)codes + (size_t)(k * pairs * 2 * bits + line) * 64 + 16384, _MM_HINT_T1);
        for (int pair = 0; pair < 16; pair++) {
            vpairs w[4];
#pragma GCC unroll 4
            for (int v = 0; v < 2 * pairs; v++) {
                const u8 *p = codes + (size_t)(v / 2) * stride + (size_t)((k * 2 + v % 2) * 16 + pair) * 4 * (size_t)bits;
                u32 mask;
                memcpy(&mask, p, 4);
                w[v] = bits == 1 ? _mm512_mask_blend_epi16(mask, first, second) : _mm512_permutexvar_epi16(codes32(p, bits), first);
            }
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                vpairs a = vset_pair(x + m * ldx + k * 32 + pair * 2);
#pragma GCC unroll 4
                for (int v = 0; v < 2 * pairs; v++) sum[m][v] = vdot(sum[m][v], w[v], a);
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * pairs; v++) vstore(y + m * ldy + v * VW, sum[m][v]);
}

/* One instance for each number of rows and of blocks, so that sums stay in registers. */
static inline __attribute__((always_inline)) void few_of(
    const int bits, int rows, int pairs, const u8 *codes, size_t stride, const u16 *table, int blocks, const u16 *x, long ldx,
    float *y, long ldy) {
    for (int m = 0, n; m < rows; m += n, x += n * ldx, y += n * ldy) {
        n = rows - m >= 4 ? 4 : rows - m >= 2 ? 2 : 1;
        if (pairs == 1) {
            if (n == 4) few_rows(bits, 4, 1, codes, stride, table, blocks, x, ldx, y, ldy);
            else if (n == 2) few_rows(bits, 2, 1, codes, stride, table, blocks, x, ldx, y, ldy);
            else few_rows(bits, 1, 1, codes, stride, table, blocks, x, ldx, y, ldy);
        } else if (n == 4) few_rows(bits, 4, 2, codes, stride, table, blocks, x, ldx, y, ldy);
        else if (n == 2) few_rows(bits, 2, 2, codes, stride, table, blocks, x, ldx, y, ldy);
        else few_rows(bits, 1, 2, codes, stride, table, blocks, x, ldx, y, ldy);
    }
}

int product_of_codes(const u8 *codes, size_t stride, int pairs, int bits, const u16 *table, int blocks, const u16 *x, long ldx,
                     int rows, float *y, long ldy) {
    if (rows > 4) return 0;
    switch (bits) {
    case 1: few_of(1, rows, pairs, codes, stride, table, blocks, x, ldx, y, ldy); return 1;
    case 2: few_of(2, rows, pairs, codes, stride, table, blocks, x, ldx, y, ldy); return 1;
    case 4: few_of(4, rows, pairs, codes, stride, table, blocks, x, ldx, y, ldy); return 1;
    default: return 0;
    }
}
#define FEW
#endif

/* table[max(32, 2^bits)] */
void unpack_bf16(const u8 *codes, int bits, const u16 *table, int groups, u16 *out) {
    switch (bits) {
    case 1: unpack_signs(codes, table, groups, out); break;
    case 2: unpack_of(2, codes, table, groups, out); break;
    case 3: unpack_of(3, codes, table, groups, out); break;
    case 4: unpack_of(4, codes, table, groups, out); break;
    case 5: unpack_of(5, codes, table, groups, out); break;
    case 6: unpack_of(6, codes, table, groups, out); break;
    case 7: unpack_of(7, codes, table, groups, out); break;
    default: unpack_of(8, codes, table, groups, out);
    }
}

#else
void unpack_bf16(const u8 *codes, int bits, const u16 *table, int groups, u16 *out) {
    for (int g = 0; g < groups; g++, codes += 4 * bits, out += 32)
        for (int i = 0; i < 32; i++) out[i] = table[code_at(codes, bits, 32, i)];
}
#endif

#if !defined(FEW)
int product_of_codes(const u8 *codes, size_t stride, int pairs, int bits, const u16 *table, int blocks, const u16 *x, long ldx,
                     int rows, float *y, long ldy) {
    (void)codes, (void)stride, (void)pairs, (void)bits, (void)table, (void)blocks, (void)x, (void)ldx, (void)rows, (void)y, (void)ldy;
    return 0;
}
#endif
