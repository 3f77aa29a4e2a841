// accumulate: keys and values to sums. read: queries and sums to out. Blocks of T tokens, tasks for every thread.
#pragma once

#include "rows.h"

// The sums of one head over a range of tokens.
struct Totals {
  float *kv, *lanes, *top;  // (features, up(width)), (features, VW), (features) in the log domain
};

template <int R>
static INLINE void add_lanes(const float* phi, const vf* weight, float* lanes) {
  vf total[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) total[r] = load(lanes + r * VW);
#pragma GCC unroll 24
  TV
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) total[r] += load(phi + r * T + t) * weight[t / VW];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) store(lanes + r * VW, total[r]);
}

// z, and in the log domain the exponentials of the features of a block
static void add_features(const Map& map, Totals& sums, Block& block, long across) {
  const long F = map.features();
  vf weight[T / VW];
  TV weight[t / VW] = load(block.weight + t);
  long f = 0;
  if (map.logs()) {
    vf added[T / VW];
    key_logs(map, block.x, added);
    TV added[t / VW] = weight[t / VW] != 0.0f ? added[t / VW] : splat(-INFINITY);
    for (; f < F; f++) {
      float* row = block.phi + f * T;
      vf most = splat(-INFINITY);
#pragma GCC unroll 24
      TV most = vmax(load(row + t) + added[t / VW], most);
      float old = sums.top[f], top = largest(most);
      vf total = load(sums.lanes + f * VW);
      if (top > old) {
        const float shrink = old == -INFINITY ? 0.0f : std::exp(old - top);
        for (long d = 0; d < across; d += VW) store(sums.kv + f * across + d, load(sums.kv + f * across + d) * shrink);
        total *= shrink;
        sums.top[f] = top;
      } else {
        top = old;
      }
      const float base = top == -INFINITY ? 0.0f : top;
#pragma GCC unroll 24
      TV {
        vf y = vexp(load(row + t) + added[t / VW] - base);
        store(row + t, y);
        total += y;
      }
      store(sums.lanes + f * VW, total);
    }
  }
  for (; f + 4 <= F; f += 4) add_lanes<4>(block.phi + f * T, weight, sums.lanes + f * VW);
  for (; f < F; f++) add_lanes<1>(block.phi + f * T, weight, sums.lanes + f * VW);
}

struct Accumulate {
  int64_t size;  // of this struct, so that an old library is not called with a new one
  int64_t batch, heads, length, width, splits;
  Map map;
  Array k, v;
  const uint8_t* mask;
  int64_t mask_batch, mask_token;
  float *kv, *z, *log_scale;  // (splits, batch, heads, features, width or nothing)
};

static long accumulate_memory(const Accumulate& a) {
  const long F = up_to_tiles(a.map.features()), across = up_to_tiles(a.width);
  return Block::size(a.map) + 2 * T * across + F * (across + VW + 1 + T) + 512;
}

static void accumulate_task(const Accumulate& a, long task, float* memory) {
  const long rows = a.batch * a.heads, split = task / rows, row = task % rows, b = row / a.heads, h = row % a.heads;
  const bool narrow = a.v.type == BFLOAT && tiles_allowed();
  const long F = a.map.features(), tall = narrow ? up_to_tiles(F) : F;
  const long across = narrow ? up_to_tiles(a.width) : up(a.width), blocks = (a.length + T - 1) / T;
  Arena arena{memory};
  Block block(a.map, arena);
  Tiles tiles(narrow);
  float* values = arena.take(T * across);
  bf16 *phi16 = (bf16*)arena.take(narrow ? tall * T / 2 : 0), *values16 = (bf16*)arena.take(narrow ? T * across / 2 : 0);
  Totals sums{arena.take(tall * across), arena.take(F * VW), arena.take(F)};
  for (long i = 0; i < tall * across; i++) sums.kv[i] = 0.0f;
  for (long i = 0; i < F * VW; i++) sums.lanes[i] = 0.0f;
  for (long i = 0; i < F; i++) sums.top[i] = -INFINITY;
  for (long i = blocks * split / a.splits; i < blocks * (split + 1) / a.splits; i++) {
    const long first = i * T, count = least(T, a.length - first);
    const uint8_t* mask = a.mask ? a.mask + b * a.mask_batch + first * a.mask_token : nullptr;
    const long kept = attended(block.weight, mask, a.mask_token, count);
    if (!kept) continue;
    Ahead ahead;
    ahead_of(a.k, a.map.head_dim, b, h, first + T, a.length, ahead.parts[0]);
    ahead_of(a.v, a.width, b, h, first + T, a.length, ahead.parts[1]);
    load_block(block.x, a.k, b, h, first, a.map.head_dim, count, block.weight);
    prepare(a.map, h, block.x, block.norm);
    fill(a.map, h, block, true, nullptr, &ahead);
    add_features(a.map, sums, block, across);
    // where every weight is 1, the values are taken from where they are
    const bool as_given = kept == T && !a.map.weighted && a.v.type != HALF && a.v.entry == 1 && a.width == across &&
                          (narrow || a.v.type == FLOAT);
    if (!as_given) load_rows(values, a.v, b, h, first, a.width, count, block.weight, T, across);
    if (narrow) {
      narrow_rows(block.phi, T, F, T, phi16, ahead);
      if (as_given)
        pair_rows(a.v.at<bf16>(b, h, first), a.v.token, T, across, values16, ahead);
      else
        narrow_pairs(values, across, T, across, values16, ahead);
      multiply_tiles(phi16, T, values16, 2 * across, sums.kv, across, tall, across, T, true, ahead);
    } else {
      Product p{block.phi, T, as_given ? a.v.at<float>(b, h, first) : values, as_given ? a.v.token : across,
                sums.kv,   across, nullptr, &ahead};
      multiply<false>(p, F, across, T, ADD);
    }
  }
  float *kv = a.kv + task * F * a.width, *z = a.z + task * F;
  for (long f = 0; f < F; f++) {
    for (long d = 0; d < a.width; d++) kv[f * a.width + d] = sums.kv[f * across + d];
    z[f] = sum(load(sums.lanes + f * VW));
    if (a.map.logs()) a.log_scale[task * F + f] = sums.top[f];
  }
}

struct Read {
  int64_t size;
  int64_t batch, heads, length, width, chunks;
  int64_t fresh;  // out is contiguous, and its memory has just come from the system
  Map map;
  Array q, out;
  const float *kv, *z, *log_scale;  // (batch, heads, features, width or nothing); no log_scale: null
  double floor;
  const float *constant_kv, *constant_z;  // (batch, heads, width or nothing) or null
  const float *gamma, *beta;              // (heads) or null
};

// Denominators of COLUMNS tokens under the policy of core/contract.py.
template <int COLUMNS>
static void denominators(bool logs, const float* phi, long F, const float* z, float size_of_z, long count, float* out,
                         float* raw = nullptr) {  // raw: as they are
  const float eps8 = 8 * 1.1920929e-7f, tiny = 1.17549435e-38f;
  vf total[COLUMNS / VW] = {}, square[COLUMNS / VW] = {};
  for (long f = 0; f < F; f++) {
    const float of = z[f];
#pragma GCC unroll 24
    for (int t = 0; t < COLUMNS; t += VW) {
      vf y = load(phi + f * T + t);
      total[t / VW] += y * of;
      square[t / VW] += y * y;
    }
  }
  bool doubtful = false;
  for (int t = 0; t < COLUMNS; t += VW) {
    store(out + t, total[t / VW]);
    if (raw) store(raw + t, total[t / VW]);
    vf bound = vsqrt(square[t / VW]) * (eps8 * size_of_z);  // more than that of the magnitudes of the terms
    bound = bound < tiny ? splat(tiny) : bound;
    vi small = logs ? (total[t / VW] == 0.0f) : ~(vabs(total[t / VW]) > bound);
    doubtful |= any(small);
  }
  if (!doubtful) return;
  for (long t = 0; t < count; t++) {
    if (logs) {
      if (out[t] == 0.0f) out[t] = 1.0f;
      continue;
    }
    float magnitude = 0.0f;
    for (long f = 0; f < F; f++) magnitude += std::fabs(phi[f * T + t] * z[f]);
    float limit = magnitude * eps8;
    limit = limit < tiny ? tiny : limit;
    if (magnitude == 0.0f && out[t] == 0.0f)
      out[t] = 1.0f;
    else if (std::fabs(out[t]) < limit)
      out[t] = out[t] < 0.0f ? -limit : limit;
  }
}

// Numerators (T, across) over denominators, with the floor and ppSBN's second half.
struct Settle {
  float floor;
  const float *constant_z, *constant_kv;  // of each token (one), (across), or null
  long constant_step, constant_kv_step;   // 0 where all tokens have the same
  const float *gamma, *beta;

  // into to, step numbers from row to row; rows are overwritten
  template <class E>
  void operator()(float* rows, const float* below, long across, long count, E* to, long step) const {
    for (long t = 0; t < count; t++, rows += across, to += step) {
      float d = below[t];
      const float most = constant_z ? constant_z[t * constant_step] : 0.0f, least_z = floor * most;
      if (constant_kv && d < least_z) {
        const float share = (most - least_z) / (most - d);
        for (long i = 0; i < across; i += VW) {
          vf base = load(constant_kv + t * constant_kv_step + i);
          store(rows + i, base + share * (load(rows + i) - base));
        }
        d = least_z;
      }
      const float inverse = 1.0f / d;
      if (!gamma) {
        for (long i = 0; i < across; i += VW) store(to + i, load(rows + i) * inverse);
      } else {
        const float power = (*beta - 1.0f) * 0.5f;
        for (long i = 0; i < across; i += VW) {
          vf x = load(rows + i) * inverse;
          store(to + i, *gamma * x * vexp(vlog(x * x + EPS) * power));
        }
      }
    }
  }
};

static long read_memory(const Read& a) {
  const long F = up_to_tiles(a.map.features()), across = up_to_tiles(a.width);
  return Block::size(a.map) + (2 * T + 2 * F + 1) * across + F * T + T + 1024;
}

static void read_task(const Read& a, long task, float* memory) {
  const long row = task / a.chunks, chunk = task % a.chunks, b = row / a.heads, h = row % a.heads;
  const bool narrow = a.q.type == BFLOAT && tiles_allowed();
  const long F = a.map.features(), tall = narrow ? up_to_tiles(F) : F;
  const long across = narrow ? up_to_tiles(a.width) : up(a.width), blocks = (a.length + T - 1) / T;
  Arena arena{memory};
  Block block(a.map, arena);
  Tiles tiles(narrow);
  float *rows = arena.take(T * across), *kv = arena.take(tall * across), *below = arena.take(T);
  float* constant = arena.take(across);
  const float *z = a.z + row * F, *logs = a.log_scale ? a.log_scale + row * F : nullptr;
  double size_of_z = 0;
  for (long f = 0; f < F; f++) {
    size_of_z += (double)z[f] * z[f];
    for (long d = 0; d < across; d++) kv[f * across + d] = d < a.width ? a.kv[(row * F + f) * a.width + d] : 0.0f;
  }
  size_of_z = std::sqrt(size_of_z) * 1.001;
  float* turned = arena.take(narrow ? T * across + tall * across : 0);
  bf16 *kv16 = (bf16*)arena.take(narrow ? tall * across / 2 : 0), *phi16 = (bf16*)arena.take(narrow ? tall * T / 2 : 0);
  if (narrow) {
    for (long i = F * across; i < tall * across; i++) kv[i] = 0.0f;
    turn(kv, across, tall, across, turned, tall);
    Ahead nothing;
    narrow_rows(turned, tall, across, tall, kv16, nothing);
  }
  for (long d = 0; d < across; d++)
    constant[d] = a.constant_kv && d < a.width ? a.constant_kv[row * a.width + d] : 0.0f;
  Settle settle{(float)a.floor, a.constant_z ? a.constant_z + row : nullptr, a.constant_kv ? constant : nullptr, 0, 0,
                a.gamma ? a.gamma + h : nullptr, a.beta ? a.beta + h : nullptr};
  const bool as_given = a.out.type != HALF && a.out.entry == 1 && a.width == across;
  for (long i = blocks * chunk / a.chunks, left = 0; i < blocks * (chunk + 1) / a.chunks; i++) {
    const long first = i * T, count = least(T, a.length - first);
    if (a.fresh && left-- == 0) {
      fetch_pages(a.out, b, h, first, least(FRESH_BLOCKS * T, a.length - first));
      left = FRESH_BLOCKS - 1;
    }
    attended(block.weight, nullptr, 0, count);
    Ahead ahead;
    ahead_of(a.out, a.width, b, h, first, a.length, ahead.parts[0]);
    ahead_of(a.q, a.map.head_dim, b, h, first + T, a.length, ahead.parts[1]);
    load_block(block.x, a.q, b, h, first, a.map.head_dim, count, block.weight);
    prepare(a.map, h, block.x, block.norm);
    fill(a.map, h, block, false, logs, &ahead);
    if (a.map.logs()) exponentiate_queries(a.map, block.phi);
    Product p{block.phi, T, kv, across, rows, across, nullptr, &ahead};
    if (narrow) {
      narrow_pairs(block.phi, T, F, T, phi16, ahead);
      multiply_tiles(kv16, tall, phi16, 2 * T, turned, T, across, T, tall, false, ahead);
      turn(turned, T, across, T, rows, across);
    } else {
      multiply<true>(p, T, across, F, ZERO);
    }
    if (a.map.family != IDENTITY) {
      denominators<T>(a.map.logs(), block.phi, F, z, (float)size_of_z, count, below);
      if (!as_given)
        settle(rows, below, across, count, rows, across);
      else if (a.out.type == FLOAT)
        settle(rows, below, across, count, a.out.at<float>(b, h, first), a.out.token);
      else
        settle(rows, below, across, count, a.out.at<bf16>(b, h, first), a.out.token);
      if (as_given) continue;
    }
    write_rows(rows, a.out, b, h, first, a.width, count, across);
  }
}
