// What Python calls: plain C functions over raw memory. Threads are those of the OpenMP that torch runs on.

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "band_far.h"
#include "backward.h"
#include "causal_logs_backward.h"

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel

// Memory of a thread, kept for the next call: what is given back to the system has to be fetched, and cleared, again.
struct Scratch {
  float* data = nullptr;
  long size = 0;

  float* of(long count) {
    if (count > size) {
      std::free(data);
      void* raw = nullptr;
      data = posix_memalign(&raw, 4096, (size_t)count * sizeof(float)) ? nullptr : (float*)raw;
      size = data ? count : 0;
    }
    return data;
  }
  void let_go() {
    if (size > MOST_KEPT) std::free(data), data = nullptr, size = 0;
  }
  ~Scratch() { std::free(data); }
  static constexpr long MOST_KEPT = 1 << 20;
};
static thread_local Scratch scratch;

template <class Job>
struct Crew {
  const Job& job;
  void (*task)(const Job&, long, float*);
  long tasks, memory;
  std::atomic<long> next{0};
  std::atomic<bool> short_of_memory{false};

  static void run(void* self) { ((Crew*)self)->work(); }
  void work() {
    float* raw = scratch.of(memory);
    if (!raw) {
      short_of_memory = true;
      return;
    }
    for (long i; (i = next++) < tasks;) task(job, i, raw);
    scratch.let_go();
  }
};

template <class Job>
static int64_t go(const Job& job, void (*task)(const Job&, long, float*), long tasks, long memory, long threads,
                  void* parallel) {
  Crew<Job> crew{job, task, tasks, memory};
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    crew.work();
  } else if (parallel) {
    ((Parallel)parallel)(Crew<Job>::run, &crew, (unsigned)threads, 0);
  } else {
    std::vector<std::thread> others;
    try {
      for (long i = 1; i < threads; i++) others.emplace_back(Crew<Job>::run, &crew);
    } catch (...) {  // as many as there are
    }
    crew.work();
    for (auto& other : others) other.join();
  }
  return crew.short_of_memory && crew.next < tasks ? 2 : 0;
}

extern "C" {

int64_t maclin_vector_width() { return VW; }
int64_t maclin_block_tokens() { return T; }
int64_t maclin_features(const Map* map) { return map->features(); }
int64_t maclin_has_half() {
#ifdef HAS_HALF
  return 1;
#else
  return 0;
#endif
}

int64_t maclin_accumulate(const Accumulate* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  return go(*a, accumulate_task, a->splits * a->batch * a->heads, accumulate_memory(*a), threads, parallel);
}

int64_t maclin_read(const Read* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  return go(*a, read_task, a->batch * a->heads * a->chunks, read_memory(*a), threads, parallel);
}

int64_t maclin_causal(const Causal* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  return go(*a, causal_task, a->splits * a->batch * a->key_heads, causal_memory(*a), threads, parallel);
}

int64_t maclin_causal_queries(const CausalBackward* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  const long tasks = a->of.splits * a->of.batch * a->of.key_heads;
  return go(*a, causal_queries_task, tasks, QueriesMemory::size(a->of) + 512, threads, parallel);
}

int64_t maclin_causal_keys(const CausalBackward* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  const long tasks = a->of.splits * a->of.batch * a->of.key_heads;
  return go(*a, causal_keys_task, tasks, KeysMemory::size(a->of) + 512, threads, parallel);
}

int64_t maclin_causal_logs(const CausalLogs* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  return go(*a, causal_logs_task, a->batch * a->heads, LogKeysMemory::size(*a), threads, parallel);
}

int64_t maclin_causal_logs_queries(const CausalLogs* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  return go(*a, causal_logs_queries_task, a->batch * a->heads, LogKeysMemory::size(*a), threads, parallel);
}

int64_t maclin_causal_logs_keys(const CausalLogs* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  return go(*a, causal_logs_keys_task, a->batch * a->heads, LogKeysMemory::size(*a), threads, parallel);
}

int64_t maclin_band(const Band* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  return go(*a, band_task, a->batch * a->heads / a->together * a->chunks, BandMemory::size(*a), threads, parallel);
}

int64_t maclin_band_backward(const BandBackward* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  const long tasks = a->of.batch * a->of.key_heads * a->of.chunks;
  return go(*a, band_backward_task, tasks, BandDerivatives::size(a->of), threads, parallel);
}

int64_t maclin_band_far(const BandFar* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  return go(*a, band_far_task, a->of.batch * a->of.key_heads, BandFarMemory::size(a->of), threads, parallel);
}

int64_t maclin_read_backward(const ReadBackward* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  return go(*a, read_backward_task, a->batch * a->heads * a->chunks, read_backward_memory(*a), threads, parallel);
}

int64_t maclin_accumulate_backward(const AccumulateBackward* a, int64_t threads, void* parallel) {
  if (a->size != sizeof *a) return 1;
  const long memory = accumulate_backward_memory(*a);
  return go(*a, accumulate_backward_task, a->batch * a->heads * a->chunks, memory, threads, parallel);
}

void maclin_exp(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i + VW <= n; i += VW) store(y + i, vexp(load(x + i)));
}
void maclin_log(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i + VW <= n; i += VW) store(y + i, vlog(load(x + i)));
}
void maclin_sincos(const float* x, float* s, float* c, int64_t n) {
  for (int64_t i = 0; i + VW <= n; i += VW) {
    vf a, b;
    vsincos(load(x + i), a, b);
    store(s + i, a);
    store(c + i, b);
  }
}
}
