/* stream.c for Python: homeinfer/_native.pyi says what each function does. */
#include "stream.h"

#if defined(__linux__)
#include <errno.h>
#include <stdlib.h>

static void stream_free(PyObject *capsule) {
    stream *self = PyCapsule_GetPointer(capsule, STREAM_CAPSULE);
    Py_BEGIN_ALLOW_THREADS
    stream_destroy(self);
    Py_END_ALLOW_THREADS
}

PyObject *stream_new(PyObject *module, PyObject *args) {
    unsigned long long limit, piece;
    int n_threads;
    (void)module;
    if (!PyArg_ParseTuple(args, "KiK", &limit, &n_threads, &piece)) {
        return NULL;
    }
    if (limit == 0 || n_threads < 1 || piece < 4096 || piece % 4096 != 0) {
        PyErr_SetString(PyExc_ValueError, "a limit, threads and pieces of whole pages are needed");
        return NULL;
    }
    stream *self = stream_create((size_t)limit, n_threads, (size_t)piece);
    if (self == NULL) {
        return PyErr_NoMemory();
    }
    PyObject *capsule = PyCapsule_New(self, STREAM_CAPSULE, stream_free);
    if (capsule == NULL) {
        stream_destroy(self);
    }
    return capsule;
}

static int read_spans(PyObject *list, span *spans, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; ++i) {
        unsigned long long offset, address, size, lead;
        PyObject *item = PyTuple_GetItem(list, i);
        if (item == NULL || !PyArg_ParseTuple(item, "KKKK", &offset, &address, &size, &lead)) {
            return 0;
        }
        if (offset % 4096 != 0 || address % 4096 != 0 || size % 4096 != 0 || address == 0 || size == 0 ||
            lead >= 65536) {
            PyErr_SetString(PyExc_ValueError, "a span is not made of whole pages");
            return 0;
        }
        spans[i] = (span){offset, (char *)(uintptr_t)address, (size_t)size, (size_t)lead};
    }
    return 1;
}

PyObject *stream_add(PyObject *module, PyObject *args) {
    PyObject *capsule, *list;
    int fd, window, kept;
    (void)module;
    if (!PyArg_ParseTuple(args, "OiipO!", &capsule, &fd, &window, &kept, &PyTuple_Type, &list)) {
        return NULL;
    }
    stream *self = PyCapsule_GetPointer(capsule, STREAM_CAPSULE);
    const Py_ssize_t n = PyTuple_Size(list);
    if (self == NULL || n < 1) {
        PyErr_SetString(PyExc_ValueError, "a group without spans");
        return NULL;
    }
    span *spans = calloc((size_t)n, sizeof *spans);
    if (spans == NULL) {
        return PyErr_NoMemory();
    }
    if (!read_spans(list, spans, n)) {
        free(spans);
        return NULL;
    }
    const int number = stream_append(self, fd, window, kept != 0, spans, (int)n);
    return number < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(number);
}

PyObject *stream_start(PyObject *module, PyObject *capsule) {
    (void)module;
    stream *self = PyCapsule_GetPointer(capsule, STREAM_CAPSULE);
    if (self == NULL) {
        return NULL;
    }
    if (!stream_run(self)) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

PyObject *stream_done(PyObject *module, PyObject *capsule) {
    (void)module;
    stream *self = PyCapsule_GetPointer(capsule, STREAM_CAPSULE);
    if (self == NULL) {
        return NULL;
    }
    stream_leave(self);
    Py_RETURN_NONE;
}

PyObject *stream_resize(PyObject *module, PyObject *args) {
    PyObject *capsule;
    unsigned long long limit;
    (void)module;
    if (!PyArg_ParseTuple(args, "OK", &capsule, &limit)) {
        return NULL;
    }
    stream *self = PyCapsule_GetPointer(capsule, STREAM_CAPSULE);
    if (self == NULL) {
        return NULL;
    }
    stream_limit(self, (size_t)limit);
    Py_RETURN_NONE;
}

PyObject *stream_state(PyObject *module, PyObject *capsule) {
    (void)module;
    stream *self = PyCapsule_GetPointer(capsule, STREAM_CAPSULE);
    if (self == NULL) {
        return NULL;
    }
    const stream_counts c = stream_count(self);
    return Py_BuildValue("KKdKKiii", (unsigned long long)c.read_bytes, (unsigned long long)c.waits,
                         (double)c.waited_ns * 1e-6, (unsigned long long)c.held, (unsigned long long)c.highest,
                         c.problem, c.culprit, (int)c.closed);
}

PyObject *stream_close(PyObject *module, PyObject *capsule) {
    (void)module;
    stream *self = PyCapsule_GetPointer(capsule, STREAM_CAPSULE);
    if (self == NULL) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    stream_stop(self);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

#else /* no mapping that memory can be laid over while threads read into it has been tried elsewhere */

static PyObject *not_here(void) {
    PyErr_SetString(PyExc_NotImplementedError, "weights are streamed on Linux only");
    return NULL;
}

bool stream_before(stream *self, const tensor *node) {
    (void)self;
    (void)node;
    return false;
}

bool stream_after(stream *self) {
    (void)self;
    return true;
}

#define STUB(name)                                       \
    PyObject *name(PyObject *module, PyObject *args) {   \
        (void)module;                                    \
        (void)args;                                      \
        return not_here();                               \
    }

STUB(stream_new)
STUB(stream_add)
STUB(stream_start)
STUB(stream_done)
STUB(stream_resize)
STUB(stream_state)
STUB(stream_close)
#endif
