/* Threads: one pool for the process. The caller works too; workers wait by spinning shortly, then asleep. */
#include "common.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SPINS = 400, MOST = 256 }; /* a pause takes up to 0.1 µs */

static struct {
    Job job;
    void *argument;
    int workers; /* of the running job */
} task;
static _Atomic u32 epoch;
static _Atomic int sleepers, running;
static int started = 1; /* threads there are, the caller among them */
static _Atomic int wanted = 1;
static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;

static void run(Job job, void *argument, int worker, int workers) {
    begin_products();
    job(argument, worker, workers);
    end_products();
}

static void *work(void *born) { /* number, and the epoch it was born in */
    int self = (int)((uint64_t)born & 0xffff);
    u32 seen = (u32)((uint64_t)born >> 32);
    for (;;) {
        for (int spin = 0; atomic_load_explicit(&epoch, memory_order_acquire) == seen; spin++) {
            if (spin < SPINS) {
                _mm_pause();
                continue;
            }
            atomic_fetch_add(&sleepers, 1);
            syscall(SYS_futex, &epoch, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            atomic_fetch_sub(&sleepers, 1);
        }
        seen++;
        if (self < task.workers) run(task.job, task.argument, self, task.workers);
        atomic_fetch_sub_explicit(&running, 1, memory_order_release);
    }
    return NULL;
}

/* After a fork no worker lives in the child. */
static void forget(void) {
    started = 1;
    atomic_store(&sleepers, 0);
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
        uint64_t born = (uint64_t)atomic_load(&epoch) << 32 | (u32)started;
        if (pthread_create(&thread, NULL, work, (void *)born)) break;
        pthread_detach(thread);
        started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void parallel(Job job, void *argument) {
    if (wanted == 1 || pthread_mutex_trylock(&busy)) { /* another caller has the pool: alone, then */
        run(job, argument, 0, 1);
        return;
    }
    if (started < wanted) start();
    task.job = job;
    task.argument = argument;
    task.workers = MIN(started, wanted);
    atomic_store_explicit(&running, started - 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&epoch, 1, memory_order_acq_rel);
    if (atomic_load(&sleepers)) syscall(SYS_futex, &epoch, FUTEX_WAKE_PRIVATE, MOST, NULL, NULL, 0);
    run(job, argument, 0, task.workers);
    for (int spin = 0; atomic_load_explicit(&running, memory_order_acquire); spin++)
        if (spin < SPINS * 16) _mm_pause();
        else sched_yield();
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
