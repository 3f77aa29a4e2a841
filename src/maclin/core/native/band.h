// Exact weights of the keys around each query, and what features give for all the others: the hybrid.
//
//     num_i = sum_near exp(t_ij - top_i) v_j + e_i (A_i^T kv - sum_near A_i^T phi(k_j) w_j v_j),  e_i = exp(lift_i - top_i)
//
// with A_i = weights x phi(q_i), kv the sums of all keys, w_j the weight of a key, and so the denominator. Causal, kv are
// the sums of the keys before a block, and those between them and the window are added:
//
//     num_i = sum_near exp(t_ij - top_i) v_j + e_i (A_i^T kv + sum_between A_i^T phi(k_j) w_j v_j)
#pragma once

#include "walk.h"

struct Band {
  int64_t size;
  int64_t batch, heads, key_heads, length, keys, width, window, chunks;
  int64_t origin;  // the first key that query 0 may see; negative where the keys begin later
  int64_t causal;  // then origin is 0, query i is key i + window + 1, and chunks 1
  Map query, key;
  Array q, k, v, out;
  Array left, right;  // t_ij = <left of query i, right of key j>, (batch, heads or key_heads, tokens, depth)
  int64_t depth;
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
};

// How many keys a block of queries sees, and how many blocks that are.
static long band_span(const Band& a) { return T + (a.causal ? a.window + 1 : 2 * a.window); }
static long band_blocks(const Band& a) { return (band_span(a) + T - 1) / T + (a.sinks + T - 1) / T; }

static long band_memory(const Band& a) {
  const long F = a.key.features(), across = up(a.width);
  return Block::size(a.query) + Block::size(a.key) + 2 * a.depth * T + band_blocks(a) * T * (2 * T + across) +
         (F + 2 * T) * across + F + 2 * band_blocks(a) * T + 8 * T + 1024;
}

static void band_task(const Band& a, long task, float* memory) {
  const long row = task / a.chunks, chunk = task % a.chunks, b = row / a.heads, h = row % a.heads;
  const long g = h / (a.heads / a.key_heads), of_key = b * a.key_heads + g;
  const long F = a.key.features(), across = up(a.width), blocks = (a.length + T - 1) / T, near = band_blocks(a);
  const float tiny = 1.17549435e-38f, eps8 = 8 * 1.1920929e-7f;
  const bool floored = a.floor > 0;
  Arena arena{memory};
  Block queries(a.query, arena), keys(a.key, arena);
  float *left = arena.take(a.depth * T), *right = arena.take(a.depth * T);
  float *exact = arena.take(near * T * T), *pairs = arena.take(near * T * T), *values = arena.take(near * T * across);
  float *kv = arena.take(F * across), *rows = arena.take(T * across), *least_rows = arena.take(T * across);
  float* z = arena.take(F);
  float *below = arena.take(T), *magnitude = arena.take(T), *least_below = arena.take(T), *top = arena.take(T);
  float *factor = arena.take(T), *key_weights = arena.take(near * T), *of_last = arena.take(near * T);
  for (long f = 0; f < F; f++) {
    z[f] = a.z[of_key * F + f];
    for (long d = 0; d < across; d++) kv[f * across + d] = d < a.width ? a.kv[(of_key * F + f) * a.width + d] : 0.0f;
  }
  const long nearest = a.causal ? 1 : 0, farthest = nearest + (a.causal ? a.window : 2 * a.window);
  vi lane;
  for (int i = 0; i < VW; i++) lane[i] = i;
  auto near_by_at = [&](long apart, long t) INLINE_LAMBDA {
    vi from = lane + (int32_t)t;
    return (splati((int32_t)(apart - nearest)) >= from) & (splati((int32_t)(apart - farthest)) <= from);
  };
  for (long i = blocks * chunk / a.chunks; i < blocks * (chunk + 1) / a.chunks; i++) {
    const long first = i * T, count = least(T, a.length - first), start = first + a.origin;
    attended(queries.weight, nullptr, 0, count);
    load_block(queries.x, a.q, b, h, first, a.query.head_dim, count, queries.weight);
    prepare(a.query, h, queries.x, queries.norm);
    fill(a.query, h, queries, false, nullptr);
    if (a.weights)
      for (long f = 0; f < F; f++) TV store(queries.phi + f * T + t, load(queries.phi + f * T + t) * a.weights[h * F + f]);
    load_block(left, a.left, b, h, first, a.depth, count, queries.weight);
    for (long t = 0; t < T; t++) top[t] = a.lift && t < count ? a.lift[row * a.length + first + t] : 0.0f;
    TV store(factor + t, load(top + t));
    const float* last = queries.phi + (F - 1) * T;  // the constant feature
    const long begin = start > 0 ? start : 0, end = least(start + band_span(a), a.keys);
    const long used = end > begin ? (end - begin + T - 1) / T : 0;  // blocks of keys
    for (long n = used - 1; n >= 0; n--) {  // the first last, since its features are what the sums take next
      const long from = begin + n * T, there = least(T, end - from);
      const uint8_t* mask = a.mask ? a.mask + b * a.mask_batch + from * a.mask_token : nullptr;
      attended(key_weights + n * T, mask, a.mask_token, there);
      TV store(keys.weight + t, load(key_weights + n * T + t));
      load_block(right, a.right, b, g, from, a.depth, there, keys.weight);
      load_rows(values + n * T * across, a.v, b, g, from, a.width, there, keys.weight);
      load_block(keys.x, a.k, b, g, from, a.key.head_dim, there, keys.weight);
      prepare(a.key, g, keys.x, keys.norm);
      fill(a.key, g, keys, true, nullptr);
      TV store(key_weights + n * T + t, load(keys.weight + t));
      TV store(of_last + n * T + t, load(keys.phi + (F - 1) * T + t));
      float* e = exact + n * T * T;
      multiply<true>(Product{right, T, left, T, e, T}, T, T, a.depth, ZERO);
      multiply<true>(Product{keys.phi, T, queries.phi, T, pairs + n * T * T, T}, T, T, F, ZERO);
      for (long r = 0; r < T; r++)
        if (key_weights[n * T + r] != 0.0f) {
          const long apart = from + r - start;  // query t is near where nearest <= apart - t <= farthest
          TV {
            vi near_by = near_by_at(apart, t);
            vf l = load(e + r * T + t), most = load(top + t);
            store(top + t, near_by & (l > most) ? l : most);
          }
        }
    }
    // sinks are blocks of keys behind these: every query may see them from their position on
    const long with_sinks = used + (a.sinks + T - 1) / T;
    for (long n = used; n < with_sinks; n++) {
      const long from = (n - used) * T, there = least(T, a.sinks - from);
      attended(key_weights + n * T, a.sink_mask + b * a.sinks + from, 1, there);
      load_block(right, a.sink_right, b, g, from, a.depth, there, key_weights + n * T);
      load_rows(values + n * T * across, a.sink_v, b, g, from, a.width, there, key_weights + n * T);
      float* e = exact + n * T * T;
      multiply<true>(Product{right, T, left, T, e, T}, T, T, a.depth, ZERO);
      for (long r = 0; r < there; r++)
        if (key_weights[n * T + r] != 0.0f) {
          const vi since = splati((int32_t)(a.sink_position[b * a.sinks + from + r] - first));
          TV {
            vf l = load(e + r * T + t), most = load(top + t);
            store(top + t, (since <= lane + (int32_t)t) & (l > most) ? l : most);
          }
        }
    }
    TV store(factor + t, vexp(load(factor + t) - load(top + t)));
    // what the sums hold, on the scale of the largest exponential
    multiply<true>(Product{queries.phi, T, kv, across, rows, across}, T, across, F, ZERO);
    for (long t = 0; t < T; t++)
      for (long d = 0; d < across; d += VW) {
        vf x = load(rows + t * across + d) * factor[t];
        store(rows + t * across + d, x);
        if (floored) store(least_rows + t * across + d, load(kv + (F - 1) * across + d) * (last[t] * factor[t]));
      }
    TV {
      vf total{}, size{};
      for (long f = 0; f < F; f++) {
        vf x = load(queries.phi + f * T + t) * z[f];
        total += x;
        size += vabs(x);
      }
      vf scale = load(factor + t);
      store(below + t, total * scale);
      store(magnitude + t, size * scale);
      store(least_below + t, load(last + t) * z[F - 1] * scale);
    }
    for (long n = 0; n < used; n++)
      for (long r = 0; r < T; r++) {
        float *e = exact + (n * T + r) * T, *p = pairs + (n * T + r) * T;
        const float weight = key_weights[n * T + r];
        if (weight == 0.0f) {
          TV store(e + t, vf{});
          if (floored) TV store(p + t, vf{});
          continue;
        }
        const long apart = begin + n * T + r - start;
        TV {
          vi near_by = near_by_at(apart, t);
          vi counted = a.causal ? splati((int32_t)(apart - nearest)) < lane + (int32_t)t : near_by;
          vf scale = load(factor + t) * (a.causal ? weight : -weight);
          vf x = near_by ? vexp(load(e + t) - load(top + t)) : vf{};
          vf y = counted ? load(p + t) * scale : vf{};
          store(e + t, x + y);
          store(below + t, load(below + t) + (x + y));
          store(magnitude + t, load(magnitude + t) + (x + vabs(y)));
          if (floored) {
            vf c = x + (counted ? load(last + t) * (of_last[n * T + r] * scale) : vf{});
            store(p + t, c);
            store(least_below + t, load(least_below + t) + c);
          }
        }
      }
    for (long n = used; n < with_sinks; n++)
      for (long r = 0; r < T; r++) {
        float *e = exact + (n * T + r) * T, *p = pairs + (n * T + r) * T;
        const bool there = key_weights[n * T + r] != 0.0f;
        const long position = there ? a.sink_position[b * a.sinks + (n - used) * T + r] - first : T;
        TV {
          vf x = splati((int32_t)position) <= lane + (int32_t)t ? vexp(load(e + t) - load(top + t)) : vf{};
          store(e + t, x);
          store(below + t, load(below + t) + x);
          store(magnitude + t, load(magnitude + t) + x);
          if (floored) store(p + t, x), store(least_below + t, load(least_below + t) + x);
        }
      }
    multiply<true>(Product{exact, T, values, across, rows, across}, T, across, with_sinks * T, ADD);
    if (floored) multiply<true>(Product{pairs, T, values, across, least_rows, across}, T, across, with_sinks * T, ADD);
    for (long t = 0; t < count; t++) {
      float limit = magnitude[t] * eps8;
      limit = limit < tiny ? tiny : limit;
      if (floored && least_below[t] != 0.0f) continue;  // ``Settle`` sees to it
      if (magnitude[t] == 0.0f && below[t] == 0.0f)
        below[t] = 1.0f;
      else if (std::fabs(below[t]) < limit)
        below[t] = below[t] < 0.0f ? -limit : limit;
    }
    const bool as_given = a.out.type == FLOAT && a.out.entry == 1 && a.width == across;
    Settle settle{(float)a.floor, floored ? least_below : nullptr, floored ? least_rows : nullptr, 1, across,
                  a.gamma ? a.gamma + h : nullptr, a.beta ? a.beta + h : nullptr};
    settle(rows, below, across, count, as_given ? a.out.at<float>(b, h, first) : rows, as_given ? a.out.token : across);
    if (!as_given) write_rows(rows, a.out, b, h, first, a.width, count);
    if (!a.causal) continue;
    // as many keys as there were queries leave their windows for the sums
    for (long t = count; t < T; t++) key_weights[t] = 0.0f;
    for (long f = 0; f < F; f++) {
      vf total{};
      TV {
        vf y = load(keys.phi + f * T + t) * load(key_weights + t);
        store(keys.phi + f * T + t, y);
        total += y;
      }
      z[f] += sum(total);
    }
    multiply<false>(Product{keys.phi, T, values, across, kv, across}, F, across, T, ADD);
  }
  if (a.causal && h % (a.heads / a.key_heads) == 0)
    for (long f = 0; f < F; f++) {
      a.last_z[of_key * F + f] = z[f];
      for (long d = 0; d < a.width; d++) a.last_kv[(of_key * F + f) * a.width + d] = kv[f * across + d];
    }
}
