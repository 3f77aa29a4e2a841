// Features of a block of T tokens. Everything lies as [entry][token], so that all of it runs over vectors of tokens.
#pragma once

#include "gemm.h"

#define T 96  // tokens of a block: a multiple of every tile's rows and of VW; x, v and features stay in the caches
#define EPS 1e-6f
#define MOST_EXPONENT 60.0f
#define TV for (int t = 0; t < T; t += VW)

enum Family { PRODUCT, POSITIVE, FOURIER, ELU, SOFTMAX, IDENTITY };
enum Norm { NONE, UNIT, TOKEN, BATCH };
enum Type { FLOAT, BFLOAT, HALF };

// The same fields, in the same order, as in calls.py; all of 8 bytes.
struct Map {
  int64_t family, norm, head_dim, projections, products, constants, linear, weighted, num_ranks, index_stride;
  double scale;
  const int64_t* ranks;
  const float* matrix;  // (heads, projections, head_dim)
  const float* offset;  // (heads, projections) or null
  const int32_t* index;  // per head, rank by rank: the rows of u that are multiplied
  const float *shift, *mean, *root;  // (heads, head_dim) or null; root = 1 / sqrt(variance + eps)

  long features() const {
    if (family == PRODUCT) return (linear ? head_dim : 0) + products + constants;
    return family == FOURIER ? 2 * projections : family == POSITIVE ? projections : head_dim;
  }
  bool logs() const { return family == POSITIVE || family == SOFTMAX; }
};

struct Array {
  char* data;
  int64_t type, batch, head, token, entry;  // strides in elements

  long bytes() const { return type == FLOAT ? 4 : 2; }
  char* address(long b, long h, long t) const { return data + bytes() * (b * batch + h * head + t * token); }
  long row_lines(long width) const { return entry == 1 ? (width * bytes() + 63) / 64 : 0; }

  template <class E>
  E* at(long b, long h, long t) const {
    return (E*)data + b * batch + h * head + t * token;
  }
};

// Memory of one thread, taken in pieces.
struct Arena {
  float* next;
  float* take(long count) {
    float* p = next;
    next += (count + 15) / 16 * 16;
    return p;
  }
};

struct Block {
  float *x, *u, *phi;    // (head_dim, T), (projections, T), (features, T)
  float *weight, *norm;  // (T)

  Block(const Map& map, Arena& arena, long more = 0) {  // more rows behind the features
    phi = arena.take((map.features() + more) * T);
    x = map.family == PRODUCT && map.linear ? phi : arena.take(map.head_dim * T);
    u = arena.take(map.projections * T);
    weight = arena.take(T);
    norm = arena.take(T);
  }
  static long size(const Map& map) { return (map.features() + map.head_dim + map.projections + 8) * (long)T; }
};

// x^T of count tokens, zero in the rest and where mask is 0.
template <class E>
static void load_transposed(float* x, const E* from, long token, long entry, long width, long count,
                            const float* weight) {
  for (long t = 0; t < T; t += VW) {
    long whole = entry == 1 && count - t >= VW ? width / VW * VW : 0;
    vf kept = load(weight + t);
    const bool all = !any(kept == 0.0f);
    for (long d = 0; d < whole; d += VW) {
      vf square[VW];
      for (int i = 0; i < VW; i++) square[i] = load(from + (t + i) * token + d);
      transpose(square);
      if (all)
        for (int i = 0; i < VW; i++) store(x + (d + i) * T + t, square[i]);
      else
        for (int i = 0; i < VW; i++) store(x + (d + i) * T + t, kept != 0.0f ? square[i] : vf{});
    }
    for (long d = whole; d < width; d++)
      for (int i = 0; i < VW; i++)
        x[d * T + t + i] = t + i < count && weight[t + i] != 0.0f ? value(from[(t + i) * token + d * entry]) : 0.0f;
  }
}

static void load_block(float* x, const Array& from, long b, long h, long first, long width, long count,
                       const float* weight) {
  if (from.type == FLOAT)
    load_transposed(x, from.at<float>(b, h, first), from.token, from.entry, width, count, weight);
  else if (from.type == BFLOAT)
    load_transposed(x, from.at<bf16>(b, h, first), from.token, from.entry, width, count, weight);
#ifdef HAS_HALF
  else
    load_transposed(x, from.at<half>(b, h, first), from.token, from.entry, width, count, weight);
#endif
}

// Normalise and shift x (head_dim, T) in place; the norms that were divided by go into norm.
static void prepare(const Map& map, long head, float* x, float* norm) {
  const long D = map.head_dim;
  const float* shift = map.shift ? map.shift + head * D : nullptr;
  if (map.norm != NONE) {
    vf mean[T / VW] = {}, square[T / VW] = {};
    if (map.norm == TOKEN) {
      for (long d = 0; d < D; d++)
#pragma GCC unroll 24
        TV mean[t / VW] += load(x + d * T + t);
      TV mean[t / VW] *= splat(1.0f / (float)D);
    }
    for (long d = 0; d < D; d++) {
      const bool batch = map.norm == BATCH;
      const float centre = batch ? map.mean[head * D + d] : 0.0f, root = batch ? map.root[head * D + d] : 1.0f;
#pragma GCC unroll 24
      TV {
        vf y = (load(x + d * T + t) - mean[t / VW] - centre) * root;
        store(x + d * T + t, y);
        square[t / VW] += y * y;
      }
    }
    TV {
      vf size = vsqrt(square[t / VW]);
      size = size < EPS ? splat(EPS) : size;
      store(norm + t, size);
      square[t / VW] = 1.0f / size;
    }
    for (long d = 0; d < D; d++) {
      const float moved = shift ? shift[d] : 0.0f;
#pragma GCC unroll 24
      TV store(x + d * T + t, load(x + d * T + t) * square[t / VW] - moved);
    }
  } else if (shift) {
    for (long d = 0; d < D; d++) TV store(x + d * T + t, load(x + d * T + t) - shift[d]);
  }
}

static void project(const Map& map, long head, const float* x, float* u, const float* start, Ahead* ahead) {
  Product p{map.matrix + head * map.projections * map.head_dim, map.head_dim, x, T, u, T, start, ahead};
  multiply<false>(p, map.projections, T, map.head_dim, start ? ROWS : ZERO);
}

// What is added to the logarithms of all features of a key.
static void key_logs(const Map& map, const float* x, vf* added) {
  const float half_log = 0.5f * std::log((float)map.projections), factor = (float)(-0.5 * map.scale);
  TV {
    vf square{};
    if (map.family == POSITIVE)
      for (long d = 0; d < map.head_dim; d++) square += load(x + d * T + t) * load(x + d * T + t);
    added[t / VW] = map.family == POSITIVE ? square * factor - half_log : vf{};
  }
}

// phi of prepared x; in the log domain logarithms, to which those of queries have query_logs (features) added, and those
// of keys lack key_logs.
static void fill(const Map& map, long head, Block& block, bool of_keys, const float* query_logs,
                 Ahead* ahead = nullptr) {
  const float scale = (float)map.scale;
  const long D = map.head_dim, P = map.projections;
  float *x = block.x, *u = block.u, *phi = block.phi;
  const float* offset = map.offset ? map.offset + head * P : nullptr;
  switch (map.family) {
    case PRODUCT: {
      if (P) project(map, head, x, u, offset, ahead);
      if (map.weighted && of_keys) TV {
        vf log = load(u + (P - 1) * T + t);
        log = log > MOST_EXPONENT ? splat(MOST_EXPONENT) : log < -MOST_EXPONENT ? splat(-MOST_EXPONENT) : log;
        store(block.weight + t, load(block.weight + t) * vexp(log));
      }
      float* to = phi + (map.linear ? D * T : 0);
      const int32_t* index = map.index ? map.index + head * map.index_stride : nullptr;
      for (long f = 0; f < map.products; f++, to += T) {
        const float* factors[32];
        long degree = 0, start = 0;
        for (; degree < map.num_ranks && f < map.ranks[degree]; start += map.ranks[degree++])
          factors[degree] = u + (long)index[start + f] * T;
        if (degree == 1)
          TV store(to + t, load(factors[0] + t));
        else if (degree == 2)
          TV store(to + t, load(factors[0] + t) * load(factors[1] + t));
        else
          TV {
            vf y = load(factors[0] + t) * load(factors[1] + t);
            for (long r = 2; r < degree; r++) y *= load(factors[r] + t);
            store(to + t, y);
          }
      }
      for (long f = 0; f < map.constants; f++, to += T) TV store(to + t, splat(1.0f));
      break;
    }
    case POSITIVE:
      project(map, head, x, phi, of_keys ? nullptr : query_logs, ahead);
      break;
    case FOURIER:
      project(map, head, x, u, offset, ahead);
      for (long f = 0; f < P; f++) TV {
        vf s, c;
        vsincos(load(u + f * T + t), s, c);
        store(phi + f * T + t, s);
        store(phi + (P + f) * T + t, c);
      }
      break;
    case ELU:
      for (long d = 0; d < D; d++) TV {
        vf y = load(x + d * T + t) * scale;
        store(phi + d * T + t, y > 0.0f ? y + 1.0f : vexp(y));
      }
      break;
    default:
      for (long d = 0; d < D; d++) {
        const float added = !of_keys && query_logs ? query_logs[d] : 0.0f;
        TV store(phi + d * T + t, load(x + d * T + t) * scale + added);
      }
  }
}

// The logarithms phi become exp(phi - the largest of each token).
static void exponentiate_queries(const Map& map, float* phi) {
  const long F = map.features();
  vf top[T / VW];
  TV top[t / VW] = load(phi + t);
  for (long f = 1; f < F; f++)
#pragma GCC unroll 24
    TV top[t / VW] = vmax(load(phi + f * T + t), top[t / VW]);
  TV top[t / VW] = top[t / VW] == -INFINITY ? vf{} : top[t / VW];
  for (long f = 0; f < F; f++)
#pragma GCC unroll 24
    TV store(phi + f * T + t, vexp(load(phi + f * T + t) - top[t / VW]));
}
