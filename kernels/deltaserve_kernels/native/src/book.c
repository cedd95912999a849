/* Terms of a book: what a code stands for is a place among its rows' projections.

   Projections (inputs.c) are tens of KB for a row: rows of the batch are outside, rows of the weights inside, so that they stay
   in the nearest caches. With lanes, rows of the batch side by side, one place holds the products of all of them.
   Whatever the lanes: total = fma(product, ±gain, total), stage by stage, segment by segment. */
#include "terms.h"

enum { AT_ONCE = VW == 16 ? 8 : 4 }; /* codes of lanes that are added up in registers */

/* 16 codes */
typedef struct {
    u16 place[LANES];
    float gain[LANES]; /* their stage's, under their signs; with lanes only */
    u32 minus;         /* a bit for each whose sign is − */
} Codes;

static inline float gain_of(const Part *part, int stage) { return part->gains ? part->gains[stage] : 1.0f; }

static inline __attribute__((always_inline)) void unpack_of(const Part *part, const u8 *packed, const int bits, int lanes, Codes *codes) {
    u32 index = (1u << (bits - part->is_signed)) - 1;
    for (int k = 0; k < part->stages; k++) {
        vf gain = vset(gain_of(part, k));
        u32 origin = (u32)(k % part->turns) * (index + 1);
        for (int s = 0; s < part->segments; s++, packed += 2 * bits, codes++) {
#if defined(__AVX512F__)
            __m256i code = words16(packed, bits);
            _mm256_storeu_si256((void *)codes->place, _mm256_add_epi16(_mm256_and_si256(code, _mm256_set1_epi16((short)index)), _mm256_set1_epi16((short)origin)));
            codes->minus = part->is_signed ? _mm256_movepi16_mask(_mm256_slli_epi16(code, 16 - bits)) : 0;
#else
            codes->minus = 0;
            for (int lane = 0; lane < LANES; lane++) {
                u32 code = code_at(packed, bits, LANES, lane);
                codes->place[lane] = (u16)((code & index) + origin);
                codes->minus |= (u32)(code > index) << lane;
            }
#endif
            if (lanes > 1) for (int v = 0; v < LANES; v += VW) vstore(codes->gain + v, vflip(gain, codes->minus >> v));
        }
    }
}

/* One product for each of VW places. Half as long as the processor's own gather. */
static inline vf pick(const float *table, const u16 *place) {
    __m128 four[VW / 4];
    for (int i = 0; i < VW / 4; i++, place += 4) {
        four[i] = _mm_load_ss(table + place[0]);
        four[i] = _mm_insert_ps(four[i], _mm_load_ss(table + place[1]), 0x10);
        four[i] = _mm_insert_ps(four[i], _mm_load_ss(table + place[2]), 0x20);
        four[i] = _mm_insert_ps(four[i], _mm_load_ss(table + place[3]), 0x30);
    }
    __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(four[0]), four[1], 1);
#if defined(__AVX512F__)
    __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(four[2]), four[3], 1);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#else
    return low;
#endif
}

/* total[16 · stride] of 16 tiles; `step` floats from a segment's products to the next one's */
static void gather1(const Part *part, const Codes *codes, const float *table, long step, float *total, long stride) {
    vf sum[LANES / VW];
    for (int v = 0; v < LANES / VW; v++) sum[v] = vset(0);
    for (int k = 0; k < part->stages; k++) {
        vf gain = vset(gain_of(part, k));
        for (int s = 0; s < part->segments; s++, codes++)
            for (int v = 0; v < LANES / VW; v++)
                sum[v] = vfma(pick(table + s * step, codes->place + v * VW), vflip(gain, codes->minus >> v * VW), sum[v]);
    }
    float ALIGNED each[LANES];
    for (int v = 0; v < LANES / VW; v++) vstore(stride == 1 ? total + v * VW : each + v * VW, sum[v]);
    if (stride > 1) for (int i = 0; i < LANES; i++) total[i * stride] = each[i];
}

/* total[16 · stride][4] */
static void gather4(const Part *part, const Codes *codes, const float *table, long step, float *total, long stride) {
    for (int from = 0; from < LANES; from += AT_ONCE) {
        const Codes *code = codes;
        __m128 sum[AT_ONCE];
        for (int i = 0; i < AT_ONCE; i++) sum[i] = _mm_setzero_ps();
        for (int k = 0; k < part->stages; k++)
            for (int s = 0; s < part->segments; s++, code++)
                for (int i = 0; i < AT_ONCE; i++) {
                    const float *found = table + s * step + code->place[from + i] * 4;
                    sum[i] = _mm_fmadd_ps(_mm_loadu_ps(found), _mm_set1_ps(code->gain[from + i]), sum[i]);
                }
        for (int i = 0; i < AT_ONCE; i++) _mm_storeu_ps(total + (from + i) * stride, sum[i]);
    }
}

/* total[16 · stride][16] */
static void gather16(const Part *part, const Codes *codes, const float *table, long step, float *total, long stride) {
    for (int from = 0; from < LANES; from += AT_ONCE) {
        const Codes *code = codes;
        vf sum[AT_ONCE][LANES / VW];
        for (int i = 0; i < AT_ONCE; i++) for (int v = 0; v < LANES / VW; v++) sum[i][v] = vset(0);
        for (int k = 0; k < part->stages; k++)
            for (int s = 0; s < part->segments; s++, code++)
                for (int i = 0; i < AT_ONCE; i++) {
                    const float *found = table + s * step + code->place[from + i] * LANES;
                    vf gain = vset(code->gain[from + i]);
                    for (int v = 0; v < LANES / VW; v++) sum[i][v] = vfma(vload(found + v * VW), gain, sum[i][v]);
                }
        for (int i = 0; i < AT_ONCE; i++) for (int v = 0; v < LANES / VW; v++) vstore(total + (from + i) * stride + v * VW, sum[i][v]);
    }
}

/* sum[64][lanes] of rows row … of the part, a multiple of 64; what lies past its rows is anything */
static void gather(const Part *part, const float *input, int lanes, int row, float *sum) {
    int tile = part->tile, count = part->stages * part->segments, wide = LANES * tile;
    int to = (MIN(row + CHUNK, part->rows) + tile - 1) / tile;
    long each = (long)projected(part) * lanes;
    Codes *codes = scratch(7, (size_t)count * sizeof *codes + (size_t)(wide * lanes) * sizeof *sum);
    for (int first = row / tile / LANES * LANES; first < to; first += LANES) {
        const u8 *packed = part->codes + (size_t)(first / LANES) * (size_t)count * 2 * (size_t)part->bits;
        WITH_WIDTH(part->bits, unpack_of(part, packed, bits, lanes, codes))
        int at = first * tile - row; /* in the chunk, or before it */
        float *total = tile == 1 ? sum + at * lanes : (float *)(codes + count);
        for (int r = 0; r < tile; r++)
            (lanes == 1 ? gather1 : lanes == 4 ? gather4 : gather16)(part, codes, input + r * each, tile * each, total + r * lanes, tile * lanes);
        int begin = MAX(0, at), end = MIN(CHUNK, at + wide);
        if (tile > 1) memcpy(sum + begin * lanes, total + (begin - at) * lanes, (size_t)((end - begin) * lanes) * sizeof *sum);
    }
}

/* y[M, from … to] += rows from … to of the part; y points at the part's first row */
void add_book(const Part *part, const float *input, int rows, int from, int to, float *y, long ldy) {
    long each = (long)part->segments * part->tile * projected(part);
    float ALIGNED sum[LANES * CHUNK], ALIGNED beside[LANES * CHUNK];
    for (int m = 0, lanes; m < rows; m += lanes) {
        lanes = lanes_of(part, rows - m);
        int count = MIN(lanes, rows - m);
        for (int row = from / CHUNK * CHUNK; row < to; row += CHUNK) {
            gather(part, input + m * each, lanes, row, lanes > 1 ? beside : sum);
            if (lanes > 1) transpose(beside, lanes, CHUNK, lanes, sum, CHUNK);
            finish_chunk(part, count, row, sum);
            for (int i = 0; i < count; i++) {
                float *at = y + (m + i) * ldy + row;
                for (int j = MAX(0, from - row); j < MIN(CHUNK, to - row); j++) at[j] += sum[i * CHUNK + j];
            }
        }
    }
}
