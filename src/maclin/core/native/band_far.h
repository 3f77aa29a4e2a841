// Causal hybrid: derivatives of the keys that have left the window, from the last block to the first.
//
// With U and u the sums of e_i A_i dn_i^T and e_i A_i dd_i over the queries behind a block of keys:
//
//     dphi_j = w_j (U v_j + u + sum_between e_i A_i (<dn_i, v_j> + dd_i)),   dv_j = w_j U^T phi_j + ...
//
// where ``band_backward_task`` has seen to what is between, and to everything exact.
#pragma once

#include "band_backward.h"

struct BandFar {
  int64_t size;
  Band of;
  Array d;              // derivatives of out, before ppSBN's second half
  Array dk, dv;         // are added to
  const float* per_row; // (batch, heads, length, 4): factors of dout, and what is added; of all features, of the constant
  const float *of_last_kv, *of_last_z;  // (batch, key_heads, features, width or nothing)
  float *of_kv, *of_z;
};

struct BandFarMemory {
  Block keys, queries;
  Derivative d;
  float *kv, *z, *values, *rows, *d_turned, *d_rows, *phi_rows, *of_phi, *of_last, *on, *given, *more, *of_log_weight;
  float* row[4];

  BandFarMemory(const Band& a, Arena& arena)
      : keys(a.key, arena, 2 * VW), queries(a.query, arena, 2 * VW), d(BandDerivatives::roomy(a.key), arena) {
    const long F = a.key.features(), across = up(a.width), wide = up(a.moving());
    kv = arena.take(F * across), z = arena.take(F), values = arena.take(across * T), rows = arena.take(T * across);
    d_turned = arena.take(across * T), d_rows = arena.take(T * across), phi_rows = arena.take(T * wide);
    of_phi = arena.take(T * wide), of_last = arena.take(T), on = arena.take(T), given = arena.take(T * T);
    more = arena.take(up(a.key.head_dim) * T), of_log_weight = arena.take(T);
    for (float*& x : row) x = arena.take(T);
  }
  static long size(const Band& a) {
    Arena arena{nullptr};
    BandFarMemory memory(a, arena);
    return arena.next - (float*)nullptr;
  }
};

// What the queries of the block itself give the keys before their window: products with features in rows of keys.
static void between(const Band& a, BandFarMemory& m, long kept) {
  const long F = a.key.features(), wide = up(a.moving()), across = up(a.width);
  const float* last = m.queries.phi + (F - 1) * T;
  turn(m.queries.phi, T, wide, T, m.phi_rows, wide);
  for (long c = 0; c < T; c += STRIP) {
    const long rows = least(kept, c + STRIP);
    multiply<true>(Product{m.values, T, m.d_turned + c, T, m.given + c, T}, rows, STRIP, a.width, ZERO);
    for (long r = 0; r < rows; r++) {
      vf of_last{};
      SV {
        vi later = splati((int32_t)r) <= Around::lanes(t);
        vf g = load(m.given + r * T + t);
        of_last += later ? load(last + t) * (load(m.row[1] + t) * g + load(m.row[3] + t)) : vf{};
        store(m.given + r * T + t, later ? load(m.row[0] + t) * g + load(m.row[2] + t) : vf{});
      }
      m.of_last[r] += sum(of_last);
    }
    multiply<false>(Product{m.given + c, T, m.phi_rows + c * wide, wide, m.of_phi, wide}, rows, wide, STRIP, ADD);
  }
}

static void band_far_task(const BandFar& job, long task, float* memory) {
  const Band& a = job.of;
  const long b = task / a.key_heads, g = task % a.key_heads, groups = a.heads / a.key_heads;
  const long F = a.key.features(), D = a.key.head_dim, across = up(a.width), wide = up(a.moving());
  Arena arena{memory};
  BandFarMemory m(a, arena);
  for (long f = 0; f < F; f++) {
    m.z[f] = job.of_last_z[task * F + f];
    for (long i = 0; i < across; i++)
      m.kv[f * across + i] = i < a.width ? job.of_last_kv[(task * F + f) * a.width + i] : 0.0f;
  }
  for (long i = a.width * T; i < across * T; i++) m.values[i] = m.d_turned[i] = 0.0f;
  for (long i = F * T; i < (F + 2 * VW) * T; i++) m.queries.phi[i] = 0.0f;
  for (long i = D * T; i < up(D) * T; i++) m.more[i] = 0.0f;
  for (long i = (a.length + T - 1) / T - 1; i >= 0; i--) {
    const long first = i * T, count = least(T, a.length - first);
    const uint8_t* mask = a.mask ? a.mask + b * a.mask_batch + first * a.mask_token : nullptr;
    long kept = attended(m.on, mask, a.mask_token, count) ? count : 0;
    while (kept && m.on[kept - 1] == 0.0f) kept--;
    if (kept) {
      TV store(m.keys.weight + t, load(m.on + t));
      load_block(m.keys.x, a.k, b, g, first, D, count, m.on);
      prepare(a.key, g, m.keys.x, m.keys.norm);
      fill(a.key, g, m.keys, true, nullptr);
      load_block(m.values, a.v, b, g, first, a.width, count, m.on);
      multiply<false>(Product{m.kv, across, m.values, T, m.d.phi, T, m.z}, F, T, a.width, ROWS);
      multiply<true>(Product{m.keys.phi, T, m.kv, across, m.rows, across}, T, across, F, ZERO);
      for (long n = 0; n < T * wide; n += VW) store(m.of_phi + n, vf{});
      TV store(m.of_last + t, vf{});
    }
    for (long h = g * groups; h < (g + 1) * groups; h++) {
      attended(m.queries.weight, nullptr, 0, count);
      load_block(m.queries.x, a.q, b, h, first, a.query.head_dim, count, m.queries.weight);
      prepare(a.query, h, m.queries.x, m.queries.norm);
      fill(a.query, h, m.queries, false, nullptr);
      if (a.weights)
        for (long f = 0; f < F; f++) scaled(m.queries.phi + f * T, T, a.weights[h * F + f]);
      load_rows(m.d_rows, job.d, b, h, first, a.width, count, m.queries.weight);
      const float* of = job.per_row + ((b * a.heads + h) * a.length + first) * 4;
      for (long n = 0; n < 4; n++)
        for (long t = 0; t < T; t++) m.row[n][t] = t < count ? of[t * 4 + n] : 0.0f;
      if (kept) {
        load_block(m.d_turned, job.d, b, h, first, a.width, count, m.queries.weight);
        between(a, m, kept);
      }
      for (long f = 0; f < F; f++) {
        const float *of_kv = m.row[f == F - 1], *of_z = m.row[2 + (f == F - 1)];
        vf total{};
        TV {
          vf y = load(m.queries.phi + f * T + t);
          total += y * load(of_z + t);
          store(m.queries.phi + f * T + t, y * load(of_kv + t));
        }
        m.z[f] += sum(total);
      }
      multiply<false>(Product{m.queries.phi, T, m.d_rows, across, m.kv, across}, F, across, T, ADD);
    }
    if (!kept) continue;
    turn(m.of_phi, wide, T, wide, m.queries.phi, T);
    for (long n = 0; n < a.moving() * T; n += VW) store(m.d.phi + n, load(m.d.phi + n) + load(m.queries.phi + n));
    TV {
      float* of_constant = m.d.phi + (F - 1) * T + t;
      store(of_constant, load(of_constant) + load(m.of_last + t));
      vf w = load(m.keys.weight + t), total{};
      for (long f = 0; f < F; f++) {
        vf y = load(m.d.phi + f * T + t);
        total += load(m.keys.phi + f * T + t) * y;
        store(m.d.phi + f * T + t, y * w);
      }
      vf log = a.key.weighted ? load(m.keys.u + (a.key.projections - 1) * T + t) : vf{};
      store(m.of_log_weight + t, vabs(log) > MOST_EXPONENT ? vf{} : total * w);
    }
    load_rows(m.d_rows, job.dv, b, g, first, a.width, count, m.on);
    for (long t = 0; t < count; t++)
      for (long n = t * across; n < (t + 1) * across; n += VW)
        store(m.rows + n, load(m.rows + n) * m.keys.weight[t] + load(m.d_rows + n));
    write_rows(m.rows, job.dv, b, g, first, a.width, count);
    load_block(m.more, job.dk, b, g, first, D, count, m.on);
    through_features(a.key, g, m.keys, m.d, true, a.key.weighted ? m.of_log_weight : nullptr, job.dk, b, g, first,
                     count, m.more);
  }
  for (long f = 0; f < F; f++) {
    for (long i = 0; i < a.width; i++) job.of_kv[(task * F + f) * a.width + i] = m.kv[f * across + i];
    job.of_z[task * F + f] = m.z[f];
  }
}
