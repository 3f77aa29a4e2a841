// Derivatives of the hybrid: every block is made again, and each pair of a query and a near key met once.
//
// With G_ij = <dout_i, v_j> / den_i and dd_i the derivative of the denominator, that of an exact weight is G_ij + dd_i.
// Where the floor took something, numerators are n0 + s (n - n0): the derivative of a weight by features is s G_ij + dd_i,
// and that of what the constant feature gives the same pair (1 - s) G_ij + dd0_i.
#pragma once

#include "backward.h"
#include "band.h"

struct BandBackward {
  int64_t size;
  Band of;
  Array d;                          // derivatives of out
  Array dq, dk, dv, dleft, dright;  // dleft and dright without data where left and right are q and k
  float *of_lift;                   // (batch, heads, length) or null
  float *of_kv, *of_z;              // (chunks, batch, key_heads, features, width or nothing); not where causal
  float *of_weights;                // (chunks, batch, heads, features) or null
  float *of_gamma, *of_beta;        // (chunks, batch, heads) or null
  float *of_sink_right, *of_sink_v;     // (chunks, batch, key_heads, sinks, depth or width)
  float *rest_k, *rest_right, *rest_v;  // (chunks, batch, key_heads, ring T, .): keys that the next chunk writes, too
  float *per_row;                   // causal: (batch, heads, length, 4), see ``BandFar``
  Array through_post;               // causal, with gamma: derivatives before ppSBN's second half
};

struct BandDerivatives {
  Around around;
  Derivative d;
  float *kv, *z, *of_kv, *of_z, *d_rows, *d_turned, *rows, *least_rows, *left_rows, *phi_rows, *of_left;
  float *inverse, *share, *raw, *of_den, *of_least, *inner, *least_inner, *of_lift;  // (T)
  float *of_weights, *finishing;  // (heads of the group, features), (heads of the group, 2)

  static Map roomy(Map map) {  // features that end within a vector are written as whole vectors
    map.constants += 2 * VW;
    return map;
  }
  BandDerivatives(const Band& a, Arena& arena, long b, long g)
      : around(a, arena, b, g, true),
        d(roomy(a.key.projections > a.query.projections ? a.key : a.query), arena) {
    const long F = a.key.features(), across = up(a.width), deep = up(a.depth), groups = a.heads / a.key_heads;
    kv = arena.take(F * across), z = arena.take(F), of_kv = arena.take(F * across), of_z = arena.take(F * VW);
    d_rows = arena.take(T * across), d_turned = arena.take(T * across);
    rows = arena.take(T * across), least_rows = arena.take(T * across);
    left_rows = arena.take(T * deep), of_left = arena.take(T * deep);
    phi_rows = arena.take(F ? T * up(a.moving()) : 0);
    of_weights = arena.take(groups * F), finishing = arena.take(groups * 2);
    for (float** x : {&inverse, &share, &raw, &of_den, &of_least, &inner, &least_inner, &of_lift}) *x = arena.take(T);
  }
  static long size(const Band& a) {
    Arena arena{nullptr};
    BandDerivatives memory(a, arena, 0, 0);
    return arena.next - (float*)nullptr;
  }
};

// What the queries near a block of keys gave it is complete.
static void finish_keys(const BandBackward& job, BandDerivatives& m, Keys& keys, long chunk, long next_chunk) {
  const Band& a = job.of;
  const long b = m.around.b, g = m.around.g, F = m.around.F, there = least(T, a.keys - keys.number * T);
  const long D = a.key.head_dim, deep = up(a.depth), row = (chunk * a.batch + b) * a.key_heads + g;
  const long behind = keys.number - next_chunk, first = (behind < 0 ? keys.number : behind) * T;
  auto place = [&](const Array& whole, float* rest, long width) {
    if (behind < 0) return whole;
    return Array{(char*)(rest + row * a.ring() * T * width), FLOAT, 0, 0, width, 1};
  };
  keys.number = -1;
  const Array to_k = place(job.dk, job.rest_k, D);
  write_rows(keys.of_v, place(job.dv, job.rest_v, a.width), b, g, first, a.width, there);
  if (a.right.data) write_rows(keys.of_right, place(job.dright, job.rest_right, a.depth), b, g, first, a.depth, there);
  if (!F || a.causal || !keys.count) {  // causal features are for ``band_far_task``
    if (!a.right.data) write_rows(keys.of_right, to_k, b, g, first, D, there);
    if (!a.right.data || a.causal || !F) return;
  }
  turn(keys.of_phi, up(a.moving()), T, up(a.moving()), m.d.phi, T);
  if (a.key.weighted) TV {
    vf log = load(keys.block.u + (a.key.projections - 1) * T + t);
    store(keys.of_log_weight + t, vabs(log) > MOST_EXPONENT ? vf{} : load(keys.of_log_weight + t));
  }
  if (!a.right.data) turn(keys.of_right, deep, T, deep, keys.right, T);
  through_features(a.key, g, keys.block, m.d, true, a.key.weighted ? keys.of_log_weight : nullptr, to_k, b, g, first,
                   there, a.right.data ? nullptr : keys.right);
}

// What stands between the numerators and out: which denominators are divided by, and what the floor leaves.
static void before_division(const BandBackward& job, BandDerivatives& m, long h, float* finishing) {
  const Band& a = job.of;
  Around& w = m.around;
  const long across = w.across;
  TV store(m.raw + t, load(w.below + t));
  w.guard();
  for (long t = 0; t < T; t++) {
    const float least_z = (float)a.floor * w.least_below[t];
    const bool cut = w.floored && w.below[t] < least_z;
    m.share[t] = cut ? (w.least_below[t] - least_z) / (w.least_below[t] - w.below[t]) : 1.0f;
    m.inverse[t] = t < w.count ? 1.0f / (cut ? least_z : w.below[t]) : 0.0f;
  }
  if (!a.gamma) return;
  read_sums(w, m.kv, m.rows, m.least_rows);
  if (w.floored)
    for (long t = 0; t < T; t++)
      for (long i = t * across; i < (t + 1) * across; i += VW)
        store(m.rows + i, load(m.rows + i) * m.share[t] + load(m.least_rows + i) * (1.0f - m.share[t]));
  for (const Near& n : w.near)
    for (long c = 0; c < T; c += STRIP) {
      const Rows any = w.of_any(n, c);
      for (long r = any.low; r < any.high; r++) {
        const Pair pair = w.pair(n, r);
        SV {
          vf share = load(m.share + t), weight = load(n.exact + r * T + t);
          if (pair.weight != 0.0f) weight += share * load(n.pairs + r * T + t) + (1.0f - share) * w.constant(pair, t);
          store(n.given + r * T + t, weight);
        }
      }
      Product p{n.given + any.low * T + c, T, n.keys->values + any.low * across, across, m.rows + c * across, across};
      if (any.count()) multiply<true>(p, STRIP, across, any.count(), ADD);
    }
  const float gamma = a.gamma[h], beta = a.beta[h], power = (beta - 1.0f) * 0.5f;
  vf of_gamma{}, of_beta{};
  for (long t = 0; t < T; t++)
    for (long i = t * across; i < (t + 1) * across; i += VW) {
      vf x = load(m.rows + i) * m.inverse[t], square = x * x + EPS, log = vlog(square);
      vf dx = load(m.d_rows + i) * vexp(log * power);
      of_gamma += dx * x;
      of_beta += dx * x * log;
      store(m.d_rows + i, dx * (1.0f + (beta - 1.0f) * (x * x / square)) * gamma);
    }
  finishing[0] += sum(of_gamma), finishing[1] += sum(of_beta) * 0.5f * gamma;
  turn(m.d_rows, across, T, across, m.d_turned, T);
  if (job.through_post.data) write_rows(m.d_rows, job.through_post, w.b, h, w.first, a.width, w.count);
}

// Derivatives of the denominators, and of what the constant feature alone gives them; G without the division is given.
static void of_denominators(const BandBackward& job, BandDerivatives& m) {
  const Band& a = job.of;
  Around& w = m.around;
  const float *last = w.queries.phi + (w.F - 1) * T, *of_last = m.d.phi + (w.F - 1) * T;
  TV {
    vf total{};
    for (long f = 0; f < w.F; f++) total += load(w.queries.phi + f * T + t) * load(m.d.phi + f * T + t);
    store(m.inner + t, total * load(w.factor + t));
    store(m.least_inner + t, w.F ? load(last + t) * load(of_last + t) * load(w.factor + t) : vf{});
    store(m.of_lift + t, load(m.inner + t));
    store(m.raw + t, load(m.raw + t) == load(w.below + t) ? splat(1.0f) : vf{});
  }
  float far_least[T];
  TV store(far_least + t, load(m.least_inner + t));
  for (const Near& n : w.near)
    for (long c = 0; c < T; c += STRIP) {
      const Rows any = w.of_any(n, c);
      Product p{n.keys->turned + any.low, T, m.d_turned + c, T, n.given + any.low * T + c, T};
      if (any.count()) multiply<true>(p, any.count(), STRIP, a.width, ZERO);
      for (long r = any.low; r < any.high; r++) {
        const Pair pair = w.pair(n, r);
        SV {
          vf x = load(n.exact + r * T + t), of = load(n.given + r * T + t);
          vf y = pair.weight != 0.0f ? load(n.pairs + r * T + t) : vf{};
          store(m.inner + t, load(m.inner + t) + (x + y) * of);
          if (w.floored) store(m.least_inner + t, load(m.least_inner + t) + (x + w.constant(pair, t)) * of);
        }
      }
    }
  for (long t = 0; t < T; t++) {
    const float inverse = m.inverse[t], s = m.share[t], all = m.inner[t] * inverse, least = m.least_inner[t] * inverse;
    m.of_den[t] = -all * inverse * m.raw[t], m.of_least[t] = 0.0f;
    if (s != 1.0f) {
      const float missing = w.least_below[t] - w.below[t], of_share = all - least;
      m.of_den[t] = of_share * s / missing;
      m.of_least[t] = of_share * (s / w.least_below[t] - s / missing) - (least + s * of_share) * inverse * (float)a.floor;
    }
    if (t >= w.count) m.of_den[t] = m.of_least[t] = 0.0f;
    const float of_z = w.F ? w.factor[t] * (m.of_den[t] * w.of_z[t] + m.of_least[t] * last[t] * m.z[w.F - 1]) : 0.0f;
    m.of_lift[t] = inverse * (s * m.of_lift[t] + (1.0f - s) * far_least[t]) + of_z;
  }
}

// exact become weights of values over denominators, given the derivatives of logits, pairs those of products of features.
static void of_pairs(BandDerivatives& m, const Near& n) {
  Around& w = m.around;
  for (long c = 0; c < T; c += STRIP) {
    const Rows any = w.of_any(n, c);
    for (long r = any.low; r < any.high; r++) {
      const Pair pair = w.pair(n, r);
      float *e = n.exact + r * T, *p = n.pairs + r * T, *of = n.given + r * T;
      vf of_weight{};
      SV {
        vf x = load(e + t), inverse = load(m.inverse + t), of_den = load(m.of_den + t), g = load(of + t) * inverse;
        if (pair.weight == 0.0f) {
          vf whole = w.floored ? g + of_den + load(m.of_least + t) : g + of_den;
          store(of + t, x * whole);
          store(e + t, x * inverse);
          if (w.F) store(p + t, vf{});
          continue;
        }
        vf y = load(p + t), whole = g + of_den, by_features = whole;
        vf scale = pair.bounds(w.lanes(t)) ? load(w.factor + t) * pair.weight : vf{};
        vf total = x + y, change = y * by_features;
        if (w.floored) {
          vf share = load(m.share + t), constant = w.constant(pair, t);
          by_features = share * g + of_den;
          whole += load(m.of_least + t);
          change = y * by_features + constant * (whole - by_features);
          total = x + share * y + (1.0f - share) * constant;
        }
        of_weight += change;
        store(m.of_lift + t, load(m.of_lift + t) + change);
        store(of + t, x * whole);
        store(e + t, total * inverse);
        store(p + t, scale * by_features);
      }
      n.keys->of_log_weight[r] += sum(of_weight);
    }
  }
}

// What a block of keys and the queries of one head give each other.
static void meet(BandDerivatives& m, const Near& n) {
  const Around& w = m.around;
  const Band& a = w.a;
  const long across = w.across, deep = up(a.depth), wide = up(a.moving());
  const Keys& keys = *n.keys;
  for (long c = 0; c < T; c += STRIP) {
    const Rows any = w.of_any(n, c), seen = w.of_exact(n, c), paired = w.of_pairs(n, c);
    if (any.count()) {
      Product p{n.exact + any.low * T + c, T, m.d_rows + c * across, across, keys.of_v + any.low * across, across};
      multiply<false>(p, any.count(), across, STRIP, ADD);
    }
    if (seen.count()) {
      const float* of = n.given + seen.low * T + c;
      Product to_right{of, T, m.left_rows + c * deep, deep, keys.of_right + seen.low * deep, deep};
      multiply<false>(to_right, seen.count(), deep, STRIP, ADD);
      Product to_left{keys.right + seen.low, T, of, T, m.of_left + c, T};
      multiply<false>(to_left, a.depth, STRIP, seen.count(), ADD);
    }
    if (paired.count()) {
      const float* of = n.pairs + paired.low * T + c;
      Product to_keys{of, T, m.phi_rows + c * wide, wide, keys.of_phi + paired.low * wide, wide};
      if (!a.causal) multiply<false>(to_keys, paired.count(), wide, STRIP, ADD);
      Product to_queries{keys.block.phi + paired.low, T, of, T, m.d.phi + c, T};
      multiply<false>(to_queries, w.F, STRIP, paired.count(), ADD);
    }
  }
}

static void query_backward(const BandBackward& job, BandDerivatives& m, long h, long of_group) {
  const Band& a = job.of;
  Around& w = m.around;
  const long F = w.F, across = w.across, deep = up(a.depth), b = w.b;
  // weighted features overwrite what was normalised, where that is features as well
  const bool keep_plain = job.of_weights || (a.weights && a.query.linear && a.query.norm != NONE);
  w.take_queries(h, keep_plain);
  w.weigh<false>(m.z);
  load_block(m.d_turned, job.d, b, h, w.first, a.width, w.count, w.queries.weight);
  load_rows(m.d_rows, job.d, b, h, w.first, a.width, w.count, w.queries.weight);
  before_division(job, m, h, m.finishing + 2 * of_group);
  if (F) multiply<false>(Product{m.kv, across, m.d_turned, T, m.d.phi, T}, F, T, across, ZERO);
  of_denominators(job, m);
  if (F && !a.causal) turn(w.queries.phi, T, up(a.moving()), T, m.phi_rows, up(a.moving()));
  turn(w.left, T, deep, T, m.left_rows, deep);
  for (long i = 0; i < deep * T; i += VW) store(m.of_left + i, vf{});
  for (long f = 0; f < F; f++) TV {
    vf s = f < F - 1 ? load(m.share + t) : splat(1.0f), of_den = load(m.of_den + t);
    if (f == F - 1) of_den += load(m.of_least + t);
    vf of = load(m.d.phi + f * T + t) * (s * load(m.inverse + t)) + of_den * m.z[f];
    store(m.d.phi + f * T + t, of * load(w.factor + t));
  }
  for (const Near& n : w.near) of_pairs(m, n);
  for (const Near& n : w.near) meet(m, n);
  if (a.scale != 1.0) scaled(m.of_left, deep * T, (float)a.scale);
  if (job.per_row)
    for (long t = 0; t < w.count; t++) {
      float* of = job.per_row + ((b * a.heads + h) * a.length + w.first + t) * 4;
      of[0] = w.factor[t] * m.inverse[t] * m.share[t], of[1] = w.factor[t] * m.inverse[t];
      of[2] = w.factor[t] * m.of_den[t], of[3] = w.factor[t] * (m.of_den[t] + m.of_least[t]);
    }
  if (job.of_lift)
    for (long t = 0; t < w.count; t++) job.of_lift[(b * a.heads + h) * a.length + w.first + t] = m.of_lift[t];
  if (!a.causal && F) {
    for (long f = 0; f < F; f++) TV {
      vf y = load(w.queries.phi + f * T + t) * load(w.factor + t), of_den = load(m.of_den + t);
      vf s = f < F - 1 ? load(m.share + t) : splat(1.0f);
      if (f == F - 1) of_den += load(m.of_least + t);
      store(m.of_z + f * VW, load(m.of_z + f * VW) + y * of_den);
      store(w.queries.phi + f * T + t, y * (s * load(m.inverse + t)));
    }
    multiply<false>(Product{w.queries.phi, T, m.d_rows, across, m.of_kv, across}, F, across, T, ADD);
  }
  if (job.of_weights)
    for (long f = 0; f < F; f++) {
      vf total{};
      TV total += load(w.plain + f * T + t) * load(m.d.phi + f * T + t);
      m.of_weights[of_group * F + f] += sum(total);
    }
  if (a.weights)
    for (long f = 0; f < F; f++) scaled(m.d.phi + f * T, T, a.weights[h * F + f]);
  if (keep_plain)
    for (long n = 0; n < F * T; n += VW) store(w.queries.phi + n, load(w.plain + n));
  through_features(a.query, h, w.queries, m.d, false, nullptr, job.dq, b, h, w.first, w.count,
                   a.left.data ? nullptr : m.of_left);
  if (!a.left.data) return;
  turn(m.of_left, T, deep, T, m.left_rows, deep);
  write_rows(m.left_rows, job.dleft, b, h, w.first, a.depth, w.count);
}

static void band_backward_task(const BandBackward& job, long task, float* memory) {
  const Band& a = job.of;
  const long chunk = task % a.chunks, of_key = task / a.chunks, b = of_key / a.key_heads, g = of_key % a.key_heads;
  const long groups = a.heads / a.key_heads, F = a.key.features(), across = up(a.width);
  const long blocks = (a.length + T - 1) / T, begin = blocks * chunk / a.chunks, end = blocks * (chunk + 1) / a.chunks;
  Arena arena{memory};
  BandDerivatives m(a, arena, b, g);
  Around& w = m.around;
  for (long f = 0; f < F; f++) {
    m.z[f] = a.z[of_key * F + f];
    for (long i = 0; i < across; i++) {
      m.kv[f * across + i] = i < a.width ? a.kv[(of_key * F + f) * a.width + i] : 0.0f;
      m.of_kv[f * across + i] = 0.0f;
    }
    store(m.of_z + f * VW, vf{});
  }
  for (long i = 0; i < groups * F; i++) m.of_weights[i] = 0.0f;
  for (long i = 0; i < groups * 2; i++) m.finishing[i] = 0.0f;
  for (long i = a.width * T; i < across * T; i++) m.d_turned[i] = 0.0f;
  w.begin();
  const long next_chunk = chunk + 1 < a.chunks ? w.lowest(end) : BEHIND_ALL;
  for (long i = begin; i < end; i++) {
    w.bring(i);
    for (long j = 0; j < groups; j++) query_backward(job, m, g * groups + j, j);
    if (F && a.causal && !w.near.empty() && w.near[0].apart == 0 && !w.near[0].keys->since)
      leave(w, *w.near[0].keys, m.kv, m.z);
    const long left_behind = i + 1 < end ? w.lowest(i + 1) : BEHIND_ALL;
    for (Keys& keys : w.ring)
      if (keys.number >= 0 && keys.number < left_behind) finish_keys(job, m, keys, chunk, next_chunk);
  }
  const long row = (chunk * a.batch + b) * a.key_heads + g;
  for (Keys& keys : w.sinks) {
    const long from = (&keys - &w.sinks[0]) * T, there = least(T, a.sinks - from);
    for (long r = 0; r < there; r++) {
      const long at = row * a.sinks + from + r;
      for (long i = 0; i < a.depth; i++) job.of_sink_right[at * a.depth + i] = keys.of_right[r * up(a.depth) + i];
      for (long i = 0; i < a.width; i++) job.of_sink_v[at * a.width + i] = keys.of_v[r * across + i];
    }
  }
  for (long f = 0; f < F && job.of_kv; f++) {
    for (long i = 0; i < a.width; i++) job.of_kv[(row * F + f) * a.width + i] = m.of_kv[f * across + i];
    job.of_z[row * F + f] = sum(load(m.of_z + f * VW));
  }
  for (long j = 0; j < groups; j++) {
    const long head = (chunk * a.batch + b) * a.heads + g * groups + j;
    for (long f = 0; f < F && job.of_weights; f++) job.of_weights[head * F + f] = m.of_weights[j * F + f];
    if (job.of_gamma) job.of_gamma[head] = m.finishing[2 * j], job.of_beta[head] = m.finishing[2 * j + 1];
  }
}
