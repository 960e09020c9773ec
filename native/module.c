/* The module homeinfer._native: its functions, and the busy wait that times a spin count. */
#include "capture.h"
#include "rounding.h"
#include "rows.h"
#include "tap.h"

#if defined(_MSC_VER)
#include <intrin.h>
#define RELAX() YieldProcessor()
#elif defined(__x86_64__) || defined(__i386__)
#define RELAX() __asm__ __volatile__("pause" ::: "memory")
#elif defined(__aarch64__)
#define RELAX() __asm__ __volatile__("yield" ::: "memory")
#else
#define RELAX() ((void)0)
#endif
#if defined(_MSC_VER) && !defined(YieldProcessor)
#if defined(_M_ARM64)
#define YieldProcessor() __yield()
#else
#define YieldProcessor() _mm_pause()
#endif
#endif

/* The busy-wait step of an OpenMP runtime, n times: the caller's clock makes a spin count of it. */
static PyObject *spin(PyObject *module, PyObject *arg) {
    (void)module;
    unsigned long n = PyLong_AsUnsignedLong(arg);
    if (n == (unsigned long)-1 && PyErr_Occurred()) {
        return NULL;
    }
    volatile uint32_t flag = 0;
    for (unsigned long i = 0; i < n && !flag; ++i) {
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
    {"capture_stream", capture_stream, METH_VARARGS,
     "capture_stream(capsule, stream)\n\nSee homeinfer/_native.pyi."},
    {"runner_new", (PyCFunction)(void (*)(void))runner_new, METH_VARARGS | METH_KEYWORDS,
     "runner_new(...) -> capsule\n\nSee homeinfer/_native.pyi."},
    {"runner_forward", runner_forward, METH_VARARGS,
     "runner_forward(capsule, n, index, rows) -> (status, out, microseconds)\n\nSee homeinfer/_native.pyi."},
    {"batch_layout", batch_layout, METH_NOARGS,
     "batch_layout() -> tuple\n\nOffsets of struct llama_batch's fields as compiled here, then its size."},
    {"tap_new", tap_new, METH_VARARGS,
     "tap_new(ggml_nbytes, ggml_backend_tensor_get, mul_mat, mul_mat_id, weights) -> capsule\n\n"
     "See homeinfer/_native.pyi."},
    {"tap_pointers", tap_pointers, METH_O,
     "tap_pointers(capsule) -> (cb_eval, cb_eval_user_data)\n\nValid while the capsule lives."},
    {"tap_begin", tap_begin, METH_O, "tap_begin(capsule)\n\nTo be called before every llama_decode."},
    {"tap_state", tap_state, METH_O, "tap_state(capsule) -> (problem, culprit, weights)\n\nSee homeinfer/_native.pyi."},
    {"tensor_fields", tensor_fields, METH_O, "tensor_fields(address) -> tuple\n\nA ggml_tensor as compiled here."},
    {"round_super_block", round_super_block, METH_VARARGS,
     "round_super_block(type, rows, n, weights, blocks, ...)\n\nSee homeinfer/_native.pyi."},
    {"half_bits", half_bits, METH_VARARGS, "half_bits(values, bits)\n\nRounds values to halves, in place."},
    {"stream_new", stream_new, METH_VARARGS, "stream_new(limit, threads, piece)\n\nSee homeinfer/_native.pyi."},
    {"stream_add", stream_add, METH_VARARGS, "stream_add(stream, fd, window, kept, spans)\n\nSee homeinfer/_native.pyi."},
    {"stream_start", stream_start, METH_O, "stream_start(stream)\n\nStarts its reader threads."},
    {"stream_done", stream_done, METH_O, "stream_done(stream)\n\nTo be called after each graph."},
    {"stream_resize", stream_resize, METH_VARARGS, "stream_resize(stream, limit)\n\nAnother limit, in bytes."},
    {"stream_state", stream_state, METH_O, "stream_state(stream) -> tuple\n\nSee homeinfer/_native.pyi."},
    {"stream_close", stream_close, METH_O, "stream_close(stream)\n\nEnds its reader threads."},
    {"rows_pack", rows_pack, METH_VARARGS, "rows_pack(kind, rows, width) -> bytes\n\nSee homeinfer/_native.pyi."},
    {"rows_unpack", rows_unpack, METH_VARARGS, "rows_unpack(kind, rows, n, width) -> rows\n\nSee homeinfer/_native.pyi."},
    {"spin", spin, METH_O, "spin(n)\n\nn steps of a busy wait, to time one."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "The hot paths of homeinfer in C.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) {
    return PyModule_Create(&definition);
}
