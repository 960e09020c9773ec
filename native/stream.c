/* Weights that do not fit: read into their places before the graph comes to them, let go after.
 *
 * The places are llama.cpp's own: anonymous memory laid over its mapping of the file, so no tensor changes its
 * address and the page cache, whose LRU evicts just what a cyclic order needs next, has no part in it. Threads read
 * with O_DIRECT in the order of use, in a circle over all streamed weights of the process, as far ahead as the limit
 * allows; where room is needed, what is needed last goes first. What a graph touches is seen in its nodes before
 * they are computed, so nothing is used that is not there, whatever the architecture; the first graph of a window
 * shows the order of use. */
#if defined(__linux__)
#define _GNU_SOURCE
#include "stream_private.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define HUGE_PAGE ((uintptr_t)2 << 20)

stream *stream_create(size_t limit, int n_threads, size_t piece) {
    stream *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return NULL;
    }
    self->threads = calloc((size_t)n_threads, sizeof *self->threads);
    if (self->threads == NULL) {
        free(self);
        return NULL;
    }
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->work, NULL);
    pthread_cond_init(&self->arrived, NULL);
    self->limit = limit;
    self->piece = piece;
    self->n_threads = n_threads;
    self->newest = self->awaited = self->counts.culprit = -1;
    return self;
}

/* Huge pages save most of the price of fresh memory; only those inside the span, or two groups would share one. */
static bool lay_over(const span *s) {
    char *made = mmap(s->address, s->size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) {
        return false;
    }
    madvise(made, s->size, MADV_NOHUGEPAGE);
    madvise(made, s->size, MADV_DONTDUMP);
    const uintptr_t first = ((uintptr_t)made + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    const uintptr_t last = ((uintptr_t)made + s->size) & ~(HUGE_PAGE - 1);
    if (first < last) {
        madvise((void *)first, last - first, MADV_HUGEPAGE);
    }
    return true;
}

static bool grow(stream *self, int n_spans) {
    const size_t n = (size_t)self->n_groups + 1;
    group *groups = realloc(self->groups, n * sizeof *groups);
    self->groups = groups != NULL ? groups : self->groups;
    int *ring = realloc(self->ring, n * sizeof *ring);
    self->ring = ring != NULL ? ring : self->ring;
    int *seen = realloc(self->seen, n * sizeof *seen);
    self->seen = seen != NULL ? seen : self->seen;
    place *places = realloc(self->places, (size_t)(self->n_places + n_spans) * sizeof *places);
    self->places = places != NULL ? places : self->places;
    return groups != NULL && ring != NULL && seen != NULL && places != NULL;
}

static int by_address(const void *a, const void *b) {
    const char *x = ((const place *)a)->begin, *y = ((const place *)b)->begin;
    return (x > y) - (x < y);
}

int stream_append(stream *self, int fd, int window, bool kept, span *spans, int n_spans) {
    group added = {.fd = fd, .window = window, .spans = spans, .n_spans = n_spans, .kept = kept, .rank = -1};
    if (!grow(self, n_spans)) {
        free(spans);
        errno = ENOMEM;
        return -1;
    }
    for (int i = 0; i < n_spans; ++i) {
        if (!lay_over(spans + i)) {
            free(spans);
            return -1;
        }
        added.bytes += spans[i].size;
        self->places[self->n_places + i] =
            (place){spans[i].address - spans[i].lead, spans[i].address + spans[i].size, self->n_groups};
    }
    self->n_places += n_spans;
    qsort(self->places, (size_t)self->n_places, sizeof *self->places, by_address);
    if (!kept) {
        added.rank = self->n_ring;
        self->ring[self->n_ring++] = self->n_groups;
    }
    self->groups[self->n_groups] = added;
    return self->n_groups++;
}

bool stream_run(stream *self) {
    while (self->n_groups > 0 && self->n_running < self->n_threads) {
        const int problem = pthread_create(self->threads + self->n_running, NULL, stream_reader, self);
        if (problem != 0) {
            errno = problem;
            return self->n_running > 0;
        }
        ++self->n_running;
    }
    return true;
}

void stream_limit(stream *self, size_t limit) {
    pthread_mutex_lock(&self->lock);
    self->limit = limit;
    pthread_cond_broadcast(&self->work);
    pthread_mutex_unlock(&self->lock);
}

static int group_at(const stream *self, const char *data) {
    int low = 0, high = self->n_places - 1;
    while (low <= high) {
        const int middle = (low + high) / 2;
        const place *p = self->places + middle;
        if (data < p->begin) {
            high = middle - 1;
        } else if (data >= p->end) {
            low = middle + 1;
        } else {
            return p->group;
        }
    }
    return -1;
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void wait_for(stream *self, int number) {
    const uint64_t begin = now_ns();
    self->awaited = number;
    pthread_cond_signal(&self->work);
    while (self->n_running > 0 && self->groups[number].state != PRESENT && self->counts.problem == 0 && !self->stop) {
        pthread_cond_wait(&self->arrived, &self->lock);
    }
    self->awaited = -1;
    ++self->counts.waits;
    self->counts.waited_ns += now_ns() - begin;
}

static void forget(stream *self) {
    while (self->n_seen > 0) {
        self->groups[self->seen[--self->n_seen]].touched = false;
    }
}

/* Wait for a group and keep it until it is computed. */
static void need(stream *self, int number) {
    group *g = self->groups + number;
    g->busy = true;
    g->nodes = 0;
    if (!g->kept) {
        if (self->n_seen > 0 && self->groups[self->seen[0]].window != g->window) {
            forget(self); /* a graph that failed left it */
        }
        g->idle = false;
        self->newest = number;
        self->current = g->rank;
        if (!g->touched) {
            g->touched = true;
            self->seen[self->n_seen++] = number;
        }
        pthread_cond_signal(&self->work);
    }
    if (g->state != PRESENT) {
        wait_for(self, number);
    }
}

static void let_go(stream *self, int but) {
    for (int i = 0; i < self->n_groups; ++i) {
        group *g = self->groups + i;
        if (g->busy && i != but && !g->kept) {
            g->busy = false;
            g->uses = g->nodes > g->uses ? g->nodes : g->uses;
        }
    }
    pthread_cond_signal(&self->work);
}

/* Nothing is read for the others: tokens that are looked up in graphs whose input is hidden states, and the logits of
 * a chunk of a prompt that wants none. */
static bool is_computed(const tensor *node) {
    const bool is_empty = node->ne[0] == 0 || node->ne[1] == 0 || node->ne[2] == 0 || node->ne[3] == 0;
    return (node->flags & TENSOR_COMPUTE) != 0 && !is_empty;
}

bool stream_before(stream *self, const tensor *node) {
    bool cut = false;
    if (!is_computed(node)) {
        return false;
    }
    for (int i = 0; i < 10; ++i) { /* sources that are left out leave holes, as an attention mask before its sinks */
        const int number = node->src[i] == NULL ? -1 : group_at(self, node->src[i]->data);
        if (number < 0) {
            continue;
        }
        group *g = self->groups + number;
        if (!g->busy) { /* only this thread changes it */
            pthread_mutex_lock(&self->lock);
            need(self, number);
            pthread_mutex_unlock(&self->lock);
            cut = cut || !g->kept;
        }
        g->nodes += !g->kept;
    }
    return cut;
}

bool stream_after(stream *self) {
    pthread_mutex_lock(&self->lock);
    group *g = self->newest < 0 ? NULL : self->groups + self->newest;
    const bool done = g != NULL && g->uses > 0 && g->nodes >= g->uses;
    let_go(self, done ? -1 : self->newest);
    if (done) {
        self->current = (g->rank + 1) % self->n_ring;
    }
    const bool good = self->counts.problem == 0 && !self->stop;
    pthread_mutex_unlock(&self->lock);
    return good;
}

/* From now on a window's groups come in the order in which a graph has used them, those it did without last, and
 * what comes next is what follows them. */
static void learn(stream *self) {
    const int window = self->groups[self->seen[0]].window;
    int next = 0;
    for (int rank = self->n_ring - 1; rank >= 0; --rank) {
        group *g = self->groups + self->ring[rank];
        if (g->window == window) {
            next = rank;
            if (!g->touched) {
                self->seen[self->n_seen++] = self->ring[rank];
                g->idle = true;
            }
        }
    }
    for (int i = 0; i < self->n_seen; ++i, ++next) {
        self->ring[next] = self->seen[i];
        self->groups[self->seen[i]].rank = next;
    }
    forget(self);
    self->current = next % self->n_ring;
}

void stream_leave(stream *self) {
    pthread_mutex_lock(&self->lock);
    let_go(self, -1);
    if (self->n_seen > 0) {
        learn(self);
    }
    pthread_mutex_unlock(&self->lock);
}

stream_counts stream_count(stream *self) {
    pthread_mutex_lock(&self->lock);
    stream_counts counts = self->counts;
    counts.closed = self->stop;
    pthread_mutex_unlock(&self->lock);
    return counts;
}

void stream_stop(stream *self) {
    pthread_mutex_lock(&self->lock);
    self->stop = true;
    pthread_cond_broadcast(&self->work);
    pthread_cond_broadcast(&self->arrived);
    pthread_mutex_unlock(&self->lock);
    for (; self->n_running > 0; --self->n_running) {
        pthread_join(self->threads[self->n_running - 1], NULL);
    }
}

void stream_destroy(stream *self) {
    stream_stop(self);
    for (int i = 0; i < self->n_groups; ++i) {
        free(self->groups[i].spans);
    }
    pthread_cond_destroy(&self->work);
    pthread_cond_destroy(&self->arrived);
    pthread_mutex_destroy(&self->lock);
    free(self->groups);
    free(self->ring);
    free(self->seen);
    free(self->places);
    free(self->threads);
    free(self);
}
#else
typedef int no_empty_file;
#endif
