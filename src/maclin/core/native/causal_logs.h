// Causal attention with positive features, handed over as logarithms: the sums have a scale per feature, the largest
// logarithm so far, and a chunk is cut into runs within which no later key outshines the first by more than exp(MOST_RISE).
//
// Of a run, with b_f the largest logarithm up to its end, e_jf = exp(log phi(k_j)_f - b_f) and
// A_if = exp(log phi(q_i)_f + b_f - the largest of the row), everything is as in causal.h and causal_backward.h.
#pragma once

#include "causal_keys.h"

#define MOST_RISE 40.0f

struct CausalLogs {
  int64_t size;
  int64_t batch, heads, key_heads, length, width;
  Map query, key;
  Array q, k, v, out;
  const uint8_t* mask;
  int64_t mask_batch, mask_token;
  const float *kv, *z, *log_scale;           // (batch, key_heads, features, width or nothing), before the first token
  float *last_kv, *last_z, *last_log_scale;  // after the last token
  Array d, dq, dk, dv;                       // dk and dv of every query head
  float* per_row;                            // (2, batch, heads, length): 1 / den, dd
  float* tops;                               // (batch, heads, blocks, features): scales before each block
  const float *behind_kv, *behind_z;         // (batch, key_heads, ...): derivatives of the sums after the last token
  float *first_kv, *first_z;                 // (batch, heads, ...): of those before the first
};

// A head: its keys' logarithms, the sums before a run, and the run itself in the first columns of e_k and e_q.
struct Runs {
  Block keys, queries;
  long F, across, step, at = 0, start = 0, stop = 0;  // of the run, in the block: its chunk, from, to
  float *kv, *z, *top, *base, *reference, *e_k, *e_q, *rows, *raw, *safe, *inside;

  Runs(const CausalLogs& a, Arena& arena)
      : keys(a.key, arena), queries(a.query, arena), F(a.key.features()), across(up(a.width)), step(across + VW) {
    kv = arena.take((F + CHUNK) * step), z = arena.take(F + CHUNK);
    top = arena.take(F), base = arena.take(F), reference = arena.take(F);
    e_k = arena.take(F * T), e_q = arena.take((F + CHUNK) * T), rows = arena.take(CHUNK * across);
    raw = arena.take(CHUNK), safe = arena.take(CHUNK), inside = arena.take(CHUNK);
  }
  void begin(const CausalLogs& a, long row) {
    for (long f = 0; f < F; f++) {
      top[f] = a.log_scale[row * F + f], z[f] = a.z[row * F + f];
      for (long d = 0; d < step; d++) kv[f * step + d] = d < a.width ? a.kv[(row * F + f) * a.width + d] : 0.0f;
    }
  }
  void block(const CausalLogs& a, long b, long h, long first, long count) {
    const long hk = h / (a.heads / a.key_heads);
    attended(keys.weight, a.mask ? a.mask + b * a.mask_batch + first * a.mask_token : nullptr, a.mask_token, count);
    load_block(keys.x, a.k, b, hk, first, a.key.head_dim, count, keys.weight);
    prepare(a.key, hk, keys.x, keys.norm);
    fill(a.key, hk, keys, true, nullptr);
    vf added[T / VW];
    key_logs(a.key, keys.x, added);
    TV added[t / VW] = load(keys.weight + t) != 0.0f ? added[t / VW] : splat(-INFINITY);
    for (long f = 0; f < F; f++) TV {
      vf y = load(keys.phi + f * T + t) + added[t / VW];
      store(keys.phi + f * T + t, added[t / VW] == -INFINITY ? added[t / VW] : y);
    }
    attended(queries.weight, nullptr, 0, count);
    load_block(queries.x, a.q, b, h, first, a.key.head_dim, count, queries.weight);
    prepare(a.query, h, queries.x, queries.norm);
    fill(a.query, h, queries, false, nullptr);
  }
  // The run from this token on; base gets the scales at its end.
  void find(long from, long count) {
    start = from, at = from / CHUNK * CHUNK;
    const long limit = least(at + CHUNK, count);
    long lead = from;
    while (lead < limit && keys.weight[lead] == 0.0f) lead++;
    stop = limit;
    // Tokens before the first attended key see the sums alone, which would vanish at the scale of a much larger key.
    for (long f = 0; lead > from && lead < limit && f < F; f++)
      if (top[f] > -INFINITY && keys.phi[f * T + lead] - top[f] > MOST_RISE) {
        stop = lead;
        for (long g = 0; g < F; g++) base[g] = top[g];
        return;
      }
    bool even = true;
    for (long f = 0; f < F; f++) {
      const float* row = keys.phi + f * T;
      reference[f] = lead < limit && !(top[f] > row[lead]) ? row[lead] : top[f];
      vf most = splat(reference[f]);
      for (long t = at; t < at + CHUNK; t += VW) most = vmax(t + VW <= from ? most : part(load(row + t), t, from, limit), most);
      base[f] = largest(most);
      even &= !(base[f] - reference[f] > MOST_RISE);
    }
    if (even) return;
    for (long f = 0; f < F; f++) base[f] = reference[f];
    for (long t = lead + 1; t < limit; t++) {
      for (long f = 0; f < F; f++)
        if (keys.phi[f * T + t] - reference[f] > MOST_RISE) {
          stop = t;
          return;
        }
      for (long f = 0; f < F; f++)
        if (keys.phi[f * T + t] > base[f]) base[f] = keys.phi[f * T + t];
    }
  }
  static vf part(vf x, long t, long from, long to) {
    if (t >= from && t + VW <= to) return x;
    for (int l = 0; l < VW; l++)
      if (t + l < from || t + l >= to) x[l] = -INFINITY;
    return x;
  }
  void keys_of_run() {
    for (long t = 0; t < CHUNK; t++) inside[t] = at + t >= start && at + t < stop ? keys.weight[at + t] : 0.0f;
    for (long f = 0; f < F; f++) {
      const float scale = base[f] == -INFINITY ? 0.0f : base[f];
      for (long t = 0; t < CHUNK; t += VW)
        store(e_k + f * T + t, vexp(part(load(keys.phi + f * T + at + t), at + t, start, stop) - scale));
    }
  }
  void queries_of_run() {
    vf most[CHUNK / VW];
    for (auto& x : most) x = splat(-INFINITY);
    for (long f = 0; f < F; f++)
      for (long t = 0; t < CHUNK; t += VW)
        most[t / VW] = vmax(load(queries.phi + f * T + at + t) + base[f], most[t / VW]);
    for (auto& x : most) x = x == -INFINITY ? vf{} : x;
    for (long f = 0; f < F; f++)
      for (long t = 0; t < CHUNK; t += VW)
        store(e_q + f * T + t, vexp(load(queries.phi + f * T + at + t) + base[f] - most[t / VW]));
  }
  // The sums at the scales of the run, and behind them its values.
  void meet(const CausalLogs& a, long b, long h, long first, long count) {
    for (long f = 0; f < F; f++) {
      if (!(base[f] > top[f])) continue;
      const float shrink = top[f] == -INFINITY ? 0.0f : std::exp(top[f] - base[f]);
      for (long d = 0; d < across; d += VW) store(kv + f * step + d, load(kv + f * step + d) * shrink);
      z[f] *= shrink, top[f] = base[f];
    }
    load_rows(kv + F * step, a.v, b, h / (a.heads / a.key_heads), first + at, a.width, count - at, inside, CHUNK, step);
    for (long t = 0; t < CHUNK; t++) z[F + t] = inside[t];
    for (long f = 0; f < F + CHUNK; f++) kv[f * step + across] = z[f];
  }
  void numerators() {
    multiply<true>(Product{e_k, T, e_q, T, e_q + F * T, T}, CHUNK, CHUNK, F, ZERO);
    without_later(e_q + F * T, T);
    denominators<CHUNK>(true, e_q, F + CHUNK, z, 0.0f, CHUNK, safe, raw);
    multiply<true>(Product{e_q, T, kv, step, rows, across, nullptr, nullptr, nullptr, F}, CHUNK, across, F + CHUNK, ZERO);
  }
  void advance() {
    advance_z(e_k, F, inside, z, z);
    multiply<false>(Product{e_k, T, kv + F * step, step, kv, step}, F, across, CHUNK, ADD);
  }
};

static void causal_logs_task(const CausalLogs& a, long task, float* memory) {
  const long b = task / a.heads, h = task % a.heads, groups = a.heads / a.key_heads, row = b * a.key_heads + h / groups;
  Arena arena{memory};
  Runs m(a, arena);
  const long F = m.F;
  m.begin(a, row);
  const Settle settle{0.0f, nullptr, nullptr, 0, 0, nullptr, nullptr};
  for (long first = 0; first < a.length; first += T) {
    const long count = least(T, a.length - first);
    m.block(a, b, h, first, count);
    for (long from = 0; from < count; from = m.stop) {
      m.find(from, count);
      m.keys_of_run();
      m.queries_of_run();
      m.meet(a, b, h, first, count);
      m.numerators();
      settle(m.rows, m.safe, m.across, CHUNK, m.rows, m.across);
      write_rows(m.rows + (from - m.at) * m.across, a.out, b, h, first + from, a.width, m.stop - from);
      m.advance();
    }
  }
  for (long f = 0; h % groups == 0 && f < F; f++) {
    a.last_log_scale[row * F + f] = m.top[f], a.last_z[row * F + f] = m.z[f];
    for (long d = 0; d < a.width; d++) a.last_kv[(row * F + f) * a.width + d] = m.kv[f * m.step + d];
  }
}

// Columns of a run go from one chunk (features, T) to their place in a block.
static void columns_of_run(const Runs& m, const float* from, float* to) {
  for (long f = 0; f < m.F; f++) {
    const float* x = from + f * T;
    float* y = to + f * T + m.at;
    if (m.start == m.at && m.stop == m.at + CHUNK)
      for (long t = 0; t < CHUNK; t += VW) store(y + t, load(x + t));
    else
      for (long t = m.start - m.at; t < m.stop - m.at; t++) y[t] = x[t];
  }
}
