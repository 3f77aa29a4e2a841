// Products of bfloat16 with sums in float32 by the processor's matrix tiles (AMX), where there are any.
#pragma once

#include "features.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif

#define TILE 32  // rows and columns of a square of four tiles, and numbers of depth of each

static inline long up_to_tiles(long n) { return (n + TILE - 1) / TILE * TILE; }

#if HAS_TILES
// Whether the system lets this process use them; asked once.
static bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
}

// Tiles are set up for as long as this lives; nobody else's setup is in use then.
struct Tiles {
  bool on;
  explicit Tiles(bool wanted) : on(wanted) {
    if (!on) return;
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) {
      config[16 + 2 * i] = 64;  // bytes of a row
      config[48 + i] = 16;      // rows
    }
    _tile_loadconfig(config);
  }
  ~Tiles() {
    if (on) _tile_release();
  }
};

// c (rows, columns) = or += a (rows, depth) b (depth, columns); all sizes multiples of TILE; b has two rows interleaved.
static void multiply_tiles(const bf16* a, long lda, const bf16* b, long ldb, float* c, long ldc, long rows, long columns,
                           long depth, bool add, Ahead& ahead) {
  for (long i = 0; i < rows; i += 32)
    for (long j = 0; j < columns; j += 32) {
      float* at = c + i * ldc + j;
      if (add) {
        _tile_loadd(0, at, ldc * 4);
        _tile_loadd(1, at + 16, ldc * 4);
        _tile_loadd(2, at + 16 * ldc, ldc * 4);
        _tile_loadd(3, at + 16 * ldc + 16, ldc * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (long k = 0; k < depth; k += 32) {
        _tile_loadd(4, a + i * lda + k, lda * 2);
        _tile_loadd(6, b + k / 2 * ldb + 2 * j, ldb * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + k / 2 * ldb + 2 * j + 32, ldb * 2);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + (i + 16) * lda + k, lda * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        ahead.fetch(4);
      }
      _tile_stored(0, at, ldc * 4);
      _tile_stored(1, at + 16, ldc * 4);
      _tile_stored(2, at + 16 * ldc, ldc * 4);
      _tile_stored(3, at + 16 * ldc + 16, ldc * 4);
    }
}

static INLINE void store_pair(bf16* to, __m512bh x) { std::memcpy(to, &x, 64); }

// (rows, columns) -> the same in bfloat16; columns a multiple of TILE
static void narrow_rows(const float* from, long step, long rows, long columns, bf16* to, Ahead& ahead) {
  for (long i = 0; i < rows; i++, ahead.fetch(1))
    for (long j = 0; j < columns; j += 32)
      store_pair(to + i * columns + j, _mm512_cvtne2ps_pbh((__m512)load(from + i * step + j + 16), (__m512)load(from + i * step + j)));
}

#define INTERLEAVED(n) n, n + 32, n + 1, n + 33, n + 2, n + 34, n + 3, n + 35, n + 4, n + 36, n + 5, n + 37, n + 6, n + 38, n + 7, n + 39
// As narrow_pairs, of what is in bfloat16; rows even, columns a multiple of TILE.
static void pair_rows(const bf16* from, long step, long rows, long columns, bf16* to, Ahead& ahead) {
  alignas(64) static const uint16_t first[32] = {INTERLEAVED(0), INTERLEAVED(8)};
  alignas(64) static const uint16_t second[32] = {INTERLEAVED(16), INTERLEAVED(24)};
  const __m512i low = _mm512_load_si512(first), high = _mm512_load_si512(second);
  for (long i = 0; i < rows; i += 2, from += 2 * step, to += 2 * columns, ahead.fetch(2))
    for (long j = 0; j < columns; j += 32) {
      __m512i one = _mm512_loadu_si512(from + j), other = _mm512_loadu_si512(from + step + j);
      _mm512_storeu_si512(to + 2 * j, _mm512_permutex2var_epi16(one, low, other));
      _mm512_storeu_si512(to + 2 * j + 32, _mm512_permutex2var_epi16(one, high, other));
    }
}

// (rows, columns) -> (up_to_tiles(rows) / 2, columns, 2), two rows interleaved, 0 beyond rows; columns a multiple of VW
static void narrow_pairs(const float* from, long step, long rows, long columns, bf16* to, Ahead& ahead) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i places = _mm512_load_si512(order);
  for (long i = 0; i < up_to_tiles(rows); i += 2, ahead.fetch(2))
    for (long j = 0; j < columns; j += 16) {
      vf one = i < rows ? load(from + i * step + j) : vf{}, other = i + 1 < rows ? load(from + (i + 1) * step + j) : vf{};
      __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)other, (__m512)one);
      _mm512_storeu_si512(to + i * columns + 2 * j, _mm512_permutexvar_epi16(places, both));
    }
}
#else
static bool tiles_allowed() { return false; }
struct Tiles {
  explicit Tiles(bool) {}
};
static void multiply_tiles(const bf16*, long, const bf16*, long, float*, long, long, long, long, bool, Ahead&) {}
static void narrow_rows(const float*, long, long, long, bf16*, Ahead&) {}
static void narrow_pairs(const float*, long, long, long, bf16*, Ahead&) {}
static void pair_rows(const bf16*, long, long, long, bf16*, Ahead&) {}
#endif
