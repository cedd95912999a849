/* What a packed term is to these kernels. Mirrored field by field in parts.py. */
#ifndef DELTASERVE_TERMS_H
#define DELTASERVE_TERMS_H

#include "common.h"

enum { LAYOUT = 4 }; /* changes with the structures below */
typedef enum { BASE_SCALE, CODED, DENSE, SPARSE, BOOK, GRID, PATCHES, VECTOR, SHARED } Kind;
typedef enum { NO_TRANSFORM, HADAMARD, DCT } Transform;

/* y[:, first : first + rows] += row ⊙ (T_out⁻¹ · term · T_in · (x[:, columns] ⊙ col)), or of `before`'s result instead of x.

   BASE_SCALE  y[:, …] *= row, before anything is added;  VECTOR  y[:, …] += row
   CODED       codes [rows/32][cols/32][2][16 pairs of columns] groups of 32; table bf16 [≥ 32];
               group_scale [rows/32][groups][32] for each `group` columns, or none
   DENSE       tiles bf16 [rows/32][cols/32][2][512], `stages` sets of them to be added up
   SPARSE      codes [rows/16][survivors] groups of 16: place << value_bits | code; starts int32 [survivors]; values [≥ 16]
   SHARED      CODED or DENSE in `survivors` columns; which, for each `tile` rows: starts int32 [rows/tile][survivors]
   BOOK        codes [rows/tile/16][stages][segments] groups of 16; the seeded book; signs ±1 [transforms][size]; gains [stages];
               stages take turns at `turns` parts of the book
   GRID        codes [rows/16][segments] groups of 16; table bf16 [2^bits · length + 1]
   PATCHES     codes [patches][length/16][length/2] groups of 32; row_scale of patch k: gains[k]; starts int32 [down + 1];
               columns int32 [patches], block columns */
typedef struct Part {
    int32_t kind, first, rows, cols, bits, value_bits, group, length, tile, stages, segments, survivors, size, transforms;
    int32_t is_signed, t_in, t_in_size, t_out, t_out_size, input; /* input: number in its list of the part whose input it shares, or its own */
    int32_t turns;
    float scale;
    const u8 *codes;
    const u16 *table;
    const float *row, *col, *group_scale, *values, *signs, *gains, *dct_in, *dct_in_tail, *dct_out, *dct_out_tail;
    const int32_t *starts, *columns;
    const u8 *row_levels, *col_levels; /* of a book: places in row and col, which then are tables of 16; or none */
    const struct Part *before;
} Part;

typedef struct {
    int32_t start, rows, parts, unused;
    const Part *part;
} Run;

typedef struct {
    int32_t rows, cols; /* of the weights, [out, in] */
    const u16 *tiles;   /* [rows/32][cols/32][2][512] */
    const float *bias;
} Site;

/* Scales i … of a vector, or of the table that levels point into */
static inline vf scales_at(const float *scale, const u8 *levels, int i) {
    if (!levels) return vload(scale + i);
#if defined(__AVX512F__)
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(levels + i))), vload(scale));
#else
    return _mm256_i32gather_ps(scale, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(levels + i))), 4);
#endif
}

/* inputs.c. Of a sparse part: float [rows][cols], or from MANY rows on [cols][rows rounded up to 16] */
enum { MANY = 4 };
/* bf16 of a row of any other input: patches read 32 past a block. */
static inline long width_of(const Part *part) { return ROUND_UP(part->cols, 32) + 32; }
/* Projections on one row of a tile: as many as codes tell apart. */
static inline int projected(const Part *part) {
    int told = part->turns << (part->bits - part->is_signed);
    return part->transforms > 1 ? part->transforms * part->size : MIN(part->size, told);
}

/* Rows of a book's input that lie side by side, [projections][lanes], of the `rows` that are left: a code then finds
   the products of them all in one place. Three rows are four lanes. Transforms stay in the first-level cache. */
static inline int lanes_of(const Part *part, int rows) {
    return part->size > 1024 ? 1 : rows >= 16 ? 16 : rows >= 3 ? 4 : 1;
}

size_t input_bytes(const Part *part, int rows);
void make_input(const Part *part, const u16 *x, long ldx, int rows, void *out);

/* chunks.c: sum[M, 64] of rows row … row + 63 of any other part, scaled; `input` as made by make_input */
void add_chunk(const Part *part, const void *input, int rows, int row, float *sum);
void finish_chunk(const Part *part, int rows, int row, float *sum);

/* book.c: y[M, from … to] += rows from … to of a BOOK, from … to within the part; y at the part's first row */
void add_book(const Part *part, const float *input, int rows, int from, int to, float *y, long ldy);

/* transforms.c */
void walsh_hadamard(const float *x, const float *sign, int size, int lanes, float *out);
void transpose(const float *from, long ldfrom, int rows, int cols, float *to, long ldto);
void transform(int kind, int size, const float *dct, const float *tail, int inverse, float *x, int n, int offset, int length);

#endif
