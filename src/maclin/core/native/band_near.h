// The keys around each query, kept from one block of queries to the next, and their weights: what both directions of the
// hybrid share.
//
//     num_i = sum_near exp(t_ij - top_i) v_j + e_i (A_i^T kv - sum_near A_i^T phi(k_j) w_j v_j),  e_i = exp(lift_i - top_i)
//
// with A_i = weights x phi(q_i), kv the sums of all keys, w_j the weight of a key, and so the denominator. Causal, kv are
// the sums of the keys before a block, and those between them and the window are added:
//
//     num_i = sum_near exp(t_ij - top_i) v_j + e_i (A_i^T kv + sum_between A_i^T phi(k_j) w_j v_j)
#pragma once

#include <vector>

#include "walk.h"

#define STRIP 48  // queries that share a stretch of keys; divides T, a multiple of VW
#define BEHIND_ALL (1 << 30)
#define SV for (long t = c; t < c + STRIP; t += VW)

struct Band {
  int64_t size;
  int64_t batch, heads, key_heads, length, keys, width, window, chunks;
  int64_t together;  // heads of a group that one task computes
  int64_t origin;    // the first key that query 0 may see; negative where the keys begin later
  int64_t causal;    // then origin is 0, query i is key i + window + 1, and chunks 1
  Map query, key;    // without features nothing but the near keys counts
  Array q, k, v, out;
  Array left, right;  // t_ij = scale <left of query i, right of key j>, (batch, heads or key_heads, tokens, depth)
  int64_t depth;      // without data they are q and k
  double scale;
  const uint8_t* mask;
  int64_t mask_batch, mask_token;
  const float* weights;  // (heads, features) or null
  const float *kv, *z;   // (batch, key_heads, features, width or nothing): of all keys, or of those before the first
  float *last_kv, *last_z;  // causal: those before the last window + 1 keys
  const float* lift;     // (batch, heads, length) or null for 0
  double floor;
  const float *gamma, *beta;  // (heads) or null
  int64_t sinks;              // exact keys of every query that stands at their position or behind it
  Array sink_right, sink_v;
  const uint8_t* sink_mask;      // (batch, sinks)
  const int64_t* sink_position;  // (batch, sinks)

  long nearest() const { return causal ? 1 : 0; }  // of a query's near keys, from the first key that it may see
  long farthest() const { return causal ? window + 1 : 2 * window; }
  long span() const { return T + farthest(); }  // keys that a block of queries may see
  long ring() const { return causal ? (span() + T - 1) / T : (span() + 2 * T - 2) / T; }  // blocks that hold them
  long sink_blocks() const { return (sinks + T - 1) / T; }
  long moving() const { return key.features() - key.constants; }  // features that depend on x
};

// A block of keys; the sinks are blocks as well.
struct Keys {
  Block block;
  float *right, *values, *on;  // (depth, T), (T, up(width)), (T): 0 where masked
  float *turned;               // for derivatives: values^T, and what is summed up
  float *of_right, *of_phi, *of_v, *of_log_weight;
  long number = -1, count = 0;  // which block it is; rows up to the last that is attended to
  const int64_t* since = nullptr;

  Keys(const Band& a, const Map& map, Arena& arena, bool derived) : block(map, arena) {
    const long across = up(a.width), deep = up(a.depth), more = derived ? T : 0;
    right = arena.take(deep * T), values = arena.take(T * across), on = arena.take(T);
    turned = arena.take(across * more), of_right = arena.take(deep * more), of_v = arena.take(across * more);
    of_phi = arena.take(map.features() ? up(a.moving()) * more : 0), of_log_weight = arena.take(more);
  }
};

struct Near {
  Keys* keys;
  long apart;                     // of its first key from the first key that the block's first query may see
  float *exact, *pairs, *given;   // (T keys, T queries)
};

struct Rows {
  long low, high;
  long count() const { return high - low; }
};

struct Bounds {  // the queries of a block that see a key
  int32_t first, last;
  INLINE vi operator()(vi at) const { return (splati(first) <= at) & (at <= splati(last)); }
};

static void scaled(float* x, long count, float by) {
  for (long i = 0; i < count; i += VW) store(x + i, load(x + i) * by);
}

struct Pair {  // a key's weights by features, with their sign: of any feature, of the constant one; and who counts them
  float weight, constant;
  Bounds bounds;
};

// One head's walk along its queries.
struct Around {
  const Band& a;
  long b, g, F, across;
  bool derived, floored;
  std::vector<Keys> ring, sinks;
  std::vector<Near> near;
  Block queries;
  float *left, *plain;  // (depth, T); the features without weights, for derivatives of these
  float *exact, *pairs, *given;
  float *top, *factor, *below, *magnitude, *least_below, *of_z;  // (T); of_z: what the sums give denominators
  long first = 0, count = 0, start = 0;

  Around(const Band& band, Arena& arena, long sample, long key_head, bool derivatives)
      : a(band), b(sample), g(key_head), F(band.key.features()), across(up(band.width)), derived(derivatives),
        floored(band.floor > 0), queries(band.query, arena, 2 * VW) {
    for (long n = 0; n < a.ring(); n++) ring.emplace_back(a, a.key, arena, derived);
    for (long n = 0; n < a.sink_blocks(); n++) sinks.emplace_back(a, Map{}, arena, derived);
    const long blocks = a.ring() + a.sink_blocks();
    exact = arena.take(blocks * T * T), pairs = arena.take(F ? blocks * T * T : 0);
    given = arena.take(derived ? blocks * T * T : 0);
    left = arena.take(up(a.depth) * T), plain = arena.take(derived ? F * T : 0);
    for (float** x : {&top, &factor, &below, &magnitude, &least_below, &of_z}) *x = arena.take(T);
  }

  void take_values(Keys& keys, const Array& v, long from, long there) {
    load_rows(keys.values, v, b, g, from, a.width, there, keys.on);
    if (!derived) return;
    for (long i = a.width * T; i < across * T; i += VW) store(keys.turned + i, vf{});
    load_block(keys.turned, v, b, g, from, a.width, there, keys.on);
    for (long i = 0; i < T * across; i += VW) store(keys.of_v + i, vf{});
    for (long i = 0; i < T * up(a.depth); i += VW) store(keys.of_right + i, vf{});
    TV store(keys.of_log_weight + t, vf{});
  }

  void begin() {
    for (long i = a.depth * T; i < up(a.depth) * T; i++) left[i] = 0.0f;
    for (long i = F * T; i < (F + 2 * VW) * T; i++) queries.phi[i] = 0.0f;
    for (long n = 0; n < a.sink_blocks(); n++) {
      Keys& keys = sinks[n];
      const long from = n * T, there = least(T, a.sinks - from);
      attended(keys.on, a.sink_mask + b * a.sinks + from, 1, there);
      keys.count = there, keys.since = a.sink_position + b * a.sinks + from;
      load_block(keys.right, a.sink_right, b, g, from, a.depth, there, keys.on);
      take_values(keys, a.sink_v, from, there);
    }
  }

  void enter(Keys& keys, long number) {
    const long from = number * T, there = least(T, a.keys - from);
    const uint8_t* mask = a.mask ? a.mask + b * a.mask_batch + from * a.mask_token : nullptr;
    keys.number = number;
    keys.count = attended(keys.on, mask, a.mask_token, there) ? there : 0;
    while (keys.count && keys.on[keys.count - 1] == 0.0f) keys.count--;
    TV store(keys.block.weight + t, load(keys.on + t));
    load_block(keys.right, a.right.data ? a.right : a.k, b, g, from, a.depth, there, keys.on);
    take_values(keys, a.v, from, there);
    if (derived && F)
      for (long i = 0; i < T * up(a.moving()); i += VW) store(keys.of_phi + i, vf{});
    if (F && !a.causal) make_features(keys);
  }

  void make_features(Keys& keys) {
    const long from = keys.number * T;
    if (a.right.data)
      load_block(keys.block.x, a.k, b, g, from, a.key.head_dim, least(T, a.keys - from), keys.on);
    else
      for (long i = 0; i < a.depth * T; i += VW) store(keys.block.x + i, load(keys.right + i));
    prepare(a.key, g, keys.block.x, keys.block.norm);
    fill(a.key, g, keys.block, true, nullptr);
  }

  long lowest(long i) const { return i * T + a.origin > 0 ? (i * T + a.origin) / T : 0; }  // block of keys seen by i

  // What block i of queries sees.
  void bring(long i) {
    first = i * T, count = least(T, a.length - first), start = first + a.origin;
    const long end = least((start + a.span() + T - 1) / T, (a.keys + T - 1) / T);
    near.clear();
    auto add = [&](Keys& keys, long apart) {
      const long at = near.size() * T * T;
      if (keys.count) near.push_back({&keys, apart, exact + at, pairs + (F ? at : 0), given + (derived ? at : 0)});
    };
    for (long n = lowest(i); n < end; n++) {
      Keys& keys = ring[n % a.ring()];
      if (keys.number != n) enter(keys, n);
      if (F && a.causal && n == i) make_features(keys);
      add(keys, n * T - start);
    }
    for (Keys& keys : sinks) add(keys, 0);
  }

  Rows cut(const Near& n, long low, long high) const {
    low = low < 0 ? 0 : low, high = least(high, n.keys->count);
    return {low, high < low ? low : high};
  }
  // Rows of a block of keys that the queries of a strip see exactly, by features, or either way.
  Rows of_exact(const Near& n, long c) const {
    if (n.keys->since) return {0, n.keys->count};
    return cut(n, c + a.nearest() - n.apart, c + STRIP + a.farthest() - n.apart);
  }
  Rows of_pairs(const Near& n, long c) const {
    if (!F || n.keys->since) return {0, 0};
    return a.causal ? cut(n, 0, c + STRIP - n.apart) : of_exact(n, c);
  }
  Rows of_any(const Near& n, long c) const {
    const Rows x = of_exact(n, c), y = of_pairs(n, c);
    if (!x.count() || !y.count()) return x.count() ? x : y;
    return {least(x.low, y.low), x.high > y.high ? x.high : y.high};
  }
  Bounds exact_bounds(const Near& n, long r) const {
    if (n.keys->since) return {(int32_t)(n.keys->since[r] - first), BEHIND_ALL};
    return {(int32_t)(n.apart + r - a.farthest()), (int32_t)(n.apart + r - a.nearest())};
  }
  Bounds pair_bounds(const Near& n, long r) const {
    if (!F || n.keys->since) return {BEHIND_ALL, 0};
    if (a.causal) return {(int32_t)(n.apart + r), BEHIND_ALL};
    return exact_bounds(n, r);
  }
  Pair pair(const Near& n, long r) const {
    if (!F || n.keys->since || n.keys->on[r] == 0.0f) return {0.0f, 0.0f, {BEHIND_ALL, 0}};
    const float weight = a.causal ? n.keys->block.weight[r] : -n.keys->block.weight[r];
    return {weight, weight * n.keys->block.phi[(F - 1) * T + r], pair_bounds(n, r)};
  }
  // What the constant feature gives a key for queries t.
  INLINE vf constant(const Pair& pair, long t) const {
    vf last = load(queries.phi + (F - 1) * T + t) * load(factor + t);
    return pair.bounds(lanes(t)) ? last * pair.constant : vf{};
  }
  static INLINE vi lanes(long t) {
    vi lane;
    for (int i = 0; i < VW; i++) lane[i] = i;
    return lane + (int32_t)t;
  }
  // Queries of a head: features, weights included, and left, scale included.
  void take_queries(long h, bool keep_plain = false) {
    attended(queries.weight, nullptr, 0, count);
    load_block(left, a.left.data ? a.left : a.q, b, h, first, a.depth, count, queries.weight);
    if (F) {
      if (a.left.data)
        load_block(queries.x, a.q, b, h, first, a.query.head_dim, count, queries.weight);
      else
        for (long i = 0; i < a.depth * T; i += VW) store(queries.x + i, load(left + i));
      prepare(a.query, h, queries.x, queries.norm);
      fill(a.query, h, queries, false, nullptr);
      if (keep_plain)
        for (long i = 0; i < F * T; i += VW) store(plain + i, load(queries.phi + i));
      if (a.weights)
        for (long f = 0; f < F; f++) scaled(queries.phi + f * T, T, a.weights[h * F + f]);
    }
    if (a.scale != 1.0) scaled(left, a.depth * T, (float)a.scale);
    const float* lift = a.lift ? a.lift + (b * a.heads + h) * a.length + first : nullptr;
    for (long t = 0; t < T; t++) factor[t] = lift && t < count ? lift[t] : 0.0f;
    TV store(top + t, F ? load(factor + t) : splat(-INFINITY));
  }

  // exact: exp(t - top), pairs: what features give for the same pairs, with its sign, and the denominators.
  // Joined: exact is the sum of both; with a floor pairs are what is left of it by the constant feature alone.
  template <bool JOINED>
  void weigh(const float* z) {
    for (const Near& n : near)
      for (long c = 0; c < T; c += STRIP) {
        const Rows seen = of_exact(n, c), paired = of_pairs(n, c);
        if (seen.count()) {
          Product p{n.keys->right + seen.low, T, left + c, T, n.exact + seen.low * T + c, T};
          multiply<true>(p, seen.count(), STRIP, a.depth, ZERO);
        }
        if (paired.count()) {
          Product p{n.keys->block.phi + paired.low, T, queries.phi + c, T, n.pairs + paired.low * T + c, T};
          multiply<true>(p, paired.count(), STRIP, F, ZERO);
        }
        for (long r = seen.low; r < seen.high; r++) {
          if (n.keys->on[r] == 0.0f) continue;
          const Bounds near_by = exact_bounds(n, r);
          SV {
            vf l = load(n.exact + r * T + t), most = load(top + t);
            store(top + t, near_by(lanes(t)) & (l > most) ? l : most);
          }
        }
      }
    const float* last = queries.phi + (F - 1) * T;  // the constant feature
    TV {
      vf total{}, size{}, scale = F ? vexp(load(factor + t) - load(top + t)) : vf{};
      for (long f = 0; f < F; f++) {
        vf x = load(queries.phi + f * T + t) * z[f];
        total += x;
        size += vabs(x);
      }
      store(factor + t, scale);
      store(of_z + t, total);
      store(below + t, total * scale);
      store(magnitude + t, size * scale);
      store(least_below + t, F ? load(last + t) * z[F - 1] * scale : vf{});
    }
    for (const Near& n : near)
      for (long c = 0; c < T; c += STRIP) {
        const Rows rows = of_any(n, c);
        for (long r = rows.low; r < rows.high; r++) {
          float *e = n.exact + r * T, *p = n.pairs + r * T;
          const bool on = n.keys->on[r] != 0.0f;
          const Bounds near_by = exact_bounds(n, r);
          const Pair by_features = pair(n, r);
          const bool paired = by_features.weight != 0.0f;
          SV {
            vf x = near_by(lanes(t)) ? vexp(load(e + t) - load(top + t)) : vf{}, y{};
            if (!on) x = vf{};
            if (paired) y = by_features.bounds(lanes(t)) ? load(p + t) * load(factor + t) * by_features.weight : vf{};
            store(e + t, JOINED ? x + y : x);
            store(below + t, load(below + t) + (x + y));
            store(magnitude + t, load(magnitude + t) + (x + vabs(y)));
            if (floored) {
              vf least_of = paired ? x + constant(by_features, t) : x;
              store(least_below + t, load(least_below + t) + least_of);
              if (JOINED) store(p + t, least_of);
            }
            if (F && !JOINED) store(p + t, y);
          }
        }
      }
  }

  // Denominators under the policy of core/contract.py; with a floor ``Settle`` sees to them.
  void guard() {
    const float tiny = 1.17549435e-38f, eps8 = 8 * 1.1920929e-7f;
    for (long t = 0; t < count; t++) {
      float limit = magnitude[t] * eps8;
      limit = limit < tiny ? tiny : limit;
      if (floored && least_below[t] != 0.0f) continue;
      if (magnitude[t] == 0.0f && below[t] == 0.0f)
        below[t] = 1.0f;
      else if (std::fabs(below[t]) < limit)
        below[t] = below[t] < 0.0f ? -limit : limit;
    }
  }
};
