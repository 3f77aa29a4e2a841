// Derivatives of read and accumulate: every block is made again.
#pragma once

#include "walk.h"

struct Derivative {
  float *phi, *u, *x;  // of features (features, T), projections (projections, T) and x (up(head_dim), T)
  float* turned;       // (T, up(head_dim))

  Derivative(const Map& map, Arena& arena) {
    phi = arena.take(map.features() * T);
    u = arena.take(map.projections * T);
    x = arena.take(up(map.head_dim) * T);
    turned = arena.take(up(map.head_dim) * T);
  }
  static long size(const Map& map) {
    return (map.features() + map.projections + 2 * up(map.head_dim) + 4) * (long)T;
  }
};

static void through_products(const Map& map, long head, const Block& block, Derivative& d) {
  const long D = map.head_dim;
  const float* of = d.phi + (map.linear ? D * T : 0);
  const int32_t* index = map.index ? map.index + head * map.index_stride : nullptr;
  for (long f = 0; f < map.products; f++, of += T) {
    long rows[32], degree = 0, start = 0;
    for (; degree < map.num_ranks && f < map.ranks[degree]; start += map.ranks[degree++])
      rows[degree] = (long)index[start + f] * T;
    if (degree == 1) {
      TV store(d.u + rows[0] + t, load(d.u + rows[0] + t) + load(of + t));
    } else if (degree == 2) {
      TV {
        vf y = load(of + t), a = load(block.u + rows[0] + t), b = load(block.u + rows[1] + t);
        store(d.u + rows[0] + t, load(d.u + rows[0] + t) + y * b);
        store(d.u + rows[1] + t, load(d.u + rows[1] + t) + y * a);
      }
    } else {
      TV {
        vf before[33];  // products of the factors before each
        before[0] = load(of + t);
        for (long r = 0; r + 1 < degree; r++) before[r + 1] = before[r] * load(block.u + rows[r] + t);
        vf behind = splat(1.0f);
        for (long r = degree - 1; r >= 0; r--) {
          store(d.u + rows[r] + t, load(d.u + rows[r] + t) + before[r] * behind);
          behind *= load(block.u + rows[r] + t);
        }
      }
    }
  }
}

static void through_norm(const Map& map, long head, const Block& block, float* dx) {
  const long D = map.head_dim;
  if (map.norm == NONE) return;
  const float* shift = map.shift ? map.shift + head * D : nullptr;
  TV {
    vf inner{}, norm = load(block.norm + t);
    for (long d = 0; d < D; d++) inner += (load(block.x + d * T + t) + (shift ? shift[d] : 0.0f)) * load(dx + d * T + t);
    inner = norm > EPS ? inner : vf{};
    vf inverse = 1.0f / norm, mean{};
    for (long d = 0; d < D; d++) {
      vf x = load(block.x + d * T + t) + (shift ? shift[d] : 0.0f);
      vf y = (load(dx + d * T + t) - x * inner) * inverse;
      if (map.norm == BATCH) y *= map.root[head * D + d];
      mean += y;
      store(dx + d * T + t, y);
    }
    if (map.norm == TOKEN) {
      mean *= splat(1.0f / (float)D);
      for (long d = 0; d < D; d++) store(dx + d * T + t, load(dx + d * T + t) - mean);
    }
  }
}

// Takes the sums over count tokens of dx (head_dim, T) off sums (head_dim); what follows the tokens is not read.
static void less_sums(const float* dx, long head_dim, long count, float* sums) {
  for (long d = 0; d < head_dim; d++, dx += T) {
    vf total{};
    long t = 0;
    for (; t + VW <= count; t += VW) total += load(dx + t);
    float rest = sum(total);
    for (; t < count; t++) rest += dx[t];
    sums[d] -= rest;
  }
}

// From the derivatives of the features, which are overwritten, to those of x, written to its tensor; more (head_dim, T)
// is added. Those of the shift are added to of_shift (head_dim).
static void through_features(const Map& map, long head, const Block& block, Derivative& d, bool of_keys,
                             const float* of_log_weight, const Array& to, long b, long h, long first, long count,
                             const float* more = nullptr, float* of_shift = nullptr) {
  const long D = map.head_dim, P = map.projections, F = map.features();
  const float scale = (float)map.scale;
  float* dx = d.x;
  const float* du = d.u;
  bool projected = P > 0;
  switch (map.family) {
    case PRODUCT:
      if (map.linear) {
        for (long i = 0; i < D * T; i += VW) store(dx + i, load(d.phi + i));
      }
      if (projected) {
        for (long i = 0; i < P * T; i += VW) store(d.u + i, vf{});
        through_products(map, head, block, d);
        if (of_log_weight) TV store(d.u + (P - 1) * T + t, load(d.u + (P - 1) * T + t) + load(of_log_weight + t));
      }
      break;
    case POSITIVE:
      for (long i = 0; i < F * T; i += VW) store(d.phi + i, load(d.phi + i) * load(block.phi + i));
      du = d.phi;
      break;
    case FOURIER:
      for (long i = 0; i < P * T; i += VW)
        store(d.u + i, load(d.phi + i) * load(block.phi + P * T + i) - load(d.phi + P * T + i) * load(block.phi + i));
      break;
    case ELU:
      for (long i = 0; i < D * T; i += VW) {
        vf y = load(block.phi + i);
        store(dx + i, load(d.phi + i) * (y > 1.0f ? splat(1.0f) : y) * scale);
      }
      break;
    case SOFTMAX:
      for (long i = 0; i < D * T; i += VW) store(dx + i, load(d.phi + i) * load(block.phi + i) * scale);
      break;
    default:
      for (long i = 0; i < D * T; i += VW) store(dx + i, load(d.phi + i) * scale);
  }
  const bool added = map.family == PRODUCT && map.linear;
  if (projected) {
    Product p{map.matrix + head * P * D, D, du, T, dx, T};
    multiply<true>(p, D, T, P, added ? ADD : ZERO);
  } else if (map.family == PRODUCT && !added) {
    for (long i = 0; i < D * T; i += VW) store(dx + i, vf{});
  }
  if (map.family == POSITIVE && of_keys) TV {
    vf total{};
    for (long f = 0; f < P; f++) total += load(du + f * T + t);
    total *= splat(-scale);
    for (long i = 0; i < D; i++) store(dx + i * T + t, load(dx + i * T + t) + load(block.x + i * T + t) * total);
  }
  if (of_shift) less_sums(dx, D, count, of_shift);
  through_norm(map, head, block, dx);
  for (long i = 0; more && i < D * T; i += VW) store(dx + i, load(dx + i) + load(more + i));
  turn(dx, T, up(D), T, d.turned, up(D));
  if (of_keys)
    for (long t = 0; t < count; t++)
      if (block.weight[t] == 0.0f)
        for (long i = 0; i < up(D); i++) d.turned[t * up(D) + i] = 0.0f;
  write_rows(d.turned, to, b, h, first, D, count);
}

struct ReadBackward {
  int64_t size;
  int64_t batch, heads, length, width, chunks;
  Map map;
  Array q, d, dq;
  const float *kv, *z, *log_scale;
  double floor;
  const float *constant_kv, *constant_z;
  const float *gamma, *beta;
  float *of_kv, *of_z;                    // (chunks, batch, heads, features, width or nothing)
  float *of_constant_kv, *of_constant_z;  // (chunks, batch, heads, width or nothing) or null
  float *of_gamma, *of_beta;              // (chunks, batch, heads) or null
  float* of_shift;                        // (chunks, batch, heads, head_dim), zeros, or null
};

static long read_backward_memory(const ReadBackward& a) {
  const long F = a.map.features(), across = up(a.width);
  return Block::size(a.map) + Derivative::size(a.map) + (2 * across + 4 * VW) * T + 2 * F * (across + VW) + F * (VW + 1) +
         3 * across + 4 * T + 512;
}

// Numerators become their derivatives, in place, and of (T) gets those of the denominators; d are those of out.
struct Unsettle {
  float floor, constant_z;
  const float *constant_kv, *gamma, *beta;
  float *of_constant_kv, of_constant_z, of_gamma, of_beta;

  void operator()(float* rows, const float* d, const float* raw, const float* safe, long across, long count, float* of) {
    for (long t = 0; t < count; t++, rows += across, d += across) {
      float below = safe[t], share = 1.0f, missing = 1.0f;
      const float least_z = floor * constant_z;
      const bool cut = constant_kv && below < least_z;
      if (cut) missing = constant_z - below, share = (constant_z - least_z) / missing, below = least_z;
      const float inverse = 1.0f / below, power = gamma ? (*beta - 1.0f) * 0.5f : 0.0f;
      vf of_below{}, of_share{}, g_sum{}, b_sum{};
      for (long i = 0; i < across; i += VW) {
        vf n = load(rows + i), base = cut ? load(constant_kv + i) : vf{};
        vf x = (cut ? base + share * (n - base) : n) * inverse, g = load(d + i);
        if (gamma) {
          vf square = x * x + EPS, log = vlog(square), root = vexp(log * power), dx = g * root;
          g_sum += dx * x;
          b_sum += dx * x * log;
          g = dx * (1.0f + (*beta - 1.0f) * (x * x / square)) * *gamma;
        }
        vf dn = g * inverse;
        of_below -= dn * x;
        if (cut) {
          of_share += dn * (n - base);
          store(of_constant_kv + i, load(of_constant_kv + i) + (1.0f - share) * dn);
          dn *= share;
        }
        store(rows + i, dn);
      }
      float dd = sum(of_below);
      if (gamma) of_gamma += sum(g_sum), of_beta += sum(b_sum) * 0.5f * *gamma;
      if (cut) {
        const float s = sum(of_share);
        of_constant_z += s * (share / constant_z - share / missing) + dd * floor;
        dd = s * share / missing;
      }
      of[t] = safe[t] == raw[t] ? dd : 0.0f;
    }
    for (long t = count; t < T; t++, rows += across) {
      of[t] = 0.0f;
      for (long i = 0; i < across; i += VW) store(rows + i, vf{});
    }
  }
};

static void read_backward_task(const ReadBackward& a, long task, float* memory) {
  const long row = task / a.chunks, chunk = task % a.chunks, b = row / a.heads, h = row % a.heads;
  const long F = a.map.features(), across = up(a.width), blocks = (a.length + T - 1) / T, step = across + VW;
  Arena arena{memory};
  Block block(a.map, arena);
  Derivative d(a.map, arena);
  float *rows = arena.take(T * across), *given = arena.take(T * step), *turned = given;  // one after the other
  float *kv = arena.take(F * step), *of_kv = arena.take(F * across), *lanes = arena.take(F * VW);
  float *raw = arena.take(T), *safe = arena.take(T), *constant = arena.take(across), *of_constant = arena.take(across);
  const float *z = a.z + row * F, *logs = a.log_scale ? a.log_scale + row * F : nullptr;
  double size_of_z = 0;
  for (long f = 0; f < F; f++) {  // z as one column more
    size_of_z += (double)z[f] * z[f];
    for (long i = 0; i < across; i++) kv[f * step + i] = i < a.width ? a.kv[(row * F + f) * a.width + i] : 0.0f;
    kv[f * step + across] = a.map.family == IDENTITY ? 0.0f : z[f];
  }
  size_of_z = std::sqrt(size_of_z) * 1.001;
  const long at = chunk * a.batch * a.heads + row;
  float* of_shift = a.of_shift ? a.of_shift + at * a.map.head_dim : nullptr;
  for (long i = 0; i < F * across; i++) of_kv[i] = 0.0f;
  for (long i = 0; i < F * VW; i++) lanes[i] = 0.0f;
  for (long i = 0; i < across; i++) {
    constant[i] = a.constant_kv && i < a.width ? a.constant_kv[row * a.width + i] : 0.0f;
    of_constant[i] = 0.0f;
  }
  Unsettle unsettle{(float)a.floor, a.constant_z ? a.constant_z[row] : 0.0f, a.constant_kv ? constant : nullptr,
                    a.gamma ? a.gamma + h : nullptr, a.beta ? a.beta + h : nullptr, of_constant, 0.0f, 0.0f, 0.0f};
  for (long i = blocks * chunk / a.chunks; i < blocks * (chunk + 1) / a.chunks; i++) {
    const long first = i * T, count = least(T, a.length - first);
    attended(block.weight, nullptr, 0, count);
    load_block(block.x, a.q, b, h, first, a.map.head_dim, count, block.weight);
    prepare(a.map, h, block.x, block.norm);
    fill(a.map, h, block, false, logs);
    if (a.map.logs()) exponentiate_queries(a.map, block.phi);
    load_rows(given, a.d, b, h, first, a.width, count, block.weight);
    vf of[T / VW];
    if (a.map.family == IDENTITY) {
      for (long k = 0; k < T * across; k += VW) store(rows + k, load(given + k));
      TV of[t / VW] = vf{};
    } else {
      Ahead ahead;
      ahead_of(a.dq, a.map.head_dim, b, h, first, a.length, ahead.parts[0]);
      Product p{block.phi, T, kv, step, rows, across, nullptr, &ahead};
      multiply<true>(p, T, across, F, ZERO);
      denominators<T>(a.map.logs(), block.phi, F, z, (float)size_of_z, count, safe, raw);
      float derivative[T];
      unsettle(rows, given, raw, safe, across, count, derivative);
      TV of[t / VW] = load(derivative + t);
    }
    Ahead ahead;
    ahead_of(a.q, a.map.head_dim, b, h, first + T, a.length, ahead.parts[0]);
    ahead_of(a.d, a.width, b, h, first + T, a.length, ahead.parts[1]);
    Product to_kv{block.phi, T, rows, across, of_kv, across, nullptr, &ahead};
    multiply<false>(to_kv, F, across, T, ADD);
    for (long f = 0; f < F; f++) add_lanes<1>(block.phi + f * T, of, lanes + f * VW);
    turn(rows, across, T, across, turned, T);
    TV store(turned + across * T + t, of[t / VW]);
    Product to_phi{kv, step, turned, T, d.phi, T, nullptr, &ahead};
    multiply<false>(to_phi, F, T, across + 1, ZERO);
    through_features(a.map, h, block, d, false, nullptr, a.dq, b, h, first, count, nullptr, of_shift);
  }
  for (long f = 0; f < F; f++) {
    for (long i = 0; i < a.width; i++) a.of_kv[(at * F + f) * a.width + i] = of_kv[f * across + i];
    a.of_z[at * F + f] = sum(load(lanes + f * VW));
  }
  if (a.of_constant_kv) {
    for (long i = 0; i < a.width; i++) a.of_constant_kv[at * a.width + i] = of_constant[i];
    a.of_constant_z[at] = unsettle.of_constant_z;
  }
  if (a.of_gamma) a.of_gamma[at] = unsettle.of_gamma, a.of_beta[at] = unsettle.of_beta;
}

struct AccumulateBackward {
  int64_t size;
  int64_t batch, heads, length, width, chunks;
  Map map;
  Array k, v, dk, dv;
  const uint8_t* mask;
  int64_t mask_batch, mask_token;
  const float *of_kv, *of_z, *log_scale;  // (batch, heads, features, width or nothing)
};

static long accumulate_backward_memory(const AccumulateBackward& a) {
  const long F = a.map.features(), across = up(a.width);
  return Block::size(a.map) + Derivative::size(a.map) + (2 * across + VW) * T + F * (across + 1) + 4 * T + 512;
}

static void accumulate_backward_task(const AccumulateBackward& a, long task, float* memory) {
  const long row = task / a.chunks, chunk = task % a.chunks, b = row / a.heads, h = row % a.heads;
  const long F = a.map.features(), across = up(a.width), blocks = (a.length + T - 1) / T;
  Arena arena{memory};
  Block block(a.map, arena);
  Derivative d(a.map, arena);
  float *rows = arena.take(T * across), *values = arena.take(across * T), *kv = arena.take(F * across);
  float *on = arena.take(T), *of_log_weight = arena.take(T);
  const float *z = a.of_z + row * F, *logs = a.map.logs() ? a.log_scale + row * F : nullptr;
  for (long f = 0; f < F; f++)
    for (long i = 0; i < across; i++) kv[f * across + i] = i < a.width ? a.of_kv[(row * F + f) * a.width + i] : 0.0f;
  for (long i = 0; i < across * T; i++) values[i] = 0.0f;
  for (long i = blocks * chunk / a.chunks; i < blocks * (chunk + 1) / a.chunks; i++) {
    const long first = i * T, count = least(T, a.length - first);
    const uint8_t* mask = a.mask ? a.mask + b * a.mask_batch + first * a.mask_token : nullptr;
    attended(block.weight, mask, a.mask_token, count);
    TV store(on + t, load(block.weight + t));
    load_block(block.x, a.k, b, h, first, a.map.head_dim, count, on);
    prepare(a.map, h, block.x, block.norm);
    fill(a.map, h, block, true, nullptr);
    if (logs) {
      vf added[T / VW];
      key_logs(a.map, block.x, added);
      for (long f = 0; f < F; f++) {
        const float top = logs[f] == -INFINITY ? 0.0f : logs[f];
        TV store(block.phi + f * T + t, vexp(load(block.phi + f * T + t) + added[t / VW] - top));
      }
    }
    load_block(values, a.v, b, h, first, a.width, count, on);
    Ahead ahead;
    ahead_of(a.dv, a.width, b, h, first, a.length, ahead.parts[0]);
    ahead_of(a.dk, a.map.head_dim, b, h, first, a.length, ahead.parts[1]);
    Product to_v{block.phi, T, kv, across, rows, across, nullptr, &ahead};
    multiply<true>(to_v, T, across, F, ZERO);
    for (long t = 0; t < count; t++) {
      const float w = block.weight[t];
      if (w == 1.0f) continue;
      for (long j = 0; j < across; j += VW)
        store(rows + t * across + j, w == 0.0f ? vf{} : load(rows + t * across + j) * w);
    }
    write_rows(rows, a.dv, b, h, first, a.width, count);
    Ahead next;
    ahead_of(a.k, a.map.head_dim, b, h, first + T, a.length, next.parts[0]);
    ahead_of(a.v, a.width, b, h, first + T, a.length, next.parts[1]);
    Product to_phi{kv, across, values, T, d.phi, T, z, &next};
    multiply<false>(to_phi, F, T, across, ROWS);
    TV {
      vf w = load(block.weight + t), total{};
      for (long f = 0; f < F; f++) {
        vf y = load(d.phi + f * T + t);
        if (a.map.weighted) total += load(block.phi + f * T + t) * y;
        store(d.phi + f * T + t, y * w);
      }
      if (a.map.weighted) {
        vf log = load(block.u + (a.map.projections - 1) * T + t);
        store(of_log_weight + t, vabs(log) > MOST_EXPONENT ? vf{} : total * w);
      }
    }
    through_features(a.map, h, block, d, true, a.map.weighted ? of_log_weight : nullptr, a.dk, b, h, first, count);
  }
}
