// Causal attention, chunk by chunk. Within a chunk, the similarities with its keys are features like the others:
//
//     num_i = [A_i; s_i1 .. s_iC]^T [kv; w_1 v_1 .. w_C v_C]      den_i = [A_i; s_i1 .. s_iC]^T [z; w_1 .. w_C]
//
// with A_i = weights x phi(q_i), s_ij = A_i^T phi(k_j), 0 for j > i, kv and z the sums before the chunk.
#pragma once

#include "walk.h"

#define CHUNK 48  // tokens; divides T
#define CHUNKS (T / CHUNK)

struct Causal {
  int64_t size;
  int64_t batch, heads, key_heads, length, width, splits;
  Map query, key;
  Array q, k, v, out;
  const uint8_t* mask;
  int64_t mask_batch, mask_token;
  const float* weights;      // (heads, features) or null
  const float *kv, *z;       // (splits, batch, key_heads, features, width or nothing), before the first token of each
  float *last_kv, *last_z;   // (batch, key_heads, ...), after the last token
  double floor;
  const float *gamma, *beta;  // (heads) or null
};

// What stands before a chunk, and its own keys behind it.
struct Before {
  float *kv, *z;  // (features + CHUNK, across), (features + CHUNK)
  float size_of_z;
};

static long causal_memory(const Causal& a) {
  const long F = a.key.features(), across = up(a.width);
  return Block::size(a.key) + Block::size(a.query) + CHUNK * T + (CHUNKS + 1) * (F + CHUNK + 1) * (across + 1) +
         2 * CHUNK * across + 4 * T + 512;
}

// z of the next chunk: z + sums over the chunk of phi times weight.
static void advance_z(const float* phi, long F, const float* weight, const float* z, float* next) {
  vf w[CHUNK / VW];
  for (long t = 0; t < CHUNK; t += VW) w[t / VW] = load(weight + t);
  for (long f = 0; f < F; f += VW) {
    const long rows = least(VW, F - f);
    vf lanes[VW] = {};
    for (long r = 0; r < rows; r++)
      for (long t = 0; t < CHUNK; t += VW) lanes[r] += load(phi + (f + r) * T + t) * w[t / VW];
    transpose(lanes);
    vf total = lanes[0];
    for (int r = 1; r < VW; r++) total += lanes[r];
    for (long r = 0; r < rows; r++) next[f + r] = z[f + r] + total[r];
  }
}

static float size_of(const float* z, long n) {
  vf square{};
  long i = 0;
  for (; i + VW <= n; i += VW) square += load(z + i) * load(z + i);
  float total = sum(square);
  for (; i < n; i++) total += z[i] * z[i];
  return std::sqrt(total) * 1.001f;
}

// What the constant feature alone gives each row of a chunk.
struct Constants {
  float *kv, *z;  // (CHUNK, across), (CHUNK)

  void fill(const Before& before, long F, long across, long step, float factor) {
    const float *values = before.kv + F * step, *weight = before.z + F;
    float total = before.z[F - 1];
    for (long t = 0; t < CHUNK; t++) z[t] = factor * (total += weight[t]);
    for (long i = 0; i < across; i += VW) {
      vf sums = load(before.kv + (F - 1) * step + i);
      for (long t = 0; t < CHUNK; t++) {
        sums += load(values + t * step + i);
        store(kv + t * across + i, sums * factor);
      }
    }
  }
};

// A row of kv is across numbers; where step is more, the number behind them is that of z.
struct Sums {
  Before before[CHUNKS + 1];
  long F, across, step;

  Sums(const Causal& a, Arena& arena, bool with_z) : F(a.key.features()), across(up(a.width)) {
    step = across + (with_z ? VW : 0);
    for (auto& x : before) x.kv = arena.take((F + CHUNK) * step), x.z = arena.take(F + CHUNK);
  }
  void start(const Causal& a, const float* kv, const float* z) {
    for (long f = 0; f < F; f++) {
      before[0].z[f] = z[f];
      for (long d = 0; d < step; d++) before[0].kv[f * step + d] = d < a.width ? kv[f * a.width + d] : 0.0f;
    }
  }
  // The keys of a block, and the sums before each of its chunks; before the first they are given.
  void block(const Causal& a, Block& keys, long b, long hk, long first, long count) {
    attended(keys.weight, a.mask ? a.mask + b * a.mask_batch + first * a.mask_token : nullptr, a.mask_token, count);
    load_block(keys.x, a.k, b, hk, first, a.key.head_dim, count, keys.weight);
    prepare(a.key, hk, keys.x, keys.norm);
    fill(a.key, hk, keys, true, nullptr);
    for (long c = 0; c < CHUNKS; c++) {
      Before &here = before[c], &next = before[c + 1];
      const float *phi = keys.phi + c * CHUNK, *weight = keys.weight + c * CHUNK;
      float* values = here.kv + F * step;
      load_rows(values, a.v, b, hk, first + c * CHUNK, a.width, count - c * CHUNK, weight, CHUNK, step);
      for (long t = 0; t < CHUNK; t++) here.z[F + t] = weight[t];
      if (step > across)
        for (long f = 0; f < F + CHUNK; f++) here.kv[f * step + across] = here.z[f];
      here.size_of_z = size_of(here.z, F + CHUNK);
      advance_z(phi, F, weight, here.z, next.z);
      Product p{phi, T, values, step, next.kv, step, nullptr, nullptr, here.kv};
      multiply<false>(p, F, across, CHUNK, ADD);
    }
  }
  void next() {
    Before last = before[CHUNKS];
    before[CHUNKS] = before[0];
    before[0] = last;
  }
};

// Numbers (CHUNK keys, CHUNK queries) of the keys behind a query become 0.
static void without_later(float* x, long step) {
  for (long j = 0; j < CHUNK; j++)
    for (long t = 0; t < j; t += VW) {
      vf y = load(x + j * step + t);
      for (int l = 0; l < VW; l++) y[l] = t + l < j ? 0.0f : y[l];
      store(x + j * step + t, y);
    }
}

static void times_weights(const float* weights, long F, const float* phi, float* to) {
  for (long f = 0; f < F; f++) TV store(to + f * T + t, load(phi + f * T + t) * weights[f]);
}

static void causal_task(const Causal& a, long task, float* memory) {
  const long lanes = a.batch * a.key_heads, split = task / lanes, row = task % lanes;
  const long b = row / a.key_heads, hk = row % a.key_heads, groups = a.heads / a.key_heads;
  const long F = a.key.features(), D = a.key.head_dim, across = up(a.width), blocks = (a.length + T - 1) / T;
  Arena arena{memory};
  Block keys(a.key, arena), queries(a.query, arena, CHUNK);
  Sums sums(a, arena, false);
  float *rows = arena.take(CHUNK * across), *below = arena.take(T);
  Constants constants{arena.take(CHUNK * across), arena.take(T)};
  sums.start(a, a.kv + task * F * a.width, a.z + task * F);
  const bool as_given = a.out.type == FLOAT && a.out.entry == 1 && a.width == across;
  for (long i = blocks * split / a.splits; i < blocks * (split + 1) / a.splits; i++) {
    const long first = i * T, count = least(T, a.length - first);
    sums.block(a, keys, b, hk, first, count);
    for (long g = 0; g < groups; g++) {
      const long h = hk * groups + g;
      attended(queries.weight, nullptr, 0, count);
      load_block(queries.x, a.q, b, h, first, D, count, queries.weight);
      prepare(a.query, h, queries.x, queries.norm);
      fill(a.query, h, queries, false, nullptr);
      if (a.weights) times_weights(a.weights + h * F, F, queries.phi, queries.phi);
      Settle settle{(float)a.floor, nullptr, nullptr, 1, across, a.gamma ? a.gamma + h : nullptr,
                    a.beta ? a.beta + h : nullptr};
      Ahead ahead;
      ahead_of(a.out, a.width, b, h, first, a.length, ahead.parts[0]);
      if (g + 1 < groups)
        ahead_of(a.q, D, b, h + 1, first, a.length, ahead.parts[1]);
      else
        ahead_of(a.q, D, b, hk * groups, first + T, a.length, ahead.parts[1]);
      for (long c = 0; c < CHUNKS && c * CHUNK < count; c++) {
        const Before& here = sums.before[c];
        const long of_chunk = least(CHUNK, count - c * CHUNK);
        float *phi = queries.phi + c * CHUNK, *within = phi + F * T;
        Product similar{keys.phi + c * CHUNK, T, phi, T, within, T, nullptr, &ahead};
        multiply<true>(similar, CHUNK, CHUNK, F, ZERO);
        without_later(within, T);
        denominators<CHUNK>(false, phi, F + CHUNK, here.z, here.size_of_z, of_chunk, below);
        Product p{phi, T, here.kv, across, rows, across, nullptr, &ahead, nullptr, F};
        multiply<true>(p, CHUNK, across, F + CHUNK, ZERO);
        if (a.floor > 0.0) {
          constants.fill(here, F, across, across, phi[(F - 1) * T]);
          settle.constant_kv = constants.kv, settle.constant_z = constants.z;
        }
        const long at = first + c * CHUNK;
        settle(rows, below, across, of_chunk, as_given ? a.out.at<float>(b, h, at) : rows,
               as_given ? a.out.token : across);
        if (!as_given) write_rows(rows, a.out, b, h, at, a.width, of_chunk);
      }
    }
    sums.next();
  }
  if (split == a.splits - 1)
    for (long f = 0; f < F; f++) {
      a.last_z[row * F + f] = sums.before[0].z[f];
      for (long d = 0; d < a.width; d++) a.last_kv[(row * F + f) * a.width + d] = sums.before[0].kv[f * across + d];
    }
}
