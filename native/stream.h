/* Streamed weights: read ahead in the order of use, let go afterwards. See stream.c. */
#ifndef HOMEINFER_STREAM_H
#define HOMEINFER_STREAM_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tensor.h"

#define STREAM_CAPSULE "homeinfer._native.stream"

typedef struct {
    uint64_t offset; /* in the file */
    char *address;
    size_t size;
    size_t lead; /* bytes of the tensor before it, in a page that it shares: they are never let go */
} span;

typedef struct {
    uint64_t read_bytes, waits, waited_ns;
    size_t held, highest;
    int problem; /* errno, or -1 when a file ended early */
    int culprit; /* the group that could not be read */
    bool closed;
} stream_counts;

typedef struct stream stream;

stream *stream_create(size_t limit, int n_threads, size_t piece);
/* Add a group of spans (an array of malloc that becomes the stream's): its number, or -1 and errno. */
int stream_append(stream *self, int fd, int window, bool kept, span *spans, int n_spans);
bool stream_run(stream *self);
void stream_limit(stream *self, size_t limit);
/* A node is about to be computed: wait for the weights that it touches. True: stop after it and call stream_after. */
bool stream_before(stream *self, const tensor *node);
/* It was computed. False when reading failed: the graph need not go on. */
bool stream_after(stream *self);
/* The window's graph is done. */
void stream_leave(stream *self);
stream_counts stream_count(stream *self);
/* End the reader threads. No address is touched after it. */
void stream_stop(stream *self);
void stream_destroy(stream *self);

PyObject *stream_new(PyObject *module, PyObject *args);
PyObject *stream_add(PyObject *module, PyObject *args);
PyObject *stream_start(PyObject *module, PyObject *capsule);
PyObject *stream_done(PyObject *module, PyObject *capsule);
PyObject *stream_resize(PyObject *module, PyObject *args);
PyObject *stream_state(PyObject *module, PyObject *capsule);
PyObject *stream_close(PyObject *module, PyObject *capsule);

#endif
