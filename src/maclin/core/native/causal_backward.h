// Derivatives of causal attention: forwards for queries, backwards for keys and values; every block is made again.
//
// With dn_i and dd_i those of num_i and den_i (causal.h), R and r the sums of A_i dn_i^T and A_i dd_i behind the chunk:
//
//     g_ij = w_j (<v_j, dn_i> + dd_i)
//     dA_i = kv dn_i + z dd_i + sum_{j <= i} g_ij phi_j
//     dphi_j = w_j (R v_j + r) + sum_{i >= j} g_ij A_i        dv_j = w_j (R^T phi_j + sum_{i >= j} s_ij dn_i)
#pragma once

#include "backward.h"
#include "causal.h"

struct CausalBackward {
  int64_t size;
  Causal of;            // its out, last_kv and last_z are not used
  Array d, dq, dk, dv;  // d of out
  Array before;         // of out before ppSBN's second half; d where there is none
  float* per_row;       // (4, batch, heads, length): see PerRow
  float* of_weights;    // (splits, batch, heads, features) or null; is added to
  float* of_shift;      // (splits, batch, heads, head_dim) of that of the queries, or null; is added to
  float *of_gamma, *of_beta;          // (splits, batch, heads) or null
  float *of_kv, *of_z;                // (splits, batch, key_heads, features, width or nothing): of each piece alone, if several
  const float *behind_kv, *behind_z;  // (splits, ...): of the sums after the last token of each piece
  float *first_kv, *first_z;          // (splits, ...): of those before its first token
};

// What the way back needs of each query: factors of its row of ``before`` that give dn and what the constant feature's
// numerator gets beside; dd and the same of the denominator.
struct PerRow {
  float *share, *constant_share, *below, *constant_below;

  PerRow(const CausalBackward& job, long b, long h, long first) {
    const long all = job.of.batch * job.of.heads * job.of.length;
    share = job.per_row + (b * job.of.heads + h) * job.of.length + first;
    constant_share = share + all, below = share + 2 * all, constant_below = share + 3 * all;
  }
};

// Numerators of a chunk become dn, in place, and d (CHUNK, across) what it was before ppSBN's second half.
struct CausalUnsettle {
  float floor;
  const float *gamma, *beta;
  float of_gamma = 0.0f, of_beta = 0.0f;

  // of_factor (CHUNK) gets the derivatives of the constant feature of each query through the floor
  void operator()(float* rows, float* d, const float* raw, const float* safe, const Constants* constants, float factor,
                  long across, long count, PerRow of, float* of_factor) {
    for (long t = 0; t < count; t++, rows += across, d += across) {
      const float most = constants ? factor * constants->z[t] : 0.0f, least_z = floor * most;
      const float* constant_kv = constants ? constants->kv + t * across : nullptr;
      float below = safe[t], share = 1.0f, missing = 1.0f;
      const bool cut = constants && below < least_z;
      if (cut) missing = most - below, share = (most - least_z) / missing, below = least_z;
      const float inverse = 1.0f / below, power = gamma ? (*beta - 1.0f) * 0.5f : 0.0f;
      vf of_below{}, of_share{}, of_constant{}, g_sum{}, b_sum{};
      for (long i = 0; i < across; i += VW) {
        vf n = load(rows + i), g = load(d + i), bare = cut ? load(constant_kv + i) : vf{}, base = bare * factor;
        vf x = (cut ? base + share * (n - base) : n) * inverse;
        if (gamma) {
          vf square = x * x + EPS, log = vlog(square), dx = g * vexp(log * power);
          g_sum += dx * x;
          b_sum += dx * x * log;
          g = dx * (1.0f + (*beta - 1.0f) * (x * x / square)) * *gamma;
          store(d + i, g);
        }
        vf dn = g * inverse;
        of_below -= dn * x;
        if (cut) {
          of_share += dn * (n - base);
          of_constant += (1.0f - share) * dn * bare;
          dn *= share;
        }
        store(rows + i, dn);
      }
      float dd = sum(of_below), of_most = 0.0f;
      if (gamma) of_gamma += sum(g_sum), of_beta += sum(b_sum) * 0.5f * *gamma;
      if (cut) {
        const float s = sum(of_share);
        of_most = s * (share / most - share / missing) + dd * floor;
        dd = s * share / missing;
      }
      of.share[t] = share * inverse;
      of.constant_share[t] = cut ? (1.0f - share) * inverse * factor : 0.0f;
      of.below[t] = safe[t] == raw[t] ? dd : 0.0f;
      of.constant_below[t] = of_most * factor;
      of_factor[t] = cut ? sum(of_constant) + of_most * constants->z[t] : 0.0f;
    }
  }
};

// What the constant feature's sums get beside dn and dd; whether there is anything.
static bool constants_of(const CausalBackward& job, const PerRow& of, long b, long h, long at, long count, float* rows) {
  float share[CHUNK] = {};
  bool found = false;
  for (long t = 0; t < count; t++) {
    share[t] = of.constant_share[t];
    found |= share[t] != 0.0f || of.constant_below[t] != 0.0f;
  }
  if (found) load_rows(rows, job.before, b, h, at, job.of.width, count, share, CHUNK);
  return found;
}

struct QueriesMemory {
  Block keys, queries;
  Derivative d;
  Sums sums;
  float *weighted, *rows, *given, *turned, *extra, *raw, *safe, *of_factor, *kv, *z;
  Constants constants;

  QueriesMemory(const Causal& a, Arena& arena)
      : keys(a.key, arena), queries(a.query, arena, CHUNK), d(a.query, arena), sums(a, arena, true) {
    const long F = sums.F, across = sums.across;
    d.phi = arena.take((F + CHUNK) * T);
    weighted = a.weights ? arena.take((F + CHUNK) * T) : queries.phi;
    rows = arena.take(CHUNK * across), given = arena.take(CHUNK * across), extra = arena.take(CHUNK * across);
    turned = arena.take((across + 1) * CHUNK);
    raw = arena.take(CHUNK), safe = arena.take(CHUNK), of_factor = arena.take(CHUNK);
    kv = arena.take(F * across), z = arena.take(F);
    constants = {arena.take(CHUNK * across), arena.take(CHUNK)};
  }
  static long size(const Causal& a) {
    Arena arena{nullptr};
    QueriesMemory memory(a, arena);
    return (long)((uintptr_t)arena.next / sizeof(float));
  }
};

static void causal_queries_task(const CausalBackward& job, long task, float* memory) {
  const Causal& a = job.of;
  const long lanes = a.batch * a.key_heads, split = task / lanes, row = task % lanes;
  const long b = row / a.key_heads, hk = row % a.key_heads, groups = a.heads / a.key_heads;
  const long D = a.key.head_dim, blocks = (a.length + T - 1) / T;
  Arena arena{memory};
  QueriesMemory m(a, arena);
  const long F = m.sums.F, across = m.sums.across, step = m.sums.step;
  m.sums.start(a, a.kv + task * F * a.width, a.z + task * F);
  for (long i = 0; i < F * across; i++) m.kv[i] = 0.0f;
  for (long f = 0; f < F; f++) m.z[f] = 0.0f;
  for (long i = blocks * split / a.splits; i < blocks * (split + 1) / a.splits; i++) {
    const long first = i * T, count = least(T, a.length - first);
    m.sums.block(a, m.keys, b, hk, first, count);
    for (long g = 0; g < groups; g++) {
      const long h = hk * groups + g, at_head = (split * a.batch + b) * a.heads + h;
      attended(m.queries.weight, nullptr, 0, count);
      load_block(m.queries.x, a.q, b, h, first, D, count, m.queries.weight);
      prepare(a.query, h, m.queries.x, m.queries.norm);
      fill(a.query, h, m.queries, false, nullptr);
      if (a.weights) times_weights(a.weights + h * F, F, m.queries.phi, m.weighted);
      CausalUnsettle unsettle{(float)a.floor, a.gamma ? a.gamma + h : nullptr, a.beta ? a.beta + h : nullptr};
      for (long c = 0; c < CHUNKS && c * CHUNK < count; c++) {
        const Before& here = m.sums.before[c];
        const long at = first + c * CHUNK, of_chunk = least(CHUNK, count - c * CHUNK);
        const float* keys = m.keys.phi + c * CHUNK;
        float *phi = m.weighted + c * CHUNK, *within = phi + F * T, *of_phi = m.d.phi + c * CHUNK;
        multiply<true>(Product{keys, T, phi, T, within, T}, CHUNK, CHUNK, F, ZERO);
        without_later(within, T);
        denominators<CHUNK>(false, phi, F + CHUNK, here.z, here.size_of_z, of_chunk, m.safe, m.raw);
        multiply<true>(Product{phi, T, here.kv, step, m.rows, across, nullptr, nullptr, nullptr, F}, CHUNK, across,
                       F + CHUNK, ZERO);
        if (a.floor > 0.0) m.constants.fill(here, F, across, step, 1.0f);
        load_rows(m.given, job.d, b, h, at, a.width, of_chunk, m.queries.weight + c * CHUNK, CHUNK);
        const PerRow of(job, b, h, at);
        unsettle(m.rows, m.given, m.raw, m.safe, a.floor > 0.0 ? &m.constants : nullptr, phi[(F - 1) * T], across,
                 of_chunk, of, m.of_factor);
        if (a.gamma) write_rows(m.given, job.before, b, h, at, a.width, of_chunk);
        for (long t = of_chunk * across; t < CHUNK * across; t++) m.rows[t] = 0.0f;
        turn(m.rows, across, CHUNK, across, m.turned, CHUNK);
        float* below = m.turned + across * CHUNK;
        for (long t = 0; t < CHUNK; t++) below[t] = t < of_chunk ? of.below[t] : 0.0f;
        multiply<false>(Product{here.kv, step, m.turned, CHUNK, of_phi, T}, F + CHUNK, CHUNK, across + 1, ZERO);
        without_later(of_phi + F * T, T);
        multiply<false>(Product{keys, T, of_phi + F * T, T, of_phi, T}, F, CHUNK, CHUNK, ADD);
        if (a.floor > 0.0)
          for (long t = 0; t < of_chunk; t++) of_phi[(F - 1) * T + t] += m.of_factor[t];
        if (job.of_kv) {
          multiply<false>(Product{phi, T, m.rows, across, m.kv, across}, F, across, CHUNK, ADD);
          advance_z(phi, F, below, m.z, m.z);
          if (a.floor > 0.0 && constants_of(job, of, b, h, at, of_chunk, m.extra))
            for (long t = 0; t < of_chunk; t++) {
              for (long d = 0; d < across; d++) m.kv[(F - 1) * across + d] += m.extra[t * across + d];
              m.z[F - 1] += of.constant_below[t];
            }
        }
      }
      if (a.weights) {
        const long used = (count + CHUNK - 1) / CHUNK * CHUNK;
        for (long f = 0; f < F; f++) {
          vf total{};
          for (long t = 0; t < used; t += VW) {
            vf y = load(m.d.phi + f * T + t);
            total += load(m.queries.phi + f * T + t) * y;
            store(m.d.phi + f * T + t, y * a.weights[h * F + f]);
          }
          if (job.of_weights) job.of_weights[at_head * F + f] += sum(total);
        }
      }
      if (job.of_gamma) job.of_gamma[at_head] += unsettle.of_gamma, job.of_beta[at_head] += unsettle.of_beta;
      float* of_shift = job.of_shift ? job.of_shift + at_head * D : nullptr;
      through_features(a.query, h, m.queries, m.d, false, nullptr, job.dq, b, h, first, count, nullptr, of_shift);
    }
    m.sums.next();
  }
  for (long f = 0; job.of_kv && f < F; f++) {
    job.of_z[task * F + f] = m.z[f];
    for (long d = 0; d < a.width; d++) job.of_kv[(task * F + f) * a.width + d] = m.kv[f * across + d];
  }
}
