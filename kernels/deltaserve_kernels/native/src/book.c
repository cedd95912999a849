/* Terms of a book: what a code stands for is a place among its row's projections.

   A row's projections (inputs.c) are tens of KB: rows come one after the other, each over many rows of weights, so that they
   stay in the first-level cache; codes are unpacked once for all rows of a run. */
#include "terms.h"

enum { BLOCK = 1 << 14 }; /* codes unpacked at once */

/* sum[64] of rows row … of the part; `codes` unpacked: 16 tiles at a time from tile `lane0` on, `count` of each */
static void gather(const Part *part, const float *own, const int32_t *codes, int lane0, int row, float *sum) {
    int each = projected(part), index = (1 << (part->bits - part->is_signed)) - 1, count = part->stages * part->segments;
    int to = (MIN(row + CHUNK, part->rows) + part->tile - 1) / part->tile;
    for (int first = row / part->tile / LANES * LANES; first < to; first += LANES)
        for (int r = 0; r < part->tile; r++) {
            const int32_t *code = codes + (long)(first - lane0) * count;
#if defined(__AVX512F__)
            const __m512i minus = _mm512_set1_epi32(part->is_signed ? INT32_MIN : 0), mask = _mm512_set1_epi32(index);
            vf total = vset(0);
            for (int k = 0; k < part->stages; k++) {
                const __m512i gain = _mm512_castps_si512(vset(part->gains ? part->gains[k] : 1.0f));
                const float *table = own + (long)r * each;
                for (int s = 0; s < part->segments; s++, code += LANES, table += (long)part->tile * each) {
                    __m512i c = _mm512_load_si512(code);
                    __m512i flip = _mm512_and_si512(_mm512_slli_epi32(c, 32 - (unsigned)part->bits), minus);
                    vf found = _mm512_i32gather_ps(_mm512_and_si512(c, mask), table, 4);
                    total = vfma(found, _mm512_castsi512_ps(_mm512_xor_si512(gain, flip)), total);
                }
            }
            if (part->tile == 1) {
                vstore(sum + first - row, total);
                continue;
            }
            const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            __m512i at = _mm512_mullo_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(first)), _mm512_set1_epi32(part->tile));
            at = _mm512_add_epi32(at, _mm512_set1_epi32(r - row));
            _mm512_mask_i32scatter_ps(sum, _mm512_cmplt_epu32_mask(at, _mm512_set1_epi32(CHUNK)), at, total, 4);
#else
            for (int lane = 0; lane < MIN(LANES, to - first); lane++) {
                int at = (first + lane) * part->tile + r - row; /* of the chunk */
                if (at < 0 || at >= CHUNK) continue;
                float total = 0;
                for (int i = 0; i < count; i++) {
                    int32_t c = code[i * LANES + lane];
                    float gain = part->gains ? part->gains[i / part->segments] : 1.0f;
                    float found = own[((long)(i % part->segments) * part->tile + r) * each + (c & index)];
                    total = __builtin_fmaf(found, part->is_signed && c > index ? -gain : gain, total);
                }
                sum[at] = total;
            }
#endif
        }
}

static inline __attribute__((always_inline)) void unpack_of(const u8 *codes, const int bits, int count, int32_t *out) {
    for (int i = 0; i < count; i++) unpack_ints(codes + (size_t)i * 2 * (size_t)bits, bits, out + i * LANES);
}

/* y[M, from … to] += rows from … to of the part; y points at the part's first row */
void add_book(const Part *part, const float *projections, int rows, int from, int to, float *y, long ldy) {
    int count = part->stages * part->segments, tiles = (part->rows + part->tile - 1) / part->tile;
    int chunks = MAX(1, BLOCK / count * part->tile / CHUNK);
    long stride = (long)part->segments * part->tile * projected(part);
    float ALIGNED sum[CHUNK];
    for (int block = from / CHUNK * CHUNK; block < to; block += chunks * CHUNK) {
        int end = MIN(block + chunks * CHUNK, to);
        int last = MIN(tiles, (ROUND_UP(end, CHUNK) - 1) / part->tile + 1); /* T_out⁻¹ turns whole chunks */
        int lane0 = block / part->tile / LANES * LANES, groups = (last - lane0 + LANES - 1) / LANES;
        const u8 *packed = part->codes + (size_t)(lane0 / LANES) * (size_t)count * 2 * (size_t)part->bits;
        int32_t *codes = scratch(7, (size_t)(groups * count * LANES) * sizeof *codes);
        WITH_WIDTH(part->bits, unpack_of(packed, bits, groups * count, codes))
        for (int m = 0; m < rows; m++)
            for (int row = block; row < end; row += CHUNK) {
                gather(part, projections + m * stride, codes, lane0, row, sum);
                finish_chunk(part, 1, row, sum);
                float *at = y + m * ldy + row;
                for (int j = MAX(0, from - row); j < MIN(CHUNK, end - row); j++) at[j] += sum[j];
            }
    }
}
