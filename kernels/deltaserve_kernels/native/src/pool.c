/* Threads: one pool for the process. A job is cut into pieces, and whoever is free takes the next: the caller works too, so it
   waits for pieces that others have begun, never for a thread that other processes keep from its core. Waiting is spinning
   shortly, then sleep. */
#include "common.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SPIN_TICKS = 50000, PIECES = 2, MOST = 256 }; /* of the processor's clock, about 20 µs; pieces for each thread */

static struct {
    _Atomic(Job) job;
    _Atomic(void *) argument;
    _Atomic int pieces;
} task;
static _Atomic u64 offer;       /* number of the job in the upper half, in the lower one its pieces that nobody has taken */
static _Atomic u32 bell, left;  /* what sleepers wait on: a job was offered; pieces that are not done */
static _Atomic int sleepers, waiting;
static int started = 1; /* threads there are, the caller among them */
static _Atomic int wanted = 1;
static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;

static void sleep_on(_Atomic u32 *word, u32 seen) { syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0); }
static void wake(_Atomic u32 *word, int most) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, most, NULL, NULL, 0); }

/* Takes pieces of the job on offer until there are none. What is read of a job before a piece of it is taken may be another's:
   then the offer has changed, and nothing is taken. */
static void take_pieces(void) {
    int began = 0;
    for (u64 seen = atomic_load(&offer); (u32)seen;) {
        Job job = task.job;
        void *argument = task.argument;
        int pieces = task.pieces;
        if (!atomic_compare_exchange_weak(&offer, &seen, seen - 1)) continue;
        if (!began) begin_products(), began = 1;
        job(argument, pieces - (int)(u32)seen, pieces);
        if (atomic_fetch_sub(&left, 1) == 1 && atomic_load(&waiting)) wake(&left, 1);
        seen = atomic_load(&offer);
    }
    if (began) end_products();
}

static int offered(int self) { return (u32)atomic_load(&offer) && self < wanted; }

static void *work(void *number) {
    int self = (int)(intptr_t)number;
    for (;;) {
        for (uint64_t until = __rdtsc() + SPIN_TICKS; !offered(self) && __rdtsc() < until;) _mm_pause();
        if (!offered(self)) {
            atomic_fetch_add(&sleepers, 1);
            u32 seen = atomic_load(&bell);
            if (!offered(self)) sleep_on(&bell, seen);
            atomic_fetch_sub(&sleepers, 1);
        }
        if (offered(self)) take_pieces();
    }
    return NULL;
}

/* After a fork no worker lives in the child, nor the thread whose job was on offer. */
static void forget(void) {
    started = 1;
    atomic_store(&sleepers, 0);
    atomic_store(&waiting, 0);
    atomic_store(&offer, atomic_load(&offer) >> 32 << 32);
    pthread_mutex_init(&busy, NULL);
}

EXPORT void ds_set_threads(int threads) {
    pthread_mutex_lock(&busy);
    wanted = MAX(1, MIN(threads, MOST));
    pthread_mutex_unlock(&busy);
}

int threads(void) { return wanted; }

static void start(void) {
    static int registered;
    if (!registered) pthread_atfork(NULL, NULL, forget), registered = 1;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the main thread's */
    while (started < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(intptr_t)started)) break;
        pthread_detach(thread);
        started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void parallel(Job job, void *argument) {
    if (wanted == 1 || pthread_mutex_trylock(&busy)) { /* another caller has the pool: alone, then */
        begin_products();
        job(argument, 0, 1);
        end_products();
        return;
    }
    if (started < wanted) start();
    int pieces = PIECES * wanted;
    task.job = job;
    task.argument = argument;
    task.pieces = pieces;
    atomic_store(&left, (u32)pieces);
    atomic_store(&offer, ((atomic_load(&offer) >> 32) + 1) << 32 | (u32)pieces);
    atomic_fetch_add(&bell, 1);
    if (atomic_load(&sleepers)) wake(&bell, started - 1);
    take_pieces();
    for (uint64_t until = __rdtsc() + SPIN_TICKS; atomic_load(&left) && __rdtsc() < until;) _mm_pause();
    if (atomic_load(&left)) {
        atomic_store(&waiting, 1);
        for (u32 seen; (seen = atomic_load(&left));) sleep_on(&left, seen);
        atomic_store(&waiting, 0);
    }
    pthread_mutex_unlock(&busy);
}

/* Weights and caches are read whole in every step: fewer pages, fewer misses. A wish only. */
EXPORT void ds_huge_pages(void *memory, long bytes) {
    uintptr_t from = ROUND_UP((uintptr_t)memory, 4096), to = ((uintptr_t)memory + (uintptr_t)bytes) & ~(uintptr_t)4095;
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
}

static __thread struct {
    void *memory;
    size_t bytes;
} buffers[SLOTS];

void *scratch(int slot, size_t bytes) {
    if (buffers[slot].bytes < bytes) {
        free(buffers[slot].memory);
        buffers[slot].bytes = ROUND_UP(bytes + bytes / 4, 4096);
        buffers[slot].memory = aligned_alloc(4096, buffers[slot].bytes);
        if (!buffers[slot].memory) abort();
    }
    return buffers[slot].memory;
}
