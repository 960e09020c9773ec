/* Hidden-state capture for llama.cpp's eval callback (llama_context_params.cb_eval).
 *
 * ggml's scheduler calls it for every graph node; through a Python function that costs 1.6 ms per
 * token of a 16-layer model, here nothing that can be measured. No llama.cpp header is needed:
 * the three functions it calls come in as addresses, taken from the library that is loaded. */
#include "capture.h"

/* ggml_backend_sched_eval_callback: with ask, "do you want this node?"; without, the node is
 * computed, and false stops the graph there. Successive ubatches of one decode append. */
static bool on_node(struct ggml_tensor *tensor, bool ask, void *data) {
    capture *self = data;
    const bool wanted = strcmp(self->get_name(tensor), self->name) == 0;
    if (ask) {
        const bool cut = self->stream != NULL && stream_before(self->stream, (const struct tensor *)tensor);
        return wanted || cut;
    }
    if (self->stream != NULL && !stream_after(self->stream)) {
        return false;
    }
    if (!wanted) {
        return true;
    }
    const size_t n = self->nbytes(tensor);
    self->seen += n;
    if (self->target != NULL && n <= self->capacity - self->written) {
        self->tensor_get(tensor, self->target + self->written, 0, n);
        self->written += n;
    }
    return false;
}

static void capture_free(PyObject *capsule) {
    capture *self = PyCapsule_GetPointer(capsule, CAPTURE_CAPSULE);
    Py_XDECREF(self->stream_capsule);
    PyMem_Free(self);
}

PyObject *capture_new(PyObject *module, PyObject *args) {
    unsigned long long get_name, nbytes, tensor_get;
    const char *name;
    (void)module;
    if (!PyArg_ParseTuple(args, "KKKs", &get_name, &nbytes, &tensor_get, &name)) {
        return NULL;
    }
    if (strlen(name) >= NAME_MAX_BYTES || !get_name || !nbytes || !tensor_get) {
        PyErr_SetString(PyExc_ValueError, "a null address, or a tensor name of 64 bytes or more");
        return NULL;
    }
    capture *self = PyMem_Calloc(1, sizeof *self);
    if (self == NULL) {
        return PyErr_NoMemory();
    }
    self->get_name = (get_name_fn)(uintptr_t)get_name;
    self->nbytes = (nbytes_fn)(uintptr_t)nbytes;
    self->tensor_get = (tensor_get_fn)(uintptr_t)tensor_get;
    memcpy(self->name, name, strlen(name) + 1);
    PyObject *capsule = PyCapsule_New(self, CAPTURE_CAPSULE, capture_free);
    if (capsule == NULL) {
        PyMem_Free(self);
    }
    return capsule;
}

PyObject *capture_pointers(PyObject *module, PyObject *capsule) {
    (void)module;
    capture *self = PyCapsule_GetPointer(capsule, CAPTURE_CAPSULE);
    if (self == NULL) {
        return NULL;
    }
    return Py_BuildValue("KK", (unsigned long long)(uintptr_t)on_node, (unsigned long long)(uintptr_t)self);
}

PyObject *capture_stream(PyObject *module, PyObject *args) {
    PyObject *capsule, *stream_capsule;
    (void)module;
    if (!PyArg_ParseTuple(args, "OO", &capsule, &stream_capsule)) {
        return NULL;
    }
    capture *self = PyCapsule_GetPointer(capsule, CAPTURE_CAPSULE);
    stream *streamed = self == NULL ? NULL : PyCapsule_GetPointer(stream_capsule, STREAM_CAPSULE);
    if (streamed == NULL) {
        return NULL;
    }
    Py_INCREF(stream_capsule);
    Py_XDECREF(self->stream_capsule);
    self->stream_capsule = stream_capsule;
    self->stream = streamed;
    Py_RETURN_NONE;
}
