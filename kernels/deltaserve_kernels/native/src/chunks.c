/* 64 rows of a term times the activations of a run: one function for each kind of packed weights. */
#include "terms.h"

enum { BLOCKS = 4 }; /* column blocks of 32 that are unpacked before they are multiplied */

/* table values times group_scale [32], in place; one block of 32 columns by 32 rows */
static void scale_block(const Part *part, int pair_rows, int block, u16 *tiles) {
    int groups = (part->cols + part->group - 1) / part->group;
    const float *scales = part->group_scale + (size_t)pair_rows * (size_t)groups * 32;
    for (int half = 0; half < 2; half++)
        for (int pair = 0; pair < 16; pair++) {
            int k = block * 32 + pair * 2, g = MIN(k / part->group, groups - 1);
            const float *scale = scales + g * 32 + half * 16;
            u16 *line = tiles + half * TILE + pair * 32;
            for (int i = 0; i < 32; i++) line[i] = to_bf16(to_float(line[i]) * scale[i / 2]);
        }
}

static void coded(const Part *part, const u16 *x, int rows, int row, float *sum) {
    int blocks = (part->cols + 31) / 32;
    size_t stride = (size_t)blocks * 32 * 4 * (size_t)part->bits;
    u16 ALIGNED tiles[BLOCKS * PAIR];
    if (!part->group_scale && product_of_codes(part->codes + (size_t)(row / 32) * stride, stride, row + 32 < part->rows ? 2 : 1,
                                               part->bits, part->table, blocks, x, width_of(part), rows, sum, CHUNK))
        return;
    for (int half = 0; half < 2 && row + 32 * half < part->rows; half++) {
        int pair_rows = row / 32 + half;
        const u8 *codes = part->codes + (size_t)pair_rows * stride;
        for (int block = 0; block < blocks; block += BLOCKS) {
            int count = MIN(BLOCKS, blocks - block);
            unpack_bf16(codes, part->bits, part->table, count * 32, tiles);
            codes += (size_t)count * 32 * 4 * (size_t)part->bits;
            if (part->group_scale) for (int b = 0; b < count; b++) scale_block(part, pair_rows, block + b, tiles + b * PAIR);
            product(x + block * 32, width_of(part), rows, tiles, count, sum + 32 * half, CHUNK, 1);
        }
    }
}

static void dense(const Part *part, const u16 *x, int rows, int row, float *sum) {
    int blocks = (part->cols + 31) / 32;
    size_t stage = (size_t)((part->rows + 31) / 32) * (size_t)blocks * PAIR;
    for (int half = 0; half < 2 && row + 32 * half < part->rows; half++)
        for (int k = 0; k < part->stages; k++) {
            const u16 *tiles = part->table + (size_t)k * stage + (size_t)(row / 32 + half) * (size_t)blocks * PAIR;
            product(x, width_of(part), rows, tiles, blocks, sum + 32 * half, CHUNK, 1);
        }
}

/* `tile` rows, a multiple of 64, share their columns: a small matrix that is not sparse, and its activations. */
static void shared(const Part *part, const u16 *x, int rows, int row, float *sum) {
    Part inner = *part;
    inner.cols = part->survivors;
    long width = width_of(&inner), ldx = width_of(part);
    const int32_t *columns = part->starts + (long)(row / part->tile) * part->survivors;
    u16 *own = scratch(7, (size_t)(rows * width) * sizeof *own);
    for (int m = 0; m < rows; m++) {
        for (int i = 0; i < inner.cols; i++) own[m * width + i] = x[m * ldx + columns[i]];
        memset(own + m * width + inner.cols, 0, (size_t)(width - inner.cols) * sizeof *own);
    }
    if (part->stages) dense(&inner, own, rows, row, sum);
    else coded(&inner, own, rows, row, sum);
}

/* Few rows gather their activations; for more, rows are the lanes and activations lie transposed.
   Both add the same products in the same order: a row does not see how many there are. */
static inline __attribute__((always_inline)) void sparse_few(
    const Part *part, const int bits, const float *x, int rows, int row, float *sum) {
    int mask = (1 << part->value_bits) - 1;
    for (int tile = 0; tile < 4 && row + 16 * tile < part->rows; tile++) {
        const u8 *codes = part->codes + (size_t)(row / 16 + tile) * (size_t)part->survivors * 2 * (size_t)bits;
        int32_t ALIGNED entry[LANES];
#if defined(__AVX512F__)
        vf total[MANY], table = vload(part->values);
        for (int m = 0; m < MANY; m++) total[m] = vset(0);
#endif
        for (int g = 0; g < part->survivors; g++, codes += 2 * bits) {
            unpack_ints(codes, bits, entry);
            const float *at = x + part->starts[g];
#if defined(__AVX512F__)
            __m512i e = _mm512_load_si512(entry), place = _mm512_srli_epi32(e, (unsigned)part->value_bits);
            __m512i code = _mm512_and_si512(e, _mm512_set1_epi32(mask));
            vf value = part->value_bits <= 4 ? _mm512_permutexvar_ps(code, table) : _mm512_i32gather_ps(code, part->values, 4);
            for (int m = 0; m < rows; m++)
                total[m] = vfma(value, _mm512_i32gather_ps(place, at + (long)m * part->cols, 4), total[m]);
#else
            for (int m = 0; m < rows; m++)
                for (int i = 0; i < LANES; i++) {
                    float *total = sum + m * CHUNK + tile * 16 + i;
                    float value = part->values[entry[i] & mask];
                    *total = __builtin_fmaf(value, at[(long)m * part->cols + (entry[i] >> part->value_bits)], *total);
                }
#endif
        }
#if defined(__AVX512F__)
        for (int m = 0; m < rows; m++) vstore(sum + m * CHUNK + tile * 16, total[m]);
#endif
    }
}

static inline __attribute__((always_inline)) void sparse_many(
    const Part *part, const int bits, const float *x, int rows, int row, float *sum) {
    int mask = (1 << part->value_bits) - 1, width = ROUND_UP(rows, LANES);
    for (int tile = 0; tile < 4 && row + 16 * tile < part->rows; tile++)
        for (int m0 = 0; m0 < rows; m0 += LANES) {
            const u8 *codes = part->codes + (size_t)(row / 16 + tile) * (size_t)part->survivors * 2 * (size_t)bits;
            int32_t ALIGNED entry[LANES];
            float ALIGNED total[LANES][LANES];
            vf t[LANES][LANES / VW];
            for (int n = 0; n < LANES; n++) for (int v = 0; v < LANES / VW; v++) t[n][v] = vset(0);
            for (int g = 0; g < part->survivors; g++, codes += 2 * bits) {
                unpack_ints(codes, bits, entry);
                const float *at = x + (long)part->starts[g] * width + m0;
                for (int n = 0; n < LANES; n++) {
                    const float *column = at + (long)(entry[n] >> part->value_bits) * width;
                    vf value = vset(part->values[entry[n] & mask]);
                    for (int v = 0; v < LANES / VW; v++) t[n][v] = vfma(value, vload(column + v * VW), t[n][v]);
                }
            }
            for (int n = 0; n < LANES; n++) for (int v = 0; v < LANES / VW; v++) vstore(total[n] + v * VW, t[n][v]);
            for (int m = m0; m < MIN(rows, m0 + LANES); m++)
                for (int n = 0; n < LANES; n++) sum[m * CHUNK + tile * 16 + n] = total[n][m - m0];
        }
}

static void sparse(const Part *part, const float *x, int rows, int row, float *sum) {
    if (rows < MANY) WITH_WIDTH(part->bits, sparse_few(part, bits, x, rows, row, sum))
    else WITH_WIDTH(part->bits, sparse_many(part, bits, x, rows, row, sum))
}

/* One block of 32 columns by 16 rows of a grid of vectors, as a tile. */
static void grid_tile(const Part *part, const u8 *codes, int block, u16 *tile) {
    int length = part->length, bits = part->bits, held[2] = {-1, -1};
    int32_t ALIGNED index[2][LANES]; /* of two neighbouring segments */
    for (int pair = 0; pair < 16; pair++) {
        int k = block * 32 + pair * 2;
        u16 *line = tile + pair * 32;
        if (k >= part->cols) {
            memset(line, 0, 32 * sizeof *line);
            continue;
        }
        int first = k / length, second = (k + 1) / length, j = k % length;
        for (int s = first; s <= second && s < part->segments; s++)
            if (held[s & 1] != s) {
                unpack_ints(codes + (size_t)s * 2 * (size_t)bits, bits, index[s & 1]);
                held[s & 1] = s;
            }
        const int32_t *a = index[first & 1], *b = index[second & 1];
#if defined(__AVX512F__)
        __m512i width = _mm512_set1_epi32(length), low;
        __m512i at = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_load_si512(a), width), _mm512_set1_epi32(j));
        low = _mm512_i32gather_epi32(at, (const void *)part->table, 2);
        if (second != first) {
            __m512i high = _mm512_setzero_si512();
            if (second < part->segments) high = _mm512_i32gather_epi32(_mm512_mullo_epi32(_mm512_load_si512(b), width), (const void *)part->table, 2);
            low = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(high, 16));
        }
        _mm512_storeu_si512(line, low);
#else
        for (int i = 0; i < LANES; i++) {
            line[2 * i] = part->table[a[i] * length + j];
            line[2 * i + 1] = second == first ? part->table[a[i] * length + j + 1]
                              : second < part->segments ? part->table[b[i] * length] : 0;
        }
#endif
    }
}

static void grid(const Part *part, const u16 *x, int rows, int row, float *sum) {
    int blocks = (part->cols + 31) / 32;
    size_t each = (size_t)part->segments * 2 * (size_t)part->bits;
    u16 ALIGNED tiles[BLOCKS * PAIR];
    for (int half = 0; half < 2 && row + 32 * half < part->rows; half++) {
        const u8 *codes = part->codes + (size_t)(row / 16 + 2 * half) * each;
        for (int block = 0; block < blocks; block += BLOCKS) {
            int count = MIN(BLOCKS, blocks - block);
            for (int b = 0; b < count; b++) {
                grid_tile(part, codes, block + b, tiles + b * PAIR);
                if (row + 32 * half + 16 < part->rows) grid_tile(part, codes + each, block + b, tiles + b * PAIR + TILE);
                else memset(tiles + b * PAIR + TILE, 0, TILE * sizeof *tiles);
            }
            product(x + block * 32, width_of(part), rows, tiles, count, sum + 32 * half, CHUNK, 1);
        }
    }
}

static void patches(const Part *part, const u16 *x, int rows, int row, float *sum) {
    int size = part->length; /* 16 or 32 */
    size_t each = (size_t)(size / 16 * size / 2) * 4 * (size_t)part->bits;
    u16 ALIGNED tiles[PAIR];
    float *product_of = scratch(7, (size_t)rows * 32 * sizeof *product_of);
    memset(tiles, 0, sizeof tiles);
    for (int block = row / size; block * size < MIN(row + CHUNK, part->rows); block++)
        for (int k = part->starts[block]; k < part->starts[block + 1]; k++) {
            for (int half = 0; half < size / 16; half++)
                unpack_bf16(part->codes + (size_t)k * each + (size_t)(half * size / 2) * 4 * (size_t)part->bits, part->bits,
                            part->table, size / 2, tiles + half * TILE);
            product(x + part->columns[k] * size, width_of(part), rows, tiles, 1, product_of, 32, 0);
            for (int m = 0; m < rows; m++)
                for (int i = 0; i < size; i++) sum[m * CHUNK + block * size - row + i] += part->gains[k] * product_of[m * 32 + i];
        }
}

/* What is left of 64 rows when their sums are there: T_out⁻¹ and scales. */
void finish_chunk(const Part *part, int rows, int row, float *sum) {
    int count = MIN(CHUNK, part->rows - row);
    for (int m = 0; m < rows; m++) {
        float *s = sum + m * CHUNK;
        if (part->t_out) transform(part->t_out, part->t_out_size, part->dct_out, part->dct_out_tail, 1, s, part->rows, row, CHUNK);
        if (!part->row) {
            for (int j = 0; j < count; j++) s[j] *= part->scale;
            continue;
        }
        int j = 0;
        for (; j + VW <= count; j += VW)
            vstore(s + j, vmul(vload(s + j), vmul(vset(part->scale), scales_at(part->row, part->row_levels, row + j))));
        for (; j < count; j++) s[j] *= part->scale * part->row[part->row_levels ? part->row_levels[row + j] : row + j];
    }
}

void add_chunk(const Part *part, const void *input, int rows, int row, float *sum) {
    switch (part->kind) {
    case CODED: coded(part, input, rows, row, sum); break;
    case DENSE: dense(part, input, rows, row, sum); break;
    case SHARED: shared(part, input, rows, row, sum); break;
    case SPARSE: sparse(part, input, rows, row, sum); break;
    case GRID: grid(part, input, rows, row, sum); break;
    case PATCHES: patches(part, input, rows, row, sum); break;
    default: return;
    }
    finish_chunk(part, rows, row, sum);
}
