// The way back of causal_backward.h: from the last block to the first, with the sums R and r over the queries behind.
#pragma once

#include "causal_backward.h"

// R with r as one column more, behind each chunk and, first of all, before the first one.
struct Behind {
  float *kv, *z;  // (features, step), (features)
};

struct KeysMemory {
  Block keys, queries;
  Derivative d;
  Behind behind[CHUNKS + 1];
  long F, across, step;
  float *values, *rows, *on, *similar, *given, *dn, *below, *extra, *of_log_weight;

  KeysMemory(const Causal& a, Arena& arena)
      : keys(a.key, arena), queries(a.query, arena), d(a.key, arena), F(a.key.features()), across(up(a.width)) {
    step = across + VW;
    for (auto& x : behind) x.kv = arena.take(F * step), x.z = arena.take(F);
    values = arena.take((across + 1) * T), rows = arena.take(T * across), on = arena.take(T);
    similar = arena.take(CHUNK * CHUNK), given = arena.take(CHUNK * CHUNK);
    dn = arena.take(T * step), below = arena.take(T), extra = arena.take(CHUNK * across), of_log_weight = arena.take(T);
  }
  static long size(const Causal& a) {
    Arena arena{nullptr};
    KeysMemory memory(a, arena);
    return (long)((uintptr_t)arena.next / sizeof(float));
  }

  // Keys of a block, and its values (across + 1, T) times their weights, which come last.
  void block(const Causal& a, long b, long hk, long first, long count) {
    attended(keys.weight, a.mask ? a.mask + b * a.mask_batch + first * a.mask_token : nullptr, a.mask_token, count);
    TV store(on + t, load(keys.weight + t));
    load_block(keys.x, a.k, b, hk, first, a.key.head_dim, count, on);
    prepare(a.key, hk, keys.x, keys.norm);
    fill(a.key, hk, keys, true, nullptr);
    load_block(values, a.v, b, hk, first, a.width, count, on);
    for (long d = 0; a.key.weighted && d < a.width; d++)
      TV store(values + d * T + t, load(values + d * T + t) * load(keys.weight + t));
    TV store(values + across * T + t, load(keys.weight + t));
    TV store(of_log_weight + t, vf{});
  }
  // Through what the constant feature gives the queries of a chunk, whose derivatives are in extra.
  void constants(const PerRow& of, long c, long count, Behind& to) {
    float* sums = extra + (count - 1) * across;  // from here on: of the last query, of the last two, ...
    float of_z = 0.0f;
    for (long t = count - 1; t >= 0; t--, sums -= across) {
      const long at = c * CHUNK + t;
      of_z += of.constant_below[at];
      float of_weight = of_z * keys.weight[at];
      for (long d = 0; d < across; d++) {
        if (t + 1 < count) sums[d] += sums[across + d];
        rows[at * across + d] += sums[d];
        of_weight += sums[d] * values[d * T + at];
      }
      of_log_weight[at] += of_weight;
    }
    for (long d = 0; d < across; d++) to.kv[(F - 1) * step + d] += extra[d];
    to.z[F - 1] += of_z;
  }
};

// Numbers (CHUNK queries, CHUNK keys) of the keys behind a query become 0.
static void without_behind(float* x) {
  for (long i = 0; i < CHUNK; i++)
    for (long t = i / VW * VW; t < CHUNK; t += VW) {
      vf y = load(x + i * CHUNK + t);
      for (int l = 0; l < VW; l++) y[l] = t + l > i ? 0.0f : y[l];
      store(x + i * CHUNK + t, y);
    }
}

// The queries of one head and block: to the derivatives of the keys of their chunks, and to the sums before each chunk.
static void causal_keys_of_head(const CausalBackward& job, KeysMemory& m, long b, long h, long first, long count, bool more,
                                bool alone) {
  const Causal& a = job.of;
  const long F = m.F, across = m.across, step = m.step;
  attended(m.queries.weight, nullptr, 0, count);
  load_block(m.queries.x, a.q, b, h, first, a.key.head_dim, count, m.queries.weight);
  prepare(a.query, h, m.queries.x, m.queries.norm);
  fill(a.query, h, m.queries, false, nullptr);
  if (a.weights) times_weights(a.weights + h * F, F, m.queries.phi, m.queries.phi);
  const PerRow of(job, b, h, first);
  float share[T];
  for (long t = 0; t < T; t++) share[t] = t < count ? of.share[t] : 0.0f, m.below[t] = t < count ? of.below[t] : 0.0f;
  load_rows(m.dn, job.before, b, h, first, a.width, count, share, T, step);
  for (long t = 0; t < T; t++) m.dn[t * step + across] = m.below[t];
  for (long c = CHUNKS - 1; c >= 0; c--) {
    const long at = c * CHUNK, of_chunk = least(CHUNK, count - at);
    const float *phi = m.queries.phi + at, *dn = m.dn + at * step;
    Behind &to = m.behind[c], &here = m.behind[c + 1];
    multiply<true>(Product{m.keys.phi + at, T, phi, T, m.similar, CHUNK}, CHUNK, CHUNK, F, ZERO);
    without_later(m.similar, CHUNK);
    multiply<false>(Product{dn, step, m.values + at, T, m.given, CHUNK}, CHUNK, CHUNK, across + 1, ZERO);
    without_behind(m.given);
    multiply<false>(Product{phi, T, m.given, CHUNK, m.d.phi + at, T}, F, CHUNK, CHUNK, more ? ADD : ZERO);
    multiply<false>(Product{m.similar, CHUNK, dn, step, m.rows + at * across, across}, CHUNK, across, CHUNK,
                    more ? ADD : ZERO);
    multiply<false>(Product{phi, T, dn, step, to.kv, step, nullptr, nullptr, alone ? here.kv : nullptr}, F, across, CHUNK,
                    alone || more ? ADD : ZERO);
    for (long f = 0; !alone && !more && f < F; f++) to.z[f] = 0.0f;
    advance_z(phi, F, m.below + at, alone ? here.z : to.z, to.z);
    if (a.floor > 0.0 && of_chunk > 0) {
      const PerRow chunk(job, b, h, first + at);
      if (constants_of(job, chunk, b, h, first + at, of_chunk, m.extra)) m.constants(of, c, of_chunk, to);
    }
  }
}

static void causal_keys_task(const CausalBackward& job, long task, float* memory) {
  const Causal& a = job.of;
  const long lanes = a.batch * a.key_heads, split = task / lanes, row = task % lanes;
  const long b = row / a.key_heads, hk = row % a.key_heads, groups = a.heads / a.key_heads;
  const long blocks = (a.length + T - 1) / T;
  Arena arena{memory};
  KeysMemory m(a, arena);
  const long F = m.F, across = m.across, step = m.step;
  const float *given_kv = job.behind_kv + task * F * a.width, *given_z = job.behind_z + task * F;
  for (long f = 0; f < F; f++) {
    m.behind[CHUNKS].z[f] = given_z[f];
    for (long d = 0; d < step; d++) m.behind[CHUNKS].kv[f * step + d] = d < a.width ? given_kv[f * a.width + d] : 0.0f;
  }
  for (long i = 0; i < across * T; i++) m.values[i] = 0.0f;
  for (long i = blocks * (split + 1) / a.splits - 1; i >= blocks * split / a.splits; i--) {
    const long first = i * T, count = least(T, a.length - first);
    m.block(a, b, hk, first, count);
    for (long g = 0; g < groups; g++) causal_keys_of_head(job, m, b, hk * groups + g, first, count, g > 0, groups == 1);
    for (long c = CHUNKS - 1; c >= 0; c--) {
      Behind &to = m.behind[c], &here = m.behind[c + 1];
      for (long f = 0; groups > 1 && f < F; f++) {
        to.z[f] += here.z[f];
        for (long d = 0; d < across; d += VW)
          store(to.kv + f * step + d, load(to.kv + f * step + d) + load(here.kv + f * step + d));
      }
      for (long f = 0; f < F; f++) here.kv[f * step + across] = here.z[f];
      const long at = c * CHUNK;
      multiply<false>(Product{here.kv, step, m.values + at, T, m.d.phi + at, T}, F, CHUNK, across + 1, ADD);
      multiply<true>(Product{m.keys.phi + at, T, here.kv, step, m.rows + at * across, across}, CHUNK, across, F, ADD);
    }
    for (long t = 0; t < count; t++) {
      const float w = m.keys.weight[t];
      if (w == 1.0f) continue;
      float* to = m.rows + t * across;
      for (long j = 0; j < across; j += VW) store(to + j, w == 0.0f ? vf{} : load(to + j) * w);
    }
    write_rows(m.rows, job.dv, b, hk, first, a.width, count);
    if (a.key.weighted) TV {
      vf total = load(m.of_log_weight + t), log = load(m.keys.u + (a.key.projections - 1) * T + t);
      for (long f = 0; f < F; f++) total += load(m.keys.phi + f * T + t) * load(m.d.phi + f * T + t);
      store(m.of_log_weight + t, vabs(log) > MOST_EXPONENT ? vf{} : total);
    }
    through_features(a.key, hk, m.keys, m.d, true, a.key.weighted ? m.of_log_weight : nullptr, job.dk, b, hk, first,
                     count);
    Behind reached = m.behind[0];
    m.behind[0] = m.behind[CHUNKS];
    m.behind[CHUNKS] = reached;
  }
  for (long f = 0; f < F; f++) {
    job.first_z[task * F + f] = m.behind[CHUNKS].z[f];
    for (long d = 0; d < a.width; d++)
      job.first_kv[(task * F + f) * a.width + d] = m.behind[CHUNKS].kv[f * step + d];
  }
}
