/* What stream.c (the graph's side) and stream_reader.c (the disk's) share. Everything is guarded by `lock`. */
#ifndef HOMEINFER_STREAM_PRIVATE_H
#define HOMEINFER_STREAM_PRIVATE_H

#include "stream.h"

#include <pthread.h>

enum state { ABSENT, READING, PRESENT, LEAVING };

/* What is read and let go as one: a tensor, or (kept) all the small ones of a window. */
typedef struct {
    int fd, window, n_spans;
    span *spans;
    size_t bytes;
    int rank;           /* its place in the order of use; kept: -1 */
    bool kept;          /* never let go */
    bool idle;          /* a whole graph did without it */
    bool busy;          /* the graph is using it */
    bool touched;       /* by the graph under way */
    int nodes, uses;    /* that touched it since it is busy; most so far: after so many it may go */
    enum state state;
    int next_span;      /* READING: where the next piece begins */
    size_t next_offset;
    int outstanding;    /* READING: pieces that threads have taken and not brought yet */
} group;

typedef struct {
    const char *begin, *end;
    int group;
} place;

struct stream {
    pthread_mutex_t lock;
    pthread_cond_t work, arrived;
    group *groups;
    int *ring;         /* groups in order of use */
    place *places;     /* sorted by address */
    int n_groups, n_ring, n_places, n_threads, n_running;
    pthread_t *threads;
    size_t limit, piece;
    int current;       /* rank of what is in use, or will be next */
    int newest;        /* the group that a graph asked for last; -1: none yet */
    int *seen, n_seen; /* in order of use, by the graph under way */
    int awaited;       /* the group that the graph waits for, or -1 */
    bool stop;
    stream_counts counts;
};

/* The body of a reader thread. */
void *stream_reader(void *self);

#endif
