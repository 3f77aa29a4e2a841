// Products of matrices that lie in the caches: C (M x N) = A B, tiles held in registers.
#pragma once

#define INLINE_LAMBDA __attribute__((always_inline))

#include "simd.h"

// Vectors across and rows of a tile: its sums, a row of B and one number of A fit into the registers.
#if REGISTERS == 32
#define MOST_ACROSS 4
#else
#define MOST_ACROSS 2
#endif
template <int NV>
constexpr int rows_of_tile = REGISTERS == 32 ? (NV == 4 ? 6 : 8) : (NV == 2 ? 6 : 8);

enum Start { ZERO, ADD, ROWS };  // C starts at 0, at what is there, or at one number per row

// Memory that will be wanted soon, fetched line by line while products run: rows of some lines each, of two arrays.
#define AHEAD_STEPS 2  // more often, and the buffers for lines on their way are full

struct Ahead {
  struct Part {
    const char* base = nullptr;
    long rows = 0, lines = 0, jump = 0;  // from the end of a row to the next
  } parts[2];
  int part = 0;
  const char* at = nullptr;
  long line = 0, left = 0;  // of this row, of all rows

  bool begin() {
    while (!left && part < 2) {
      const Part& p = parts[part++];
      at = p.base, line = 0, left = p.base ? p.rows * p.lines : 0;
    }
    return left > 0;
  }
  void fetch(long count) {
    for (; count > 0 && begin(); count--, left--) {
      __builtin_prefetch(at, 0, 2);
      at += 64;
      if (++line == parts[part - 1].lines) line = 0, at += parts[part - 1].jump;
    }
  }
};

struct Product {
  const float* a;  // rows x depth, or depth x rows
  long lda;
  const float* b;  // depth x columns
  long ldb;
  float* c;
  long ldc;
  const float* row_start = nullptr;
  Ahead* ahead = nullptr;
  const float* from = nullptr;  // with ADD, what is added to; C itself if null
  long triangle = -1;           // rows of A^T from this one on are 0 before column 0, 1, ...: C's row i ends at depth triangle + i
};

template <int MR, int NV, bool BY_DEPTH>
static INLINE void tile(const Product& p, long row, long column, long depth, Start start) {
  vf c[MR][NV];
  float* out = p.c + row * p.ldc + column;
  const float* before = p.from ? p.from + row * p.ldc + column : out;
  if (p.triangle >= 0 && p.triangle + row + MR < depth) depth = p.triangle + row + MR;
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++)
      c[i][j] = start == ZERO  ? vf{}
                : start == ADD ? load(before + i * p.ldc + j * VW)
                               : splat(p.row_start[row + i]);
  const float* a = BY_DEPTH ? p.a + row : p.a + row * p.lda;
  const float* b = p.b + column;
  const long lda = p.lda, ldb = p.ldb;
  auto step = [&]() INLINE_LAMBDA {
    vf line[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) line[j] = load(b + j * VW);
    b += ldb;
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      vf x = splat(BY_DEPTH ? a[i] : a[i * lda]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) c[i][j] += x * line[j];
    }
    a += BY_DEPTH ? lda : 1;
  };
  long k = 0;
  if (p.ahead && p.ahead->begin()) {
    // one after the other as they lie: in steps of rows, the processor's own fetching works against it
    const Ahead::Part part = p.ahead->parts[p.ahead->part - 1];
    const char* soon = p.ahead->at;
    long line = p.ahead->line;
    for (; k + AHEAD_STEPS <= depth; k += AHEAD_STEPS) {
      __builtin_prefetch(soon, 0, 2);
      soon += 64;
      if (++line == part.lines) line = 0, soon += part.jump;
#pragma GCC unroll 4
      for (int i = 0; i < AHEAD_STEPS; i++) step();
    }
    p.ahead->at = soon, p.ahead->line = line;
    p.ahead->left -= depth / AHEAD_STEPS < p.ahead->left ? depth / AHEAD_STEPS : p.ahead->left;
  }
  for (; k < depth; k++) step();
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store(out + i * p.ldc + j * VW, c[i][j]);
}

template <int NV, bool BY_DEPTH>
static __attribute__((noinline)) void strip(const Product& p, long rows, long column, long depth, Start start) {
  constexpr int MR = rows_of_tile<NV>;
  // tiles of about one height: one of a single row would wait for each of its own sums
  const long tiles = (rows + MR - 1) / MR;
  for (long n = 0, i = 0; n < tiles; n++) {
    const long height = (rows - i + tiles - n - 1) / (tiles - n);
    switch (height) {
      case 1: tile<1, NV, BY_DEPTH>(p, i, column, depth, start); break;
      case 2: tile<2, NV, BY_DEPTH>(p, i, column, depth, start); break;
      case 3: tile<3, NV, BY_DEPTH>(p, i, column, depth, start); break;
      case 4: tile<4, NV, BY_DEPTH>(p, i, column, depth, start); break;
      case 5: tile<5, NV, BY_DEPTH>(p, i, column, depth, start); break;
      case 6: tile<6, NV, BY_DEPTH>(p, i, column, depth, start); break;
      default:
        if constexpr (MR > 6) {
          if (height == 7)
            tile<7, NV, BY_DEPTH>(p, i, column, depth, start);
          else
            tile<8, NV, BY_DEPTH>(p, i, column, depth, start);
        }
    }
    i += height;
  }
}

// columns in numbers, a multiple of VW
template <bool BY_DEPTH>
static void multiply(const Product& p, long rows, long columns, long depth, Start start) {
  long left = columns / VW, column = 0;
  while (left > 0) {
    // 5 vectors as 3 and 2 rather than 4 and 1
    long across = left <= MOST_ACROSS ? left : left < 2 * MOST_ACROSS ? (left + 1) / 2 : MOST_ACROSS;
    switch (across) {
#if MOST_ACROSS == 4
      case 4: strip<4, BY_DEPTH>(p, rows, column, depth, start); break;
      case 3: strip<3, BY_DEPTH>(p, rows, column, depth, start); break;
#endif
      case 2: strip<2, BY_DEPTH>(p, rows, column, depth, start); break;
      default: strip<1, BY_DEPTH>(p, rows, column, depth, start);
    }
    column += across * VW;
    left -= across;
  }
}
