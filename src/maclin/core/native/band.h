// The hybrid: exact weights of the keys around each query, and what features give for all the others; see band_near.h.
#pragma once

#include "band_near.h"

struct BandMemory {
  Around around;
  float *kv, *z, *rows, *least_rows;

  BandMemory(const Band& a, Arena& arena, long b, long g) : around(a, arena, b, g, false) {
    const long F = a.key.features(), across = up(a.width);
    kv = arena.take(F * across), z = arena.take(F), rows = arena.take(T * across), least_rows = arena.take(T * across);
  }
  static long size(const Band& a) {
    Arena arena{nullptr};
    BandMemory memory(a, arena, 0, 0);
    return arena.next - (float*)nullptr;
  }
};

// rows (T, across) of the sums, and of the constant feature alone, on the scale of the largest exponential
static void read_sums(const Around& w, const float* kv, float* rows, float* least_rows) {
  const long F = w.F, across = w.across;
  if (F)
    multiply<true>(Product{w.queries.phi, T, kv, across, rows, across}, T, across, F, ZERO);
  for (long t = 0; t < T; t++) {
    const float scale = w.factor[t], last = F ? w.queries.phi[(F - 1) * T + t] * scale : 0.0f;
    for (long d = 0; d < across; d += VW) {
      store(rows + t * across + d, F ? load(rows + t * across + d) * scale : vf{});
      if (w.floored) store(least_rows + t * across + d, load(kv + (F - 1) * across + d) * last);
    }
  }
}

// As many keys as there were queries leave their windows for the sums; their features are overwritten.
static void leave(const Around& w, Keys& keys, float* kv, float* z) {
  const long F = w.F, across = w.across;
  for (long t = w.count; t < T; t++) keys.block.weight[t] = 0.0f;
  for (long f = 0; f < F; f++) {
    vf total{};
    TV {
      vf y = load(keys.block.phi + f * T + t) * load(keys.block.weight + t);
      store(keys.block.phi + f * T + t, y);
      total += y;
    }
    z[f] += sum(total);
  }
  multiply<false>(Product{keys.block.phi, T, keys.values, across, kv, across}, F, across, T, ADD);
}

static void band_task(const Band& a, long task, float* memory) {
  const long chunk = task % a.chunks, head = task / a.chunks * a.together, b = head / a.heads, h0 = head % a.heads;
  const long groups = a.heads / a.key_heads, g = h0 / groups, of_key = b * a.key_heads + g;
  const long F = a.key.features(), across = up(a.width), blocks = (a.length + T - 1) / T;
  Arena arena{memory};
  BandMemory m(a, arena, b, g);
  Around& w = m.around;
  float *kv = m.kv, *z = m.z, *rows = m.rows;
  for (long f = 0; f < F; f++) {
    z[f] = a.z[of_key * F + f];
    for (long d = 0; d < across; d++) kv[f * across + d] = d < a.width ? a.kv[(of_key * F + f) * a.width + d] : 0.0f;
  }
  w.begin();
  for (long i = blocks * chunk / a.chunks; i < blocks * (chunk + 1) / a.chunks; i++) {
    w.bring(i);
    for (long h = h0; h < h0 + a.together; h++) {
      w.take_queries(h);
      w.weigh<true>(z);
      read_sums(w, kv, rows, m.least_rows);
      for (const Near& n : w.near)
        for (long c = 0; c < T; c += STRIP) {
          const Rows any = w.of_any(n, c);
          const float* values = n.keys->values + any.low * across;
          Product p{n.exact + any.low * T + c, T, values, across, rows + c * across, across};
          if (any.count()) multiply<true>(p, STRIP, across, any.count(), ADD);
          p.a = n.pairs + any.low * T + c, p.c = m.least_rows + c * across;
          if (any.count() && w.floored) multiply<true>(p, STRIP, across, any.count(), ADD);
        }
      w.guard();
      const bool as_given = a.out.type == FLOAT && a.out.entry == 1 && a.width == across;
      Settle settle{(float)a.floor, w.floored ? w.least_below : nullptr, w.floored ? m.least_rows : nullptr, 1, across,
                    a.gamma ? a.gamma + h : nullptr, a.beta ? a.beta + h : nullptr};
      float* to = as_given ? a.out.at<float>(b, h, w.first) : rows;
      settle(rows, w.below, across, w.count, to, as_given ? a.out.token : across);
      if (!as_given) write_rows(rows, a.out, b, h, w.first, a.width, w.count);
    }
    if (F && a.causal && !w.near.empty() && w.near[0].apart == 0 && !w.near[0].keys->since)
      leave(w, *w.near[0].keys, kv, z);
  }
  if (F && a.causal && h0 % groups == 0)
    for (long f = 0; f < F; f++) {
      a.last_z[of_key * F + f] = z[f];
      for (long d = 0; d < a.width; d++) a.last_kv[(of_key * F + f) * a.width + d] = kv[f * across + d];
    }
}
