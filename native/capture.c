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
    if (strcmp(self->get_name(tensor), self->name) != 0) {
        return !ask;
    }
    if (ask) {
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
    PyMem_Free(PyCapsule_GetPointer(capsule, CAPTURE_CAPSULE));
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
