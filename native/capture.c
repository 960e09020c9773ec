/* Hidden-state capture for llama.cpp's eval callback (llama_context_params.cb_eval).
 *
 * ggml's scheduler calls it for every graph node; through a Python function that costs 1.6 ms per
 * token of a 16-layer model, here nothing that can be measured. No llama.cpp header is needed:
 * the three functions it calls come in as addresses, taken from the library that is loaded. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define NAME_MAX_BYTES 64 /* GGML_MAX_NAME */
#define CAPSULE "homeinfer._native.capture"

struct ggml_tensor; /* opaque here: only its address passes through */

typedef const char *(*get_name_fn)(const struct ggml_tensor *);
typedef size_t (*nbytes_fn)(const struct ggml_tensor *);
typedef void (*tensor_get_fn)(const struct ggml_tensor *, void *, size_t, size_t);

typedef struct {
    get_name_fn get_name;
    nbytes_fn nbytes;
    tensor_get_fn tensor_get;
    char name[NAME_MAX_BYTES];
    char *target;
    size_t capacity;
    size_t written;
    size_t wanted; /* bytes seen in all, also those that did not fit */
} capture;

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
    self->wanted += n;
    if (self->target != NULL && n <= self->capacity - self->written) {
        self->tensor_get(tensor, self->target + self->written, 0, n);
        self->written += n;
    }
    return false;
}

static void capture_free(PyObject *capsule) {
    PyMem_Free(PyCapsule_GetPointer(capsule, CAPSULE));
}

static PyObject *capture_new(PyObject *module, PyObject *args) {
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
    PyObject *capsule = PyCapsule_New(self, CAPSULE, capture_free);
    if (capsule == NULL) {
        PyMem_Free(self);
    }
    return capsule;
}

static PyObject *capture_pointers(PyObject *module, PyObject *capsule) {
    (void)module;
    capture *self = PyCapsule_GetPointer(capsule, CAPSULE);
    if (self == NULL) {
        return NULL;
    }
    return Py_BuildValue("KK", (unsigned long long)(uintptr_t)on_node, (unsigned long long)(uintptr_t)self);
}

static PyObject *capture_aim(PyObject *module, PyObject *args) {
    PyObject *capsule;
    unsigned long long target;
    unsigned long long capacity;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKK", &capsule, &target, &capacity)) {
        return NULL;
    }
    capture *self = PyCapsule_GetPointer(capsule, CAPSULE);
    if (self == NULL) {
        return NULL;
    }
    self->target = (char *)(uintptr_t)target;
    self->capacity = (size_t)capacity;
    self->written = 0;
    self->wanted = 0;
    Py_RETURN_NONE;
}

static PyObject *capture_counts(PyObject *module, PyObject *capsule) {
    (void)module;
    capture *self = PyCapsule_GetPointer(capsule, CAPSULE);
    if (self == NULL) {
        return NULL;
    }
    return Py_BuildValue("KK", (unsigned long long)self->written, (unsigned long long)self->wanted);
}

#if defined(_MSC_VER)
#include <intrin.h>
#define RELAX() _mm_pause()
#elif defined(__x86_64__) || defined(__i386__)
#define RELAX() __asm__ __volatile__("pause" ::: "memory")
#elif defined(__aarch64__)
#define RELAX() __asm__ __volatile__("yield" ::: "memory")
#else
#define RELAX() ((void)0)
#endif

/* The busy-wait step of an OpenMP runtime, n times: the caller's clock makes a spin count of it. */
static PyObject *spin(PyObject *module, PyObject *arg) {
    (void)module;
    unsigned long n = PyLong_AsUnsignedLong(arg);
    if (n == (unsigned long)-1 && PyErr_Occurred()) {
        return NULL;
    }
    volatile uint32_t flag = 0;
    for (unsigned long i = 0; i < n; ++i) {
        if (flag) {
            break;
        }
        RELAX();
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"capture_new", capture_new, METH_VARARGS,
     "capture_new(ggml_get_name, ggml_nbytes, ggml_backend_tensor_get, node_name) -> capsule\n\n"
     "The three are addresses (int). Raises ValueError for a null one or too long a name."},
    {"capture_pointers", capture_pointers, METH_O,
     "capture_pointers(capsule) -> (cb_eval, cb_eval_user_data)\n\nValid while the capsule lives."},
    {"capture_aim", capture_aim, METH_VARARGS,
     "capture_aim(capsule, address, capacity)\n\nWhere the next node goes (bytes), counts set to 0."},
    {"capture_counts", capture_counts, METH_O,
     "capture_counts(capsule) -> (bytes written, bytes the node had)"},
    {"spin", spin, METH_O, "spin(n)\n\nn steps of a busy wait, to time one."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "The hot paths of homeinfer in C.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) {
    return PyModule_Create(&definition);
}
