/* Products of activations with tiles of weights: the one place where multiply-adds on matrices happen.

   Each result is a sum over k in one order, whatever the rows beside it: a row does not depend on its batch. */
#include "common.h"

#include <sys/syscall.h>
#include <unistd.h>

#if defined(__AMX_BF16__)
void shape_tiles(const u8 rows[8], const u8 bytes[8]) {
    struct {
        u8 palette, start, reserved[14];
        u16 bytes[16];
        u8 rows[16];
    } __attribute__((packed)) s;
    memset(&s, 0, sizeof s);
    s.palette = 1;
    for (int i = 0; i < 8; i++) s.bytes[i] = bytes[i], s.rows[i] = rows[i];
    __asm__ volatile("" ::"r"(&s) : "memory"); /* gcc 12 drops the stores otherwise */
    _tile_loadconfig(&s);
}

static __thread int shaped; /* rows that the tiles of this thread are set to */

static void shape(int rows) { /* 0…3 sums, 4…5 x, 6…7 weights */
    u8 m = (u8)rows;
    shape_tiles((const u8[8]){m, m, m, m, m, m, 16, 16}, (const u8[8]){64, 64, 64, 64, 64, 64, 64, 64});
    shaped = rows;
}

void begin_products(void) { shaped = 0; }

void end_products(void) {
    if (shaped) _tile_release();
}

EXPORT int ds_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; } /* ask for AMX's state */

static void few(const u16 *x, long ldx, const u16 *tiles, int blocks, float *y, long ldy, int add) {
    if (add) {
        _tile_loadd(0, y, ldy * 4);
        _tile_loadd(1, y + 16, ldy * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (int k = 0; k < blocks; k++, tiles += PAIR) {
        for (int line = 0; line < 32; line++) _mm_prefetch((const char *)tiles + 8192 + line * 64, _MM_HINT_T0);
        _tile_loadd(4, x + k * 32, ldx * 2);
        _tile_loadd(6, tiles, 64);
        _tile_loadd(7, tiles + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, y, ldy * 4);
    _tile_stored(1, y + 16, ldy * 4);
}

static void many(const u16 *x, long ldx, const u16 *tiles, int blocks, float *y, long ldy, int add) {
    float *z = y + 16 * ldy; /* 16 rows below */
    if (add) {
        _tile_loadd(0, y, ldy * 4);
        _tile_loadd(1, y + 16, ldy * 4);
        _tile_loadd(2, z, ldy * 4);
        _tile_loadd(3, z + 16, ldy * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < blocks; k++, tiles += PAIR) {
        _tile_loadd(4, x + k * 32, ldx * 2);
        _tile_loadd(5, x + 16 * ldx + k * 32, ldx * 2);
        _tile_loadd(6, tiles, 64);
        _tile_loadd(7, tiles + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, y, ldy * 4);
    _tile_stored(1, y + 16, ldy * 4);
    _tile_stored(2, z, ldy * 4);
    _tile_stored(3, z + 16, ldy * 4);
}

void product(const u16 *x, long ldx, int rows, const u16 *tiles, int blocks, float *y, long ldy, int add) {
    if (rows >= 16 && shaped != 16) shape(16);
    for (; rows >= 32; rows -= 32, x += 32 * ldx, y += 32 * ldy) many(x, ldx, tiles, blocks, y, ldy, add);
    if (rows >= 16) few(x, ldx, tiles, blocks, y, ldy, add), rows -= 16, x += 16 * ldx, y += 16 * ldy;
    if (!rows) return;
    if (shaped != rows) shape(rows);
    few(x, ldx, tiles, blocks, y, ldy, add);
}
#else
void begin_products(void) {}

void end_products(void) {}

EXPORT int ds_allowed(void) { return 1; }

/* Weights stream from memory once: they are asked for this far ahead, into the second-level cache. The first-level one has
   too few lines on their way at once. */
enum { AT_ONCE = VW == 16 ? 8 : 2, VECTORS = 32 / VW, AHEAD = 32768 };

static inline __attribute__((always_inline)) void rows_of(
    int rows, const u16 *x, long ldx, const u16 *tiles, int blocks, float *y, long ldy, int add) {
    vf sum[AT_ONCE][VECTORS];
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < VECTORS; v++) sum[m][v] = add ? vload(y + m * ldy + v * VW) : vset(0);
    for (int k = 0; k < blocks; k++, tiles += PAIR)
        for (int pair = 0; pair < 16; pair++) {
            vpairs w[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                int n = v * VW; /* of 32, two tiles of 16 */
                const u16 *p = tiles + n / 16 * TILE + pair * 32 + n % 16 * 2;
                _mm_prefetch((const char *)p + AHEAD, _MM_HINT_T1);
                w[v] = vload_pairs(p);
            }
            for (int m = 0; m < rows; m++) {
                vpairs a = vset_pair(x + m * ldx + k * 32 + pair * 2);
                for (int v = 0; v < VECTORS; v++) sum[m][v] = vdot(sum[m][v], w[v], a);
            }
        }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < VECTORS; v++) vstore(y + m * ldy + v * VW, sum[m][v]);
}

void product(const u16 *x, long ldx, int rows, const u16 *tiles, int blocks, float *y, long ldy, int add) {
    for (; rows >= AT_ONCE; rows -= AT_ONCE, x += AT_ONCE * ldx, y += AT_ONCE * ldy)
        rows_of(AT_ONCE, x, ldx, tiles, blocks, y, ldy, add);
    if (AT_ONCE > 4 && rows & 4) rows_of(4, x, ldx, tiles, blocks, y, ldy, add), x += 4 * ldx, y += 4 * ldy;
    if (AT_ONCE > 2 && rows & 2) rows_of(2, x, ldx, tiles, blocks, y, ldy, add), x += 2 * ldx, y += 2 * ldy;
    if (rows & 1) rows_of(1, x, ldx, tiles, blocks, y, ldy, add);
}
#endif
