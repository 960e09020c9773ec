/* The reader threads of stream.c: what to read next, what to let go for it. */
#if defined(__linux__)
#define _GNU_SOURCE
#include "stream_private.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
    int group, fd;
    char *address;
    size_t size;
    uint64_t offset;
} piece;

/* How many groups after the one in use this one comes. */
static int distance(const stream *self, const group *g) {
    return (g->rank - self->current + self->n_ring) % self->n_ring;
}

static bool take_from(stream *self, int number, piece *taken) {
    group *g = self->groups + number;
    if (g->state != READING || g->next_span == g->n_spans) {
        return false;
    }
    const span *s = g->spans + g->next_span;
    const size_t rest = s->size - g->next_offset, size = rest < self->piece ? rest : self->piece;
    *taken = (piece){number, g->fd, s->address + g->next_offset, size, s->offset + g->next_offset};
    g->next_offset += size;
    if (g->next_offset == s->size) {
        g->next_offset = 0;
        ++g->next_span;
    }
    ++g->outstanding;
    return true;
}

static bool take_piece(stream *self, piece *taken) {
    for (int i = 0; i < self->n_groups; ++i) {
        if (self->groups[i].kept && take_from(self, i, taken)) {
            return true;
        }
    }
    for (int d = 0; d < self->n_ring; ++d) {
        if (take_from(self, self->ring[(self->current + d) % self->n_ring], taken)) {
            return true;
        }
    }
    return false;
}

/* 0, errno, or -1 when the file ends early. */
static int read_piece(const piece *p) {
    for (size_t done = 0; done < p->size;) {
        const ssize_t n = pread(p->fd, p->address + done, p->size - done, (off_t)(p->offset + done));
        if (n == 0) {
            return -1;
        }
        if (n < 0 && errno != EINTR) {
            return errno;
        }
        done += n > 0 ? (size_t)n : 0;
    }
    if ((fcntl(p->fd, F_GETFL) & O_DIRECT) == 0) {
        posix_fadvise(p->fd, (off_t)p->offset, (off_t)p->size, POSIX_FADV_DONTNEED);
    }
    return 0;
}

static void bring_piece(stream *self, const piece *p, int problem) {
    group *g = self->groups + p->group;
    --g->outstanding;
    if (problem != 0) {
        self->counts.problem = problem;
        self->counts.culprit = p->group;
        pthread_cond_broadcast(&self->arrived);
        return;
    }
    self->counts.read_bytes += p->size;
    if (g->next_span == g->n_spans && g->outstanding == 0) {
        g->state = PRESENT;
        pthread_cond_broadcast(&self->arrived);
    }
}

/* What goes first: what no graph uses, else what is needed last of all that is needed later than `than`; -1: none. */
static int victim(const stream *self, int than) {
    int found = -1, furthest = than;
    for (int i = 0; i < self->n_groups; ++i) {
        const group *g = self->groups + i;
        if (g->state != PRESENT || g->busy || g->kept) {
            continue;
        }
        const int away = g->idle ? self->n_ring : distance(self, g);
        if (away > furthest) {
            furthest = away;
            found = i;
        }
    }
    return found;
}

static void let_leave(stream *self, int number) {
    group *g = self->groups + number;
    g->state = LEAVING;
    pthread_mutex_unlock(&self->lock);
    for (int i = 0; i < g->n_spans; ++i) {
        madvise(g->spans[i].address, g->spans[i].size, MADV_DONTNEED);
    }
    pthread_mutex_lock(&self->lock);
    g->state = ABSENT;
    self->counts.held -= g->bytes;
    pthread_cond_signal(&self->work);
}

static bool in_motion(const stream *self) {
    for (int i = 0; i < self->n_groups; ++i) {
        if (self->groups[i].state == READING || self->groups[i].state == LEAVING) {
            return true;
        }
    }
    return false;
}

/* The next group that is not there; -1: all are. */
static int next_absent(const stream *self) {
    for (int i = 0; i < self->n_groups; ++i) {
        if (self->groups[i].kept && self->groups[i].state == ABSENT) {
            return i;
        }
    }
    for (int d = 0; d < self->n_ring; ++d) {
        const int number = self->ring[(self->current + d) % self->n_ring];
        if (self->groups[number].state == ABSENT && !self->groups[number].idle) {
            return number;
        }
    }
    return -1;
}

static void begin(stream *self, group *g) {
    g->state = READING;
    g->next_span = 0;
    g->next_offset = 0;
    self->counts.held += g->bytes;
    if (self->counts.held > self->counts.highest) {
        self->counts.highest = self->counts.held;
    }
    pthread_cond_broadcast(&self->work);
}

/* What is let go for a group must be needed later than this. Not merely later than the group: to read it long before
 * its use, what was just used would go, which the next round needs again. Where the buffer holds nearly all, nearly all
 * would be read each round for the little that is missing. Half a round ahead is early enough. */
static int later_than(const stream *self, const group *g) {
    const int away = distance(self, g);
    return away > 1 ? 2 * away - 1 : away;
}

/* Begin to read the next group, or make room for it; false when there is nothing to do now. */
static bool advance(stream *self) {
    const int next = next_absent(self);
    const bool above = self->counts.held > self->limit; /* it was lowered, or exceeded for a graph that waited */
    if (next < 0 && !above) {
        return false;
    }
    group *g = self->groups + (next < 0 ? 0 : next);
    if (above || self->counts.held + g->bytes > self->limit) {
        const int last = victim(self, above || g->kept ? 0 : later_than(self, g));
        if (last >= 0) {
            let_leave(self, last);
            return true;
        }
        /* what a graph waits for is read in any case: it would never go on, nor let go what it has */
        if (self->awaited < 0 || self->groups[self->awaited].state != ABSENT || in_motion(self)) {
            return false;
        }
    }
    begin(self, g);
    return true;
}

void *stream_reader(void *argument) {
    stream *self = argument;
    piece taken;
    pthread_mutex_lock(&self->lock);
    while (!self->stop) {
        if (self->counts.problem == 0 && take_piece(self, &taken)) {
            pthread_mutex_unlock(&self->lock);
            const int problem = read_piece(&taken);
            pthread_mutex_lock(&self->lock);
            bring_piece(self, &taken, problem);
        } else if (self->counts.problem != 0 || !advance(self)) {
            pthread_cond_wait(&self->work, &self->lock);
        }
    }
    pthread_mutex_unlock(&self->lock);
    return NULL;
}
#else
typedef int no_empty_file;
#endif
