/* What a part reads instead of the layer's input: scaled, gathered or transformed activations, the result of a factor
   before it, or a book's projections. Made once for a part and its rows, before the rows of the weights are shared out. */
#include "terms.h"

#include <math.h>

/* Floats of a row's projections: [segments][tile][projected] */
static size_t projections(const Part *part) {
    return (size_t)part->segments * (size_t)part->tile * (size_t)projected(part);
}

size_t input_bytes(const Part *part, int rows) {
    if (part->kind == BASE_SCALE || part->kind == VECTOR) return 0;
    size_t each = part->kind == BOOK     ? projections(part) * sizeof(float)
                  : part->kind == SPARSE ? (size_t)part->cols * sizeof(float)
                                         : (size_t)width_of(part) * sizeof(u16);
    if (part->kind == SPARSE && rows >= MANY) rows = ROUND_UP(rows, LANES);
    if (part->kind == BOOK && rows % 4 == 3) rows++;
    return ROUND_UP(each * (size_t)rows, 64);
}

/* One group of rows: x [cols, lanes] → out [projections, lanes] */
static void project(const Part *part, const float *x, int lanes, float *out) {
    int size = part->size, each = MIN(size, projected(part));
    float *whole = scratch(3, 2 * (size_t)(size * lanes) * sizeof *whole), *folded = whole + size * lanes;
    for (int s = 0; s < part->segments; s++)
        for (int r = 0; r < part->tile; r++) {
            int length = MIN(part->length, part->cols - s * part->length), at = r * part->length;
            memset(whole, 0, (size_t)(size * lanes) * sizeof *whole);
            memcpy(whole + at * lanes, x + s * part->length * lanes, (size_t)(length * lanes) * sizeof *whole);
            walsh_hadamard(whole, NULL, size, lanes, whole);
            for (int k = 0; k < part->transforms; k++, out += each * lanes) {
                const float *sign = part->signs + (size_t)k * (size_t)size;
                if (each == size) {
                    walsh_hadamard(whole, sign, size, lanes, out);
                    continue;
                }
                for (int i = 0; i < size * lanes; i++) folded[i] = whole[i] * sign[i / lanes];
                for (int half = size * lanes / 2; half >= each * lanes; half /= 2) /* the first rows of H */
                    for (int i = 0; i < half; i++) folded[i] += folded[half + i];
                walsh_hadamard(folded, NULL, each, lanes, out);
            }
        }
}

/* The result of `before`, times its own scales, into bfloat16: it is small. */
static void chain(const Part *part, const u16 *x, long ldx, int rows, u16 *out) {
    const Part *before = part->before;
    long width = width_of(part);
    void *input = scratch(4, input_bytes(before, rows));
    make_input(before, x, ldx, rows, input);
    float *sum = scratch(5, (size_t)rows * CHUNK * sizeof *sum);
    for (int row = 0; row < before->rows; row += CHUNK) {
        memset(sum, 0, (size_t)rows * CHUNK * sizeof *sum);
        add_chunk(before, input, rows, row, sum);
        for (int m = 0; m < rows; m++)
            for (int j = 0; j < MIN(CHUNK, before->rows - row); j++) {
                float value = sum[m * CHUNK + j] * (part->col ? part->col[row + j] : 1.0f);
                out[m * width + row + j] = to_bf16(value);
            }
    }
}

static void read_line(const Part *part, const u16 *from, int is_scaled, float *line) {
    int i = 0, cols = part->cols;
    if (part->columns && part->kind != PATCHES)
        for (; i < cols; i++) line[i] = to_float(from[part->columns[i]]);
    for (; i + VW <= cols; i += VW) vstore(line + i, vload_bf16(from + i));
    for (; i < cols; i++) line[i] = to_float(from[i]);
    if (!is_scaled) return;
    for (i = 0; i + VW <= cols; i += VW) vstore(line + i, vmul(vload(line + i), scales_at(part->col, part->col_levels, i)));
    for (; i < cols; i++) line[i] *= part->col[part->col_levels ? part->col_levels[i] : i];
}

static void write_line(const float *line, int cols, u16 *out) {
    int i = 0;
    for (; i + VW <= cols; i += VW) vstore_bf16(out + i, vload(line + i));
    for (; i < cols; i++) out[i] = to_bf16(line[i]);
}

/* Rows of x as the part takes them, one at a time */
typedef struct {
    const Part *part;
    const u16 *x;
    long ldx;
    int is_scaled;
} Reader;

static void read_row(const Reader *reader, int m, float *line) {
    const Part *part = reader->part;
    read_line(part, reader->x + m * reader->ldx, reader->is_scaled, line);
    if (part->t_in) transform(part->t_in, part->t_in_size, part->dct_in, part->dct_in_tail, 0, line, part->cols, 0, part->cols);
}

static void book_input(const Reader *reader, int rows, float *out) {
    const Part *part = reader->part;
    int cols = part->cols;
    float *line = scratch(2, 2 * (size_t)(cols * LANES) * sizeof *line), *beside = line + cols * LANES;
    for (int m = 0, lanes; m < rows; m += lanes) {
        lanes = lanes_of(part, rows - m);
        for (int i = 0; i < lanes; i++)
            if (m + i < rows) read_row(reader, m + i, line + i * cols);
            else memset(line + i * cols, 0, (size_t)cols * sizeof *line);
        if (lanes > 1) transpose(line, cols, lanes, cols, beside, lanes);
        project(part, lanes > 1 ? beside : line, lanes, out + (size_t)m * projections(part));
    }
}

void make_input(const Part *part, const u16 *x, long ldx, int rows, void *out) {
    long width = width_of(part);
    if (part->kind != BOOK && part->kind != SPARSE) memset(out, 0, (size_t)(rows * width) * sizeof(u16));
    if (part->before && part->kind != SPARSE) {
        chain(part, x, ldx, rows, out);
        return;
    }
    Reader reader = {part, x, ldx, part->col != NULL};
    if (part->before) {
        u16 *chained = scratch(6, (size_t)(rows * width) * sizeof *chained);
        chain(part, x, ldx, rows, chained);
        reader = (Reader){part, chained, width, 0};
    }
    if (part->kind == BOOK) {
        book_input(&reader, rows, out);
        return;
    }
    float *line = scratch(2, (size_t)ROUND_UP(part->cols, 32) * sizeof *line); /* after `chain`, which makes an input too */
    for (int m = 0; m < rows; m++) {
        read_row(&reader, m, line);
        if (part->kind == SPARSE && rows < MANY) memcpy((float *)out + (size_t)m * (size_t)part->cols, line, (size_t)part->cols * sizeof *line);
        else if (part->kind == SPARSE)
            for (int i = 0; i < part->cols; i++) ((float *)out)[(long)i * ROUND_UP(rows, LANES) + m] = line[i];
        else write_line(line, part->cols, (u16 *)out + m * width);
    }
}
