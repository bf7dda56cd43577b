/* Plain copies, fills and comparisons: what the machine's memory can do, to measure the rest by.
 *
 * Nothing here is shared with paramkit's kernels. Each kind is the simplest loop that does it: libc's
 * memcpy and memset, ordinary vector stores left to the compiler, and streaming (non-temporal) stores,
 * which write past the cache. The bytes are split into one run for each thread.
 *
 * Threads: torch's own OpenMP threads where its runtime is in the process, so that two pools do not
 * spin against each other on the same cores; else a small pool of this file that sleeps between jobs.
 */

#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#endif

enum { LIBC = 0, STREAM_128 = 1, STREAM_256 = 2, STREAM_512 = 3, KINDS = 4 };

typedef void (*copy_fn)(char*, const char*, size_t);
typedef void (*fill_fn)(char*, int, size_t);

static void copy_libc(char* dst, const char* src, size_t n) { memcpy(dst, src, n); }
static void fill_libc(char* dst, int value, size_t n) { memset(dst, value, n); }

#ifdef X86
/* Head up to an aligned destination, four registers a turn, tail. Streaming stores need the alignment. */
#define STREAM_COPY(NAME, TARGET, REG, LOAD, STREAM)                                                 \
  __attribute__((target(TARGET))) static void NAME(char* d, const char* s, size_t n) {               \
    size_t head = (size_t)(-(uintptr_t)d) & (sizeof(REG) - 1);                                       \
    if (head > n) head = n;                                                                          \
    memcpy(d, s, head);                                                                              \
    d += head, s += head, n -= head;                                                                 \
    for (; n >= 4 * sizeof(REG); d += 4 * sizeof(REG), s += 4 * sizeof(REG), n -= 4 * sizeof(REG)) { \
      REG a = LOAD((const void*)s);                                                                  \
      REG b = LOAD((const void*)(s + sizeof(REG)));                                                  \
      REG c = LOAD((const void*)(s + 2 * sizeof(REG)));                                              \
      REG e = LOAD((const void*)(s + 3 * sizeof(REG)));                                              \
      STREAM((void*)d, a);                                                                           \
      STREAM((void*)(d + sizeof(REG)), b);                                                           \
      STREAM((void*)(d + 2 * sizeof(REG)), c);                                                       \
      STREAM((void*)(d + 3 * sizeof(REG)), e);                                                       \
    }                                                                                                \
    memcpy(d, s, n);                                                                                 \
    _mm_sfence();                                                                                    \
  }

#define STREAM_FILL(NAME, TARGET, REG, SET, STREAM)                                \
  __attribute__((target(TARGET))) static void NAME(char* d, int value, size_t n) { \
    size_t head = (size_t)(-(uintptr_t)d) & (sizeof(REG) - 1);                     \
    if (head > n) head = n;                                                        \
    memset(d, value, head);                                                        \
    d += head, n -= head;                                                          \
    REG a = SET((char)value);                                                      \
    for (; n >= 4 * sizeof(REG); d += 4 * sizeof(REG), n -= 4 * sizeof(REG)) {     \
      STREAM((void*)d, a);                                                         \
      STREAM((void*)(d + sizeof(REG)), a);                                         \
      STREAM((void*)(d + 2 * sizeof(REG)), a);                                     \
      STREAM((void*)(d + 3 * sizeof(REG)), a);                                     \
    }                                                                              \
    memset(d, value, n);                                                           \
    _mm_sfence();                                                                  \
  }

STREAM_COPY(copy_128, "sse2", __m128i, _mm_loadu_si128, _mm_stream_si128)
STREAM_COPY(copy_256, "avx2", __m256i, _mm256_loadu_si256, _mm256_stream_si256)
STREAM_COPY(copy_512, "avx512f,avx512bw", __m512i, _mm512_loadu_si512, _mm512_stream_si512)
STREAM_FILL(fill_128, "sse2", __m128i, _mm_set1_epi8, _mm_stream_si128)
STREAM_FILL(fill_256, "avx2", __m256i, _mm256_set1_epi8, _mm256_stream_si256)
STREAM_FILL(fill_512, "avx512f,avx512bw", __m512i, _mm512_set1_epi8, _mm512_stream_si512)
#endif

static copy_fn copy_of(int kind) {
  switch (kind) {
    case LIBC: return copy_libc;
#ifdef X86
    case STREAM_128: return copy_128;
    case STREAM_256: return __builtin_cpu_supports("avx2") ? copy_256 : NULL;
    case STREAM_512: return __builtin_cpu_supports("avx512bw") ? copy_512 : NULL;
#endif
    default: return NULL;
  }
}

static fill_fn fill_of(int kind) {
  switch (kind) {
    case LIBC: return fill_libc;
#ifdef X86
    case STREAM_128: return fill_128;
    case STREAM_256: return __builtin_cpu_supports("avx2") ? fill_256 : NULL;
    case STREAM_512: return __builtin_cpu_supports("avx512bw") ? fill_512 : NULL;
#endif
    default: return NULL;
  }
}

/* --- comparisons --------------------------------------------------------------------------------- */

/* Whether two runs differ. Only libc's stops at the first difference: the others read all of both, which is
 * the limit that is wanted, and find the same. */
typedef int (*compare_fn)(const char*, const char*, size_t);

static int compare_libc(const char* a, const char* b, size_t n) { return memcmp(a, b, n) != 0; }

#ifdef X86
/* Four registers of each side a turn into two accumulators; AHEAD bytes further on the lines are asked for. */
#define COMPARE(NAME, TARGET, REG, LOAD, XOR, OR, ZERO, AHEAD)                                              \
  __attribute__((target(TARGET))) static int NAME(const char* a, const char* b, size_t n) {                 \
    enum { STEP = 4 * sizeof(REG) };                                                                        \
    REG s = ZERO(), t = ZERO();                                                                             \
    for (; n >= STEP; a += STEP, b += STEP, n -= STEP) {                                                    \
      if (AHEAD)                                                                                            \
        for (size_t i = 0; i < STEP; i += 64) {                                                             \
          _mm_prefetch(a + i + (AHEAD), _MM_HINT_T0);                                                       \
          _mm_prefetch(b + i + (AHEAD), _MM_HINT_T0);                                                       \
        }                                                                                                   \
      for (size_t i = 0; i < STEP; i += 2 * sizeof(REG)) {                                                  \
        s = OR(s, XOR(LOAD((const void*)(a + i)), LOAD((const void*)(b + i))));                             \
        t = OR(t, XOR(LOAD((const void*)(a + i + sizeof(REG))), LOAD((const void*)(b + i + sizeof(REG))))); \
      }                                                                                                     \
    }                                                                                                       \
    s = OR(s, t);                                                                                           \
    char raw[sizeof(REG)];                                                                                  \
    memcpy(raw, &s, sizeof raw);                                                                            \
    int found = 0;                                                                                          \
    for (size_t i = 0; i < sizeof raw; i++) found |= raw[i];                                                \
    for (size_t i = 0; i < n; i++) found |= a[i] ^ b[i];                                                    \
    return found != 0;                                                                                      \
  }

enum { AHEAD = 2048 };
COMPARE(compare_128, "sse2", __m128i, _mm_loadu_si128, _mm_xor_si128, _mm_or_si128, _mm_setzero_si128, 0)
COMPARE(compare_128_ahead, "sse2", __m128i, _mm_loadu_si128, _mm_xor_si128, _mm_or_si128, _mm_setzero_si128, AHEAD)
COMPARE(compare_256, "avx2", __m256i, _mm256_loadu_si256, _mm256_xor_si256, _mm256_or_si256, _mm256_setzero_si256, 0)
COMPARE(compare_256_ahead, "avx2", __m256i, _mm256_loadu_si256, _mm256_xor_si256, _mm256_or_si256, _mm256_setzero_si256,
        AHEAD)
COMPARE(compare_512, "avx512f,avx512bw", __m512i, _mm512_loadu_si512, _mm512_xor_si512, _mm512_or_si512,
        _mm512_setzero_si512, 0)
COMPARE(compare_512_ahead, "avx512f,avx512bw", __m512i, _mm512_loadu_si512, _mm512_xor_si512, _mm512_or_si512,
        _mm512_setzero_si512, AHEAD)
#endif

static compare_fn compare_of(int kind) {
  switch (kind) {
    case 0: return compare_libc;
#ifdef X86
    case 1: return compare_128;
    case 2: return compare_128_ahead;
    case 3: return __builtin_cpu_supports("avx2") ? compare_256 : NULL;
    case 4: return __builtin_cpu_supports("avx2") ? compare_256_ahead : NULL;
    case 5: return __builtin_cpu_supports("avx512bw") ? compare_512 : NULL;
    case 6: return __builtin_cpu_supports("avx512bw") ? compare_512_ahead : NULL;
#endif
    default: return NULL;
  }
}

/* --- threads ------------------------------------------------------------------------------------ */

enum { MOST = 256 };

typedef struct {
  char* dst;
  const char* src; /* NULL: a fill */
  size_t bytes;
  int kind, value, threads;
  int* differ; /* not NULL: a comparison, which sets it where the runs differ */
} job_t;

/* Runs are cut at multiples of 256 bytes, so that no two threads share a cache line of a dense copy. */
static void part(const job_t* job, int index) {
  size_t blocks = (job->bytes + 255) / 256;
  size_t first = blocks * (size_t)index / (size_t)job->threads * 256;
  size_t last = blocks * (size_t)(index + 1) / (size_t)job->threads * 256;
  if (last > job->bytes) last = job->bytes;
  if (first >= last) return;
  if (job->differ) {
    if (compare_of(job->kind)(job->dst + first, job->src + first, last - first))
      __atomic_store_n(job->differ, 1, __ATOMIC_RELAXED);
  } else if (job->src)
    copy_of(job->kind)(job->dst + first, job->src + first, last - first);
  else
    fill_of(job->kind)(job->dst + first, job->value, last - first);
}

/* torch's OpenMP runtime, if its symbols are there when this library is loaded. */
extern void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));

static void part_openmp(void* data) {
  const job_t* job = data;
  int given = omp_get_num_threads();
  for (int i = omp_get_thread_num(); i < job->threads; i += given) part(job, i);
}

static struct {
  pthread_mutex_t lock;
  pthread_cond_t start, done;
  job_t job;
  unsigned long turn; /* counts jobs; a worker waits for it to change */
  int workers, busy;
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, {0}, 0, 0, 0};

static void* worker(void* data) {
  int index = (int)(intptr_t)data;
  unsigned long seen = 0;
  pthread_mutex_lock(&pool.lock);
  for (;;) {
    while (pool.turn == seen) pthread_cond_wait(&pool.start, &pool.lock);
    seen = pool.turn;
    job_t job = pool.job;
    if (index >= job.threads) continue;
    pthread_mutex_unlock(&pool.lock);
    part(&job, index);
    pthread_mutex_lock(&pool.lock);
    if (--pool.busy == 0) pthread_cond_signal(&pool.done);
  }
  return NULL;
}

static void run_pool(job_t* job) {
  pthread_mutex_lock(&pool.lock);
  while (pool.workers < job->threads - 1) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, (void*)(intptr_t)(pool.workers + 1))) break;
    pthread_detach(thread);
    pool.workers++;
  }
  if (job->threads > pool.workers + 1) job->threads = pool.workers + 1;
  pool.job = *job;
  pool.busy = job->threads - 1;
  pool.turn++;
  pthread_cond_broadcast(&pool.start);
  pthread_mutex_unlock(&pool.lock);
  part(job, 0);
  pthread_mutex_lock(&pool.lock);
  while (pool.busy) pthread_cond_wait(&pool.done, &pool.lock);
  pthread_mutex_unlock(&pool.lock);
}

static void run(job_t job, int times, int own_pool) {
  if (job.threads < 1) job.threads = 1;
  if (job.threads > MOST) job.threads = MOST;
  for (int i = 0; i < times; i++) {
    if (job.threads == 1)
      part(&job, 0);
    else if (GOMP_parallel && omp_get_thread_num && omp_get_num_threads && !own_pool)
      GOMP_parallel(part_openmp, &job, (unsigned)job.threads, 0);
    else
      run_pool(&job);
    __asm__ volatile("" ::: "memory"); /* each repetition is done */
  }
}

/* --- what Python calls -------------------------------------------------------------------------- */

int plain_has(int kind) { return copy_of(kind) != NULL && fill_of(kind) != NULL; }

int plain_openmp(void) { return GOMP_parallel && omp_get_thread_num && omp_get_num_threads; }

/* `times` copies of `bytes` bytes on `threads` threads; `own_pool` leaves torch's threads alone. */
void plain_copy(int kind, void* dst, const void* src, size_t bytes, int threads, int times, int own_pool) {
  job_t job = {dst, src, bytes, kind, 0, threads, NULL};
  run(job, times, own_pool);
}

void plain_fill(int kind, void* dst, int value, size_t bytes, int threads, int times, int own_pool) {
  job_t job = {dst, NULL, bytes, kind, value, threads, NULL};
  run(job, times, own_pool);
}

int plain_has_compare(int kind) { return compare_of(kind) != NULL; }

/* Whether the bytes of `a` and `b` differ anywhere. */
int plain_compare(int kind, void* a, const void* b, size_t bytes, int threads, int times, int own_pool) {
  int differ = 0;
  job_t job = {a, b, bytes, kind, 0, threads, &differ};
  run(job, times, own_pool);
  return differ;
}

/* --- many small writes ---------------------------------------------------------------------------- */

/* The least that a list of `pairs` writes costs whoever keeps autograd's promises: ready pointers, one run
 * after another, and a locked increment for each destination, of a counter on a cache line of its own as
 * version counters are. No tensor is looked at. One thread. */
void plain_pairs(char** dsts, char** srcs, size_t pairs, size_t runs, size_t run, size_t dst_step, size_t src_step,
                 char* counters, int times) {
  for (int t = 0; t < times; t++) {
    for (size_t i = 0; i < pairs; i++) __atomic_fetch_add((uint32_t*)(counters + 64 * i), 1, __ATOMIC_SEQ_CST);
    for (size_t i = 0; i < pairs; i++) {
      char *dst = dsts[i], *src = srcs[i];
      if (run == 4) {
        for (size_t r = 0; r < runs; r++) memcpy(dst + r * dst_step, src + r * src_step, 4);
      } else {
        for (size_t r = 0; r < runs; r++) memcpy(dst + r * dst_step, src + r * src_step, run);
      }
    }
    __asm__ volatile("" ::: "memory");
  }
}
