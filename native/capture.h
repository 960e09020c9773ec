/* The hidden-state capture, shared by the two C files of the module. */
#ifndef HOMEINFER_CAPTURE_H
#define HOMEINFER_CAPTURE_H

#include "stream.h"

#include <string.h>

#define NAME_MAX_BYTES 64 /* GGML_MAX_NAME */
#define CAPTURE_CAPSULE "homeinfer._native.capture"

struct ggml_tensor; /* opaque here: only its address passes through */

typedef const char *(*get_name_fn)(const struct ggml_tensor *);
typedef size_t (*nbytes_fn)(const struct ggml_tensor *);
typedef void (*tensor_get_fn)(const struct ggml_tensor *, void *, size_t, size_t);

typedef struct {
    get_name_fn get_name;
    nbytes_fn nbytes;
    tensor_get_fn tensor_get;
    char name[NAME_MAX_BYTES];
    char *target; /* where the next nodes go; NULL: nowhere */
    size_t capacity;
    size_t written;
    size_t seen; /* bytes the nodes had, also those that did not fit */
    stream *stream; /* whose weights the graph touches, or NULL */
    PyObject *stream_capsule;
} capture;

/* Aim at `capacity` bytes, counts from 0. */
static inline void capture_aim(capture *self, char *target, size_t capacity) {
    self->target = target;
    self->capacity = capacity;
    self->written = 0;
    self->seen = 0;
}

PyObject *capture_new(PyObject *module, PyObject *args);
PyObject *capture_pointers(PyObject *module, PyObject *capsule);
PyObject *capture_stream(PyObject *module, PyObject *args);
PyObject *runner_new(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *runner_forward(PyObject *module, PyObject *args);
PyObject *batch_layout(PyObject *module, PyObject *none);

#endif
