// Derivatives of causal_logs.h: forwards for queries, backwards for keys and values.
#pragma once

#include "causal_logs.h"

struct LogDerivatives {
  Runs runs;
  Derivative d;
  float *made, *of_phi, *given, *turned;

  LogDerivatives(const CausalLogs& a, Arena& arena) : runs(a, arena), d(a.key, arena) {
    made = arena.take(runs.F * T), of_phi = arena.take((runs.F + CHUNK) * T);
    given = arena.take(CHUNK * runs.step), turned = arena.take((runs.across + 1) * T);
  }
  // Products of exponentials and their derivatives are made in blocks, whose other columns are not looked at.
  void clear() {
    for (long i = 0; i < runs.F * T; i++) made[i] = d.phi[i] = 0.0f;
  }
};

static void causal_logs_queries_task(const CausalLogs& a, long task, float* memory) {
  const long b = task / a.heads, h = task % a.heads, row = b * a.key_heads + h / (a.heads / a.key_heads);
  const long blocks = (a.length + T - 1) / T;
  Arena arena{memory};
  LogDerivatives all(a, arena);
  Runs& m = all.runs;
  const long F = m.F, across = m.across;
  m.begin(a, row);
  for (long i = 0; i < blocks; i++) {
    const long first = i * T, count = least(T, a.length - first);
    for (long f = 0; f < F; f++) a.tops[(task * blocks + i) * F + f] = m.top[f];
    m.block(a, b, h, first, count);
    all.clear();
    for (long from = 0; from < count; from = m.stop) {
      m.find(from, count);
      m.keys_of_run();
      m.queries_of_run();
      m.meet(a, b, h, first, count);
      m.numerators();
      float of_run[CHUNK], below[CHUNK];
      for (long t = 0; t < CHUNK; t++) of_run[t] = m.at + t >= from && m.at + t < m.stop ? 1.0f : 0.0f;
      load_rows(all.given, a.d, b, h, first + m.at, a.width, count - m.at, of_run, CHUNK, across);
      float* per_row = a.per_row + task * a.length + first + m.at;
      for (long t = 0; t < CHUNK; t++) {
        float* x = m.rows + t * across;
        const float inverse = 1.0f / m.safe[t];
        vf total{};
        for (long d = 0; d < across; d += VW) {
          vf g = load(all.given + t * across + d) * inverse, n = load(x + d) * inverse;
          total -= of_run[t] != 0.0f ? g * n : vf{};
          store(x + d, of_run[t] != 0.0f ? g : vf{});
        }
        below[t] = of_run[t] != 0.0f && m.safe[t] == m.raw[t] ? sum(total) : 0.0f;
        if (of_run[t] != 0.0f) per_row[t] = inverse, per_row[a.batch * a.heads * a.length + t] = below[t];
      }
      turn(m.rows, across, CHUNK, across, all.turned, CHUNK);
      for (long t = 0; t < CHUNK; t++) all.turned[across * CHUNK + t] = below[t];
      multiply<false>(Product{m.kv, m.step, all.turned, CHUNK, all.of_phi, T}, F + CHUNK, CHUNK, across + 1, ZERO);
      without_later(all.of_phi + F * T, T);
      multiply<false>(Product{m.e_k, T, all.of_phi + F * T, T, all.of_phi, T}, F, CHUNK, CHUNK, ADD);
      columns_of_run(m, m.e_q, all.made);
      columns_of_run(m, all.of_phi, all.d.phi);
      m.advance();
    }
    Block made = m.queries;
    made.phi = all.made;
    through_features(a.query, h, made, all.d, false, nullptr, a.dq, b, h, first, count);
  }
}

struct LogKeysMemory {
  LogDerivatives all;
  float *similar, *behind, *r, *dv, *bases;
  long *starts;

  LogKeysMemory(const CausalLogs& a, Arena& arena) : all(a, arena) {
    similar = arena.take(CHUNK * CHUNK), behind = arena.take(all.runs.F * all.runs.step), r = arena.take(all.runs.F);
    dv = arena.take(T * all.runs.across), bases = arena.take((T + 1) * all.runs.F);
    starts = (long*)arena.take(4 * (T + 1));
  }
  static long size(const CausalLogs& a) {
    Arena arena{nullptr};
    LogKeysMemory memory(a, arena);
    return (long)((uintptr_t)arena.next / sizeof(float)) + 512;
  }
};

static void causal_logs_keys_task(const CausalLogs& a, long task, float* memory) {
  const long b = task / a.heads, h = task % a.heads, hk = h / (a.heads / a.key_heads), groups = a.heads / a.key_heads;
  const long row = b * a.key_heads + hk, blocks = (a.length + T - 1) / T;
  Arena arena{memory};
  LogKeysMemory k(a, arena);
  LogDerivatives& all = k.all;
  Runs& m = all.runs;
  const long F = m.F, across = m.across, step = m.step;
  const bool given = h % groups == 0;  // derivatives of the last sums count once
  for (long f = 0; f < F; f++) {
    k.r[f] = given ? a.behind_z[row * F + f] : 0.0f, m.top[f] = a.last_log_scale[row * F + f];
    for (long d = 0; d < step; d++)
      k.behind[f * step + d] = given && d < a.width ? a.behind_kv[(row * F + f) * a.width + d] : 0.0f;
  }
  float* scales = m.z;  // of what is behind
  for (long f = 0; f < F; f++) scales[f] = m.top[f];
  auto rescale = [&](const float* to) {
    for (long f = 0; f < F; f++) {
      if (to[f] == scales[f]) continue;
      const float shrink = to[f] == -INFINITY ? 0.0f : std::exp(to[f] - scales[f]);
      for (long d = 0; d < across; d += VW) store(k.behind + f * step + d, load(k.behind + f * step + d) * shrink);
      k.r[f] *= shrink, scales[f] = to[f];
    }
  };
  for (long i = blocks - 1; i >= 0; i--) {
    const long first = i * T, count = least(T, a.length - first);
    m.block(a, b, h, first, count);
    all.clear();
    for (long f = 0; f < F; f++) m.top[f] = a.tops[(task * blocks + i) * F + f];
    long runs = 0;
    for (long from = 0; from < count; from = m.stop, runs++) {
      m.find(from, count);
      k.starts[runs] = from;
      for (long f = 0; f < F; f++) k.bases[runs * F + f] = m.top[f] = m.base[f];
    }
    k.starts[runs] = count;
    for (long n = runs - 1; n >= 0; n--) {
      m.start = k.starts[n], m.stop = k.starts[n + 1], m.at = m.start / CHUNK * CHUNK;
      for (long f = 0; f < F; f++) m.base[f] = k.bases[n * F + f];
      m.keys_of_run();
      m.queries_of_run();
      rescale(m.base);
      for (long f = 0; f < F; f++) k.behind[f * step + across] = k.r[f];
      // values (across + 1, CHUNK), the weights last; rows of queries (CHUNK, step), dd behind them
      load_rows(m.rows, a.v, b, hk, first + m.at, a.width, count - m.at, m.inside, CHUNK, across);
      turn(m.rows, across, CHUNK, across, all.turned, CHUNK);
      for (long t = 0; t < CHUNK; t++) all.turned[across * CHUNK + t] = m.inside[t];
      float share[CHUNK], below[CHUNK];
      const float* per_row = a.per_row + task * a.length + first + m.at;
      for (long t = 0; t < CHUNK; t++) {
        const bool on = m.at + t >= m.start && m.at + t < m.stop;
        share[t] = on ? per_row[t] : 0.0f, below[t] = on ? per_row[a.batch * a.heads * a.length + t] : 0.0f;
      }
      load_rows(all.given, a.d, b, h, first + m.at, a.width, count - m.at, share, CHUNK, step);
      for (long t = 0; t < CHUNK; t++) all.given[t * step + across] = below[t];
      multiply<true>(Product{m.e_k, T, m.e_q, T, k.similar, CHUNK}, CHUNK, CHUNK, F, ZERO);
      without_later(k.similar, CHUNK);
      float* g = all.of_phi + F * T;
      multiply<false>(Product{all.given, step, all.turned, CHUNK, g, CHUNK}, CHUNK, CHUNK, across + 1, ZERO);
      without_behind(g);
      multiply<false>(Product{k.behind, step, all.turned, CHUNK, all.of_phi, T}, F, CHUNK, across + 1, ZERO);
      multiply<false>(Product{m.e_q, T, g, CHUNK, all.of_phi, T}, F, CHUNK, CHUNK, ADD);
      multiply<true>(Product{m.e_k, T, k.behind, step, m.rows, across}, CHUNK, across, F, ZERO);
      multiply<false>(Product{k.similar, CHUNK, all.given, step, m.rows, across}, CHUNK, across, CHUNK, ADD);
      for (long t = m.start - m.at; t < m.stop - m.at; t++)
        for (long d = 0; d < across; d += VW)
          store(k.dv + (m.at + t) * across + d, m.inside[t] != 0.0f ? load(m.rows + t * across + d) : vf{});
      columns_of_run(m, m.e_k, all.made);
      columns_of_run(m, all.of_phi, all.d.phi);
      multiply<false>(Product{m.e_q, T, all.given, step, k.behind, step}, F, across, CHUNK, ADD);
      advance_z(m.e_q, F, below, k.r, k.r);
    }
    write_rows(k.dv, a.dv, b, h, first, a.width, count);
    Block made = m.keys;
    made.phi = all.made;
    through_features(a.key, hk, made, all.d, true, nullptr, a.dk, b, h, first, count);
  }
  rescale(a.log_scale + row * F);
  for (long f = 0; f < F; f++) {
    a.first_z[task * F + f] = k.r[f];
    for (long d = 0; d < a.width; d++) a.first_kv[(task * F + f) * a.width + d] = k.behind[f * step + d];
  }
}
