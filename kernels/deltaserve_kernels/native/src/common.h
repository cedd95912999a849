/* Types and vectors of the native library. One source, built once for each instruction set: amx, avx512, avx2. */
#ifndef DELTASERVE_COMMON_H
#define DELTASERVE_COMMON_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16; /* also: bfloat16 */
typedef uint32_t u32;
typedef uint64_t u64;

#define EXPORT __attribute__((visibility("default")))
#define ALIGNED __attribute__((aligned(64)))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))

enum { LANES = 16, TILE = 512, PAIR = 2 * TILE, CHUNK = 64 }; /* bf16 of a tile of 16 rows × 32 columns; rows of a chunk */

/* vf: one vector of floats. vdot: acc += a · b for pairs of bfloat16 in each lane. */
#if defined(__AVX512F__)
typedef __m512 vf;
enum { VW = 16 };
static inline vf vload(const float *p) { return _mm512_loadu_ps(p); }
static inline void vstore(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline vf vset(float a) { return _mm512_set1_ps(a); }
static inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vround(vf a) { return _mm512_roundscale_ps(a, 0); }
static inline float vsum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float vlargest(vf a) { return _mm512_reduce_max_ps(a); }
static inline vf vpow2(vf n) { return _mm512_scalef_ps(vset(1), n); }
static inline vf vload_bf16(const u16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
static inline __m256i vnarrow(vf a) { /* to bfloat16, nearest even */
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(a);
#else
    __m512i u = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    u = _mm512_mask_set1_epi32(u, nan, 0x7fc00000);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16));
#endif
}
static inline void vstore_bf16(u16 *p, vf a) { _mm256_storeu_si256((void *)p, vnarrow(a)); }
static inline vf vflip(vf a, u32 lanes) { /* the signs of those lanes */
    __m512i u = _mm512_castps_si512(a);
    return _mm512_castsi512_ps(_mm512_mask_xor_epi32(u, (__mmask16)lanes, u, _mm512_set1_epi32(INT32_MIN)));
}
typedef __m512i vpairs;
static inline vpairs vload_pairs(const u16 *p) { return _mm512_loadu_si512(p); }
static inline vpairs vset_pair(const u16 *p) { u32 w; memcpy(&w, p, 4); return _mm512_set1_epi32((int)w); }
static inline vpairs vfirst(vpairs a) { return _mm512_and_si512(a, _mm512_set1_epi32(0xffff)); } /* the second of each pair: 0 */
static inline vf vdot(vf acc, vpairs a, vpairs b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    acc = vfma(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), acc);
    return vfma(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), acc);
#endif
}
#else
typedef __m256 vf;
enum { VW = 8 };
static inline vf vload(const float *p) { return _mm256_loadu_ps(p); }
static inline void vstore(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline vf vset(float a) { return _mm256_set1_ps(a); }
static inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vround(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline float vsum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float vlargest(vf a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline vf vpow2(vf n) { /* n whole, within −126 … 127 */
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
static inline vf vflip(vf a, u32 lanes) { /* the signs of those lanes */
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i told = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)lanes), bit), bit);
    return _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(told, 31)));
}
static inline vf vload_bf16(const u16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
static inline void vstore_bf16(u16 *p, vf a) {
    __m256i u = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    u = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    u = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(u), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan));
    u = _mm256_srli_epi32(u, 16);
    _mm_storeu_si128((void *)p, _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1)));
}
typedef __m256i vpairs;
static inline vpairs vload_pairs(const u16 *p) { return _mm256_loadu_si256((const void *)p); }
static inline vpairs vset_pair(const u16 *p) { u32 w; memcpy(&w, p, 4); return _mm256_set1_epi32((int)w); }
static inline vpairs vfirst(vpairs a) { return _mm256_and_si256(a, _mm256_set1_epi32(0xffff)); }
static inline vf vdot(vf acc, vpairs a, vpairs b) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    acc = vfma(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), acc);
    return vfma(_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high)), acc);
}
#endif

static inline float to_float(u16 a) { u32 u = (u32)a << 16; float f; memcpy(&f, &u, 4); return f; }
static inline u16 to_bf16(float a) {
    u32 u;
    memcpy(&u, &a, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline vf vexp(vf x) { /* relative error below 3e-6 */
    x = vmax(x, vset(-87.0f));
    vf t = vmul(x, vset(1.44269504f)), n = vround(t), f = vsub(t, n), p = vset(1.33335581e-3f);
    p = vfma(p, f, vset(9.61812911e-3f));
    p = vfma(p, f, vset(5.55041087e-2f));
    p = vfma(p, f, vset(2.40226507e-1f));
    p = vfma(p, f, vset(6.93147181e-1f));
    return vmul(vfma(p, f, vset(1.0f)), vpow2(n));
}

/* pool.c */
typedef void (*Job)(void *argument, int piece, int pieces);
void parallel(Job job, void *argument);
int threads(void); /* that a job may have */
static inline void share(int count, int piece, int pieces, int *from, int *to) {
    *from = (int)((long)count * piece / pieces);
    *to = (int)((long)count * (piece + 1) / pieces);
}
/* A buffer of this thread, at least `bytes` long; `slot` tells those in use at once apart. */
enum { SLOTS = 9 };
void *scratch(int slot, size_t bytes);

/* product.c: y[M, 32] (+)= x[M, 32·blocks] · two columns of tiles; tiles [blocks][2][16 pairs of k][16 n][2] */
#if defined(__AMX_BF16__)
void shape_tiles(const u8 rows[8], const u8 bytes[8]); /* of this thread's eight tiles; bytes of a row */
#endif
void begin_products(void); /* on each thread, before and after its products: torch uses the same tiles */
void end_products(void);
void product(const u16 *x, long ldx, int rows, const u16 *tiles, int blocks, float *y, long ldy, int add);

/* unpack.c: 32 codes as bfloat16 of a look-up table */
void unpack_bf16(const u8 *codes, int bits, const u16 *table, int groups, u16 *out);
/* y[M, 32 · pairs] += x[M, 32 · blocks] · codes, looked up in registers; `stride` bytes from one 32 rows to the next, of which
   there are one or two. → 0, and nothing done: not for so many rows or bits. */
int product_of_codes(const u8 *codes, size_t stride, int pairs, int bits, const u16 *table, int blocks, const u16 *x, long ldx,
                     int rows, float *y, long ldy);

static const int PLANES[] = {8, 4, 2, 1};

static inline u32 code_at(const u8 *p, int bits, int lanes, int lane) {
    u32 code = 0;
    int done = 0;
    for (int i = 0; i < 4; i++)
        for (int width = PLANES[i]; width <= bits - done; done += width, p += lanes * width / 8) {
            int bytes = lanes * width / 8;
            int byte = width == 1 && lanes == 32 ? lane / 8 : lane % bytes;
            int shift = width == 1 && lanes == 32 ? lane % 8 : lane / bytes * width;
            code |= (u32)(p[byte] >> shift & ((1 << width) - 1)) << done;
        }
    return code;
}

/* 16 codes of up to 16 bits, and as integers */
#if defined(__AVX512F__)
static inline __attribute__((always_inline)) __m256i plane16(const u8 *p, int width) {
    const __m256i lane = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (width == 8) return _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)p));
    __m128i bytes = width == 4   ? _mm_set1_epi64x(*(const int64_t *)p)
                    : width == 2 ? _mm_set1_epi32(*(const int32_t *)p)
                                 : _mm_set1_epi16(*(const short *)p); /* 2·width of them, repeated to 16 */
    int log = width == 4 ? 3 : width == 2 ? 2 : 1, each = width == 4 ? 2 : width == 2 ? 1 : 0;
    __m256i shift = _mm256_slli_epi16(_mm256_srli_epi16(lane, log), each);
    return _mm256_and_si256(_mm256_srlv_epi16(_mm256_cvtepu8_epi16(bytes), shift), _mm256_set1_epi16((short)((1 << width) - 1)));
}

static inline __attribute__((always_inline)) __m256i words16(const u8 *p, int bits) {
    __m256i code = _mm256_setzero_si256();
    if (bits >= 8) code = plane16(p, 8);
    if (bits >= 16) code = _mm256_or_si256(code, _mm256_slli_epi16(plane16(p + 16, 8), 8));
    if (bits & 4) code = _mm256_or_si256(code, _mm256_slli_epi16(plane16(p + 2 * (bits & ~7), 4), bits & ~7));
    if (bits & 2) code = _mm256_or_si256(code, _mm256_slli_epi16(plane16(p + 2 * (bits & ~3), 2), bits & ~3));
    if (bits & 1) code = _mm256_or_si256(code, _mm256_slli_epi16(plane16(p + 2 * (bits & ~1), 1), bits & ~1));
    return code;
}
#endif

static inline __attribute__((always_inline)) void unpack_ints(const u8 *p, int bits, int32_t out[LANES]) {
#if defined(__AVX512F__)
    _mm512_storeu_si512(out, _mm512_cvtepu16_epi32(words16(p, bits)));
#else
    for (int i = 0; i < LANES; i++) out[i] = (int32_t)code_at(p, bits, LANES, i);
#endif
}

/* `call` with `width` a constant, so that the planes of a code are known when it is compiled */
#define WITH_WIDTH(width, call) \
    switch (width) { \
    case 3: { enum { bits = 3 }; call; break; } \
    case 4: { enum { bits = 4 }; call; break; } \
    case 5: { enum { bits = 5 }; call; break; } \
    case 6: { enum { bits = 6 }; call; break; } \
    case 8: { enum { bits = 8 }; call; break; } \
    case 12: { enum { bits = 12 }; call; break; } \
    default: { int bits = width; call; } \
    }

#endif
