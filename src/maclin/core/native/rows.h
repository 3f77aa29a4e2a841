// Rows of tokens between their tensors and the block: values in, results out, and what is fetched ahead of either.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tiles.h"

static inline long up(long n) { return (n + VW - 1) / VW * VW; }
static inline long least(long a, long b) { return a < b ? a : b; }

// (rows, columns) at from, step numbers from row to row -> (columns, rows) at to; both sizes multiples of VW
static void turn(const float* from, long step, long rows, long columns, float* to, long to_step) {
  for (long i = 0; i < rows; i += VW)
    for (long j = 0; j < columns; j += VW) {
      vf square[VW];
      for (int k = 0; k < VW; k++) square[k] = load(from + (i + k) * step + j);
      transpose(square);
      for (int k = 0; k < VW; k++) store(to + (j + k) * to_step + i, square[k]);
    }
}

// What a block attends to: weight 1, or 0 where masked or beyond count; returns how many.
static long attended(float* weight, const uint8_t* mask, long mask_stride, long count) {
  if (count == T && !mask) {
    TV store(weight + t, splat(1.0f));
    return T;
  }
  long kept = 0;
  for (long t = 0; t < T; t++) {
    bool on = t < count && (!mask || mask[t * mask_stride]);
    weight[t] = on ? 1.0f : 0.0f;
    kept += on;
  }
  return kept;
}

// values (rows, across), times their weight, 0 where that is 0
template <class E>
static void load_values(float* to, const E* from, long token, long entry, long width, long count, const float* weight,
                        long rows, long across) {
  for (long t = 0; t < rows; t++, to += across) {
    const float w = weight[t];
    if (t >= count || w == 0.0f) {
      for (long d = 0; d < across; d += VW) store(to + d, vf{});
      continue;
    }
    const E* row = from + t * token;
    long d = 0;
    if (entry == 1)
      for (; d + VW <= width; d += VW) store(to + d, load(row + d) * w);
    for (; d < width; d++) to[d] = value(row[d * entry]) * w;
    for (; d < across; d++) to[d] = 0.0f;
  }
}

static void load_rows(float* to, const Array& from, long b, long h, long first, long width, long count,
                      const float* weight, long rows = T, long across = 0) {
  if (!across) across = up(width);
  if (from.type == FLOAT)
    load_values(to, from.at<float>(b, h, first), from.token, from.entry, width, count, weight, rows, across);
  else if (from.type == BFLOAT)
    load_values(to, from.at<bf16>(b, h, first), from.token, from.entry, width, count, weight, rows, across);
#ifdef HAS_HALF
  else
    load_values(to, from.at<half>(b, h, first), from.token, from.entry, width, count, weight, rows, across);
#endif
}

template <class E>
static void write_values(const float* from, E* to, long token, long entry, long width, long count, long across) {
  for (long t = 0; t < count; t++, from += across, to += token) {
    long d = 0;
    if (entry == 1)
      for (; d + VW <= width; d += VW) store(to + d, load(from + d));
    for (; d < width; d++) put(to + d * entry, from[d]);
  }
}

static void write_rows(const float* from, const Array& to, long b, long h, long first, long width, long count,
                       long across = 0) {
  if (!across) across = up(width);
  if (to.type == FLOAT)
    write_values(from, to.at<float>(b, h, first), to.token, to.entry, width, count, across);
  else if (to.type == BFLOAT)
    write_values(from, to.at<bf16>(b, h, first), to.token, to.entry, width, count, across);
#ifdef HAS_HALF
  else
    write_values(from, to.at<half>(b, h, first), to.token, to.entry, width, count, across);
#endif
}

// What the block from this token on will read of an array, as rows of lines; one row after the other where they touch.
static void ahead_of(const Array& x, long width, long b, long h, long first, long length, Ahead::Part& part) {
  if (first >= length || !x.row_lines(width)) return;
  const long lines = x.row_lines(width);
  part = {x.address(b, h, first), least(T, length - first), lines, x.token * x.bytes() - lines * 64};
}

#define FRESH_BLOCKS 8

// Memory that comes fresh from the system, in one call instead of a fault per page; nothing happens where it is not.
static void fetch_pages(const Array& x, long b, long h, long first, long count) {
#if defined(__linux__)
  const uintptr_t page = 4096, begin = (uintptr_t)x.address(b, h, first) / page * page;
  const uintptr_t end = (uintptr_t)x.address(b, h, first + count);
  madvise((void*)begin, (end - begin + page - 1) / page * page, 23 /* MADV_POPULATE_WRITE */);
#else
  (void)x, (void)b, (void)h, (void)first, (void)count;
#endif
}
