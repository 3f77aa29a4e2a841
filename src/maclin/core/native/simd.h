// Vectors of floats as wide as the processor's, with the few functions that features need.
//
// GCC's vector extensions, so that one source serves AVX-512, AVX2, NEON and whatever else a compiler knows. Function
// errors are in units in the last place over the ranges that the tests hold: exp 1.5, log 1.5, sin and cos 2.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define VW 16
#define REGISTERS 32
#elif defined(__AVX__)
#define VW 8
#define REGISTERS 16
#elif defined(__aarch64__)
#define VW 4
#define REGISTERS 32
#else
#define VW 4
#define REGISTERS 16
#endif

#define INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint16_t vh __attribute__((vector_size(VW * 2)));
#if defined(__FLT16_MAX__)
#define HAS_HALF 1
typedef _Float16 half;
typedef _Float16 vhalf __attribute__((vector_size(VW * 2)));
#endif
struct bf16 {
  uint16_t bits;
};

static INLINE vf splat(float x) { return x - vf{}; }  // x + 0 would lose the sign of -0
static INLINE vi splati(int32_t x) { return x - vi{}; }
static INLINE vi bits_of(vf x) { return (vi)x; }
static INLINE vf float_of(vi x) { return (vf)x; }
static INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
static INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
static INLINE vf vabs(vf x) { return float_of(bits_of(x) & 0x7fffffff); }

static INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
static INLINE vf load(const bf16* p) {
  vh x;
  std::memcpy(&x, p, sizeof x);
  return (vf)(__builtin_convertvector(x, vu) << 16);
}
static INLINE vh rounded(vf x) {  // to bfloat16, to nearest, ties to even; NaN stays NaN
  vu u = (vu)x, up = (u + (0x7fff + ((u >> 16) & 1))) >> 16;
  return __builtin_convertvector((x == x) ? up : ((u >> 16) | 0x40), vh);
}
static INLINE void store(bf16* p, vf x) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  __m256bh y = _mm512_cvtneps_pbh((__m512)x);
#else
  vh y = rounded(x);
#endif
  std::memcpy(p, &y, sizeof y);
}
static INLINE float value(float x) { return x; }
static INLINE float value(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float y;
  std::memcpy(&y, &u, 4);
  return y;
}
static INLINE void put(float* p, float x) { *p = x; }
static INLINE void put(bf16* p, float x) {
  vh y = rounded(splat(x));
  p->bits = y[0];
}
#ifdef HAS_HALF
static INLINE vf load(const half* p) {
  vhalf x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vf);
}
static INLINE void store(half* p, vf x) {
  vhalf y = __builtin_convertvector(x, vhalf);
  std::memcpy(p, &y, sizeof y);
}
static INLINE float value(half x) { return (float)x; }
static INLINE void put(half* p, float x) { *p = (half)x; }
#endif

static INLINE float sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (int i = 0; i < VW; i++) total += x[i];
  return total;
#endif
}
static INLINE float largest(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int i = 1; i < VW; i++) top = x[i] > top ? x[i] : top;
  return top;
#endif
}
static INLINE bool any(vi x) {
  int64_t parts[VW / 2], found = 0;
  std::memcpy(parts, &x, sizeof parts);
  for (int i = 0; i < VW / 2; i++) found |= parts[i];
  return found != 0;
}

static INLINE vf vsqrt(vf x) {
  vf y = x;
  for (int i = 0; i < VW; i++) y[i] = std::sqrt(x[i]);
  return y;
}

// exp: x = n log 2 + r, a polynomial in r, 2^n in two factors so that neither overflows.
static INLINE vf vexp(vf x) {
#if defined(__AVX512F__)
  __m512 y = _mm512_max_ps(_mm512_set1_ps(-105.0f), _mm512_min_ps(_mm512_set1_ps(90.0f), (__m512)x));  // NaN passes
  vf n = (vf)_mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)), 8);
  vf r = (vf)y - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
#else
  vf y = x > 90.0f ? splat(90.0f) : x;  // beyond, infinity comes out in any case; NaN passes
  y = y < -105.0f ? splat(-105.0f) : y;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  vf shifted = y * 1.44269504f + magic;
  vf n = shifted - magic;
  vf r = y - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
#endif
  vf p = splat(1.98756915e-4f);
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345198e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi whole = bits_of(shifted) - bits_of(magic);
  vi first = whole >> 1;
  return p * float_of((first + 127) << 23) * float_of((whole - first + 127) << 23);
#endif
}

// log of positive normal numbers: x = 2^n m with m in [sqrt 1/2, sqrt 2).
static INLINE vf vlog(vf x) {
  vi b = bits_of(x) - 0x3f3504f3;
  vi n = b >> 23;
  vf m = float_of((b & 0x7fffff) + 0x3f3504f3) - 1.0f;
  vf z = m * m;
  vf p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  vf e = __builtin_convertvector(n, vf);
  vf y = m * z * p + e * -2.12194440e-4f - 0.5f * z;
  return (m + y) + e * 0.693359375f;
}

// sin and cos together: x = n pi/2 + r in three steps, which holds up to |x| of some 10,000; beyond, one by one.
static INLINE void vsincos(vf x, vf& s, vf& c) {
  const vf magic = splat(12582912.0f);
  vf shifted = x * 0.636619772f + magic;
  vf n = shifted - magic;
  vf r = x - n * 1.5703125f;
  r = r - n * 4.837512969970703e-4f;
  r = r - n * 7.54978942e-8f;
  vf z = r * r;
  vf ps = splat(-1.9515295891e-4f);
  ps = ps * z + 8.3321608736e-3f;
  ps = ps * z - 1.6666654611e-1f;
  ps = ps * (z * r) + r;
  vf pc = splat(2.443315711809948e-5f);
  pc = pc * z - 1.388731625493765e-3f;
  pc = pc * z + 4.166664568298827e-2f;
  pc = pc * (z * z) - 0.5f * z + 1.0f;
  vi k = bits_of(shifted);
  vi odd = -(k & 1);
  vf a = odd != 0 ? pc : ps, b = odd != 0 ? ps : pc;
  s = float_of(bits_of(a) ^ ((k & 2) << 30));
  c = float_of(bits_of(b) ^ (((k + 1) & 2) << 30));
  if (__builtin_expect(any(!(vabs(x) < 8192.0f)), 0))
    for (int i = 0; i < VW; i++)
      if (!(std::fabs(x[i]) < 8192.0f)) s[i] = std::sin(x[i]), c[i] = std::cos(x[i]);
}

// Swap rows and columns of a square of vectors, in steps of 1, 2, 4, ...
#if defined(__clang__) || __GNUC__ >= 12
#if VW == 16
#define SHUFFLE(a, b, f) __builtin_shufflevector(a, b, f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15))
#elif VW == 8
#define SHUFFLE(a, b, f) __builtin_shufflevector(a, b, f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7))
#else
#define SHUFFLE(a, b, f) __builtin_shufflevector(a, b, f(0), f(1), f(2), f(3))
#endif
#else
#if VW == 16
#define SHUFFLE(a, b, f) __builtin_shuffle(a, b, vi{f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)})
#elif VW == 8
#define SHUFFLE(a, b, f) __builtin_shuffle(a, b, vi{f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)})
#else
#define SHUFFLE(a, b, f) __builtin_shuffle(a, b, vi{f(0), f(1), f(2), f(3)})
#endif
#endif
template <int S>
static INLINE void swap_step(vf (&x)[VW]) {
#define LOW(j) (((j) & S) ? (j) - S + VW : (j))
#define HIGH(j) (((j) & S) ? (j) + VW : (j) + S)
#pragma GCC unroll 16
  for (int i = 0; i < VW; i++) {
    if (i & S) continue;
    vf a = x[i], b = x[i + S];
    x[i] = SHUFFLE(a, b, LOW);
    x[i + S] = SHUFFLE(a, b, HIGH);
  }
#undef LOW
#undef HIGH
}
static INLINE void transpose(vf (&x)[VW]) {
  swap_step<1>(x);
  swap_step<2>(x);
#if VW >= 8
  swap_step<4>(x);
#endif
#if VW >= 16
  swap_step<8>(x);
#endif
}
