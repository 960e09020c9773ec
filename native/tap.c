/* What goes into a model's weights, read through llama.cpp's eval callback (llama_context_params.cb_eval).
 *
 * For a product of an observed weight (MUL_MAT, MUL_MAT_ID; src0 is the weight, src1 the inputs, src2 the experts)
 * it either sums the squares of the inputs per channel, as llama.cpp's tools/imatrix does (collect_imatrix), or
 * copies the inputs' rows. Every buffer is the caller's. Products that share their input read it once. */
#include "tap.h"
#include "tensor.h"

#include <stdlib.h>

#define TAP_CAPSULE "homeinfer._native.tap"
#define TYPE_F32 0 /* GGML_TYPE_F32 */
#define TYPE_I32 26

enum mode { MODE_SUM2 = 0, MODE_ROWS = 1 };
enum kind { KIND_UNSEEN = 0, KIND_DENSE = 1, KIND_EXPERTS = 2 };

typedef struct {
    char name[NAME_MAX_BYTES];
    int index; /* the caller's order; the array is sorted by name */
    int mode;
    int64_t n_in, n_mat;
    Py_buffer values; /* double [n_mat, n_in] of squares, or float [capacity, n_in] of rows */
    Py_buffer counts; /* int64 [n_mat]; rows: unused */
    int kind;
    int leader;       /* rows: index of the weight whose buffer has this one's input; -1: not seen */
    int64_t rows;     /* rows: in the buffer since tap_begin */
    uint64_t graph;   /* the last graph this weight was seen in */
} weight;

typedef struct {
    nbytes_fn nbytes;
    tensor_get_fn tensor_get;
    int mul_mat, mul_mat_id;
    weight *weights;
    size_t n_weights;
    size_t products, expected; /* seen since tap_begin; in a whole graph, once there was one */
    uint64_t graph;
    bool stopped;
    const char *problem;
    int culprit;
    const tensor *input; /* what `data` holds, in this graph */
    int input_leader;
    bool input_summed;
    char *data, *ids;
    size_t data_size, ids_size;
    double *sum; /* squares of the input's rows, [sum_size], if input_summed */
    size_t sum_size;
} tap;

static int by_name(const void *a, const void *b) {
    return strcmp(((const weight *)a)->name, ((const weight *)b)->name);
}

static int name_is(const void *key, const void *element) {
    return strcmp(key, ((const weight *)element)->name);
}

/* The weight of a product, or NULL. A copy on another backend is called CUDA0#blk.0.attn_k.weight#0. */
static weight *find(const tap *self, const tensor *node) {
    if ((node->op != self->mul_mat && node->op != self->mul_mat_id) || !node->src[0] || !node->src[1]) {
        return NULL;
    }
    const char *name = node->src[0]->name, *mark = strchr(name, '#');
    char plain[NAME_MAX_BYTES];
    if (mark != NULL) {
        const char *end = strchr(mark + 1, '#');
        const size_t length = end ? (size_t)(end - mark - 1) : strlen(mark + 1);
        memcpy(plain, mark + 1, length);
        plain[length] = 0;
        name = plain;
    }
    return bsearch(name, self->weights, self->n_weights, sizeof(weight), name_is);
}

static bool fail(tap *self, const weight *of, const char *problem) {
    self->problem = problem;
    self->culprit = of->index;
    self->stopped = true;
    return false;
}

static bool reserve(char **buffer, size_t *size, size_t wanted) {
    if (*size >= wanted) {
        return true;
    }
    char *larger = realloc(*buffer, wanted);
    if (larger == NULL) {
        return false;
    }
    *buffer = larger;
    *size = wanted;
    return true;
}

static void new_graph(tap *self) {
    ++self->graph;
    self->input = NULL;
}

static bool read_input(tap *self, weight *w, const tensor *input) {
    if (self->input == input) {
        return true;
    }
    const size_t n = self->nbytes((const struct ggml_tensor *)input);
    if (!reserve(&self->data, &self->data_size, n)) {
        return fail(self, w, "no memory for its inputs");
    }
    self->tensor_get((const struct ggml_tensor *)input, self->data, 0, n);
    self->input = input;
    self->input_leader = -1;
    self->input_summed = false;
    return true;
}

static const float *row_at(const tap *self, const tensor *input, int64_t i1, int64_t i2, int64_t i3) {
    return (const float *)(const void *)(self->data + (size_t)i1 * input->nb[1] + (size_t)i2 * input->nb[2] +
                                         (size_t)i3 * input->nb[3]);
}

static void add_squares(double *to, const float *x, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
        to[j] += (double)x[j] * (double)x[j];
    }
}

/* One matrix: the squares of all rows, kept for the next weight with the same input. */
static bool sum_plain(tap *self, weight *w, const tensor *input) {
    if (!self->input_summed) {
        const size_t wanted = (size_t)w->n_in * sizeof(double);
        char *buffer = (char *)self->sum;
        if (!reserve(&buffer, &self->sum_size, wanted)) {
            return fail(self, w, "no memory for its sums");
        }
        self->sum = (double *)(void *)buffer;
        memset(self->sum, 0, wanted);
        for (int64_t i3 = 0; i3 < input->ne[3]; ++i3) {
            for (int64_t i2 = 0; i2 < input->ne[2]; ++i2) {
                for (int64_t i1 = 0; i1 < input->ne[1]; ++i1) {
                    add_squares(self->sum, row_at(self, input, i1, i2, i3), w->n_in);
                }
            }
        }
        self->input_summed = true;
    }
    double *to = w->values.buf;
    for (int64_t j = 0; j < w->n_in; ++j) {
        to[j] += self->sum[j];
    }
    ((int64_t *)w->counts.buf)[0] += input->ne[1] * input->ne[2] * input->ne[3];
    return true;
}

/* Several matrices in one tensor that every token passes (one per head). As llama.cpp has it, one count for all. */
static bool sum_stacked(tap *self, weight *w, const tensor *matrices, const tensor *input) {
    for (int64_t i3 = 0; i3 < input->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < input->ne[2]; ++i2) {
            const int64_t matrix = i3 % matrices->ne[3] * matrices->ne[2] + i2 % matrices->ne[2];
            for (int64_t i1 = 0; i1 < input->ne[1]; ++i1) {
                add_squares((double *)w->values.buf + matrix * w->n_in, row_at(self, input, i1, i2, i3), w->n_in);
            }
        }
    }
    ((int64_t *)w->counts.buf)[0] += input->ne[1] * input->ne[2] * input->ne[3] / w->n_mat;
    return true;
}

/* ids [used, tokens] say which expert a row of the input [n_in, used or 1, tokens] goes to. */
static bool sum_experts(tap *self, weight *w, const tensor *ids, const tensor *input) {
    if (ids == NULL || ids->type != TYPE_I32 || ids->ne[1] != input->ne[2] || input->ne[3] != 1) {
        return fail(self, w, "its experts are chosen in a way that is not known here");
    }
    const size_t n = self->nbytes((const struct ggml_tensor *)ids);
    if (!reserve(&self->ids, &self->ids_size, n)) {
        return fail(self, w, "no memory for its experts' numbers");
    }
    self->tensor_get((const struct ggml_tensor *)ids, self->ids, 0, n);
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
            int32_t expert;
            memcpy(&expert, self->ids + (size_t)token * ids->nb[1] + (size_t)slot * ids->nb[0], sizeof expert);
            if (expert < 0 || expert >= w->n_mat) {
                return fail(self, w, "an expert was chosen that there is not");
            }
            const float *row = row_at(self, input, slot % input->ne[1], token, 0);
            add_squares((double *)w->values.buf + expert * w->n_in, row, w->n_in);
            ++((int64_t *)w->counts.buf)[expert];
        }
    }
    return true;
}

static bool copy_rows(tap *self, weight *w, const tensor *input) {
    if (self->input_leader >= 0) {
        if (w->leader >= 0 && w->leader != self->input_leader) {
            return fail(self, w, "it shares its input with another weight than before");
        }
        w->leader = self->input_leader;
        return true;
    }
    if (w->leader >= 0 && w->leader != w->index) {
        return fail(self, w, "it no longer shares its input with another weight");
    }
    w->leader = self->input_leader = w->index;
    const size_t width = (size_t)w->n_in * sizeof(float);
    const int64_t n = input->ne[1] * input->ne[2] * input->ne[3];
    if (n > (int64_t)((size_t)w->values.len / width) - w->rows) {
        return fail(self, w, "it has more input rows than there is room for");
    }
    char *to = (char *)w->values.buf + (size_t)w->rows * width;
    for (int64_t i3 = 0; i3 < input->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < input->ne[2]; ++i2) {
            for (int64_t i1 = 0; i1 < input->ne[1]; ++i1, to += width) {
                memcpy(to, row_at(self, input, i1, i2, i3), width);
            }
        }
    }
    w->rows += n;
    return true;
}

static bool take(tap *self, weight *w, const tensor *node) {
    const tensor *matrices = node->src[0], *input = node->src[1];
    const int kind = node->op == self->mul_mat_id ? KIND_EXPERTS : KIND_DENSE;
    if (input->type != TYPE_F32 || input->nb[0] != sizeof(float)) {
        return fail(self, w, "its inputs are not plain F32 numbers");
    }
    if (matrices->ne[0] != w->n_in || input->ne[0] != w->n_in || matrices->ne[2] * matrices->ne[3] != w->n_mat) {
        return fail(self, w, "it has another shape in the computation than in the file");
    }
    if (w->kind != KIND_UNSEEN && w->kind != kind) {
        return fail(self, w, "it is used both with and without a choice of experts");
    }
    w->kind = kind;
    if (!read_input(self, w, input)) {
        return false;
    }
    if (w->mode == MODE_ROWS) {
        return kind == KIND_EXPERTS || w->n_mat == 1 ? copy_rows(self, w, input)
                                                     : fail(self, w, "it is several matrices in one");
    }
    if (kind == KIND_EXPERTS) {
        return sum_experts(self, w, node->src[2], input);
    }
    return w->n_mat == 1 ? sum_plain(self, w, input) : sum_stacked(self, w, matrices, input);
}

/* ggml_backend_sched_eval_callback. A weight that comes again may begin another graph, in which a tensor has the address
 * of an older one. When as many products have come as the first graph had, the rest of a graph is not computed. */
static bool on_node(struct ggml_tensor *opaque, bool ask, void *data) {
    tap *self = data;
    const tensor *node = (const tensor *)opaque;
    weight *w = find(self, node);
    if (w == NULL) {
        return !ask;
    }
    if (self->stopped) {
        if (self->problem == NULL) {
            fail(self, w, "it is used again after all others");
        }
        return false;
    }
    if (ask) {
        return true;
    }
    if (w->graph == self->graph) {
        new_graph(self);
    }
    w->graph = self->graph;
    if (!take(self, w, node)) {
        return false;
    }
    self->stopped = ++self->products == self->expected;
    return !self->stopped;
}

static void tap_release(tap *self) {
    for (size_t i = 0; i < self->n_weights; ++i) {
        PyBuffer_Release(&self->weights[i].values);
        if (self->weights[i].mode == MODE_SUM2) {
            PyBuffer_Release(&self->weights[i].counts);
        }
    }
    free(self->weights);
    free(self->data);
    free(self->ids);
    free(self->sum);
    free(self);
}

static void tap_free(PyObject *capsule) {
    tap_release(PyCapsule_GetPointer(capsule, TAP_CAPSULE));
}

/* One of tap_new's tuples; what it leaves behind on failure is nothing. */
static bool add_weight(tap *self, PyObject *item) {
    weight *w = self->weights + self->n_weights;
    const char *name;
    long long n_in, n_mat;
    PyObject *values, *counts;
    if (!PyArg_ParseTuple(item, "siLLOO", &name, &w->mode, &n_in, &n_mat, &values, &counts)) {
        return false;
    }
    if (strlen(name) >= NAME_MAX_BYTES || n_in < 1 || n_mat < 1 || n_in > INT32_MAX || n_mat > INT32_MAX ||
        (w->mode != MODE_SUM2 && w->mode != MODE_ROWS)) {
        PyErr_SetString(PyExc_ValueError, "a name of 64 bytes or more, a size below 1, or an unknown mode");
        return false;
    }
    memcpy(w->name, name, strlen(name) + 1);
    w->n_in = n_in;
    w->n_mat = n_mat;
    w->index = (int)self->n_weights;
    w->leader = -1;
    if (PyObject_GetBuffer(values, &w->values, PyBUF_WRITABLE) != 0) {
        return false;
    }
    if (w->mode == MODE_SUM2 && PyObject_GetBuffer(counts, &w->counts, PyBUF_WRITABLE) != 0) {
        PyBuffer_Release(&w->values);
        return false;
    }
    ++self->n_weights;
    if (w->mode == MODE_SUM2 && ((size_t)w->values.len / sizeof(double) / (size_t)n_in < (size_t)n_mat ||
                                 (size_t)w->counts.len / sizeof(int64_t) < (size_t)n_mat)) {
        PyErr_SetString(PyExc_ValueError, "a buffer is too small for its sums");
        return false;
    }
    return true;
}

static bool add_weights(tap *self, PyObject *weights) {
    const Py_ssize_t n = PySequence_Size(weights);
    if (n < 1 || n > INT32_MAX) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_ValueError, "there are no weights to observe");
        }
        return false;
    }
    self->weights = calloc((size_t)n, sizeof(weight));
    if (self->weights == NULL) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < n; ++i) {
        PyObject *item = PySequence_GetItem(weights, i);
        const bool added = item != NULL && add_weight(self, item);
        Py_XDECREF(item);
        if (!added) {
            return false;
        }
    }
    qsort(self->weights, self->n_weights, sizeof(weight), by_name);
    for (size_t i = 1; i < self->n_weights; ++i) {
        if (strcmp(self->weights[i - 1].name, self->weights[i].name) == 0) {
            PyErr_SetString(PyExc_ValueError, "a weight is named twice");
            return false;
        }
    }
    return true;
}

PyObject *tap_new(PyObject *module, PyObject *args) {
    unsigned long long nbytes, tensor_get;
    PyObject *weights;
    int mul_mat, mul_mat_id;
    (void)module;
    if (!PyArg_ParseTuple(args, "KKiiO", &nbytes, &tensor_get, &mul_mat, &mul_mat_id, &weights)) {
        return NULL;
    }
    if (!nbytes || !tensor_get) {
        PyErr_SetString(PyExc_ValueError, "a null address");
        return NULL;
    }
    tap *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return PyErr_NoMemory();
    }
    self->nbytes = (nbytes_fn)(uintptr_t)nbytes;
    self->tensor_get = (tensor_get_fn)(uintptr_t)tensor_get;
    self->mul_mat = mul_mat;
    self->mul_mat_id = mul_mat_id;
    self->stopped = true; /* until tap_begin: llama.cpp may run graphs of its own before */
    self->culprit = -1;
    PyObject *capsule = add_weights(self, weights) ? PyCapsule_New(self, TAP_CAPSULE, tap_free) : NULL;
    if (capsule == NULL) {
        tap_release(self);
    }
    return capsule;
}

PyObject *tap_pointers(PyObject *module, PyObject *capsule) {
    (void)module;
    tap *self = PyCapsule_GetPointer(capsule, TAP_CAPSULE);
    return self == NULL ? NULL : Py_BuildValue("KK", (unsigned long long)(uintptr_t)on_node,
                                               (unsigned long long)(uintptr_t)self);
}

PyObject *tap_begin(PyObject *module, PyObject *capsule) {
    (void)module;
    tap *self = PyCapsule_GetPointer(capsule, TAP_CAPSULE);
    if (self == NULL) {
        return NULL;
    }
    new_graph(self);
    self->stopped = false;
    self->problem = NULL;
    self->culprit = -1;
    if (self->expected == 0) {
        self->expected = self->products;
    }
    self->products = 0;
    for (size_t i = 0; i < self->n_weights; ++i) {
        self->weights[i].rows = 0;
    }
    Py_RETURN_NONE;
}

PyObject *tap_state(PyObject *module, PyObject *capsule) {
    (void)module;
    tap *self = PyCapsule_GetPointer(capsule, TAP_CAPSULE);
    PyObject *list = self == NULL ? NULL : PyList_New((Py_ssize_t)self->n_weights);
    if (list == NULL) {
        return NULL;
    }
    for (size_t i = 0; i < self->n_weights; ++i) {
        const weight *w = &self->weights[i];
        PyObject *state = Py_BuildValue("iLi", w->kind, (long long)w->rows, w->leader);
        if (state == NULL || PyList_SetItem(list, w->index, state) != 0) {
            Py_DECREF(list);
            return NULL;
        }
    }
    return Py_BuildValue("ziN", self->problem, self->culprit, list);
}

PyObject *tensor_fields(PyObject *module, PyObject *address) {
    (void)module;
    const tensor *t = PyLong_AsVoidPtr(address);
    if (t == NULL) {
        return NULL;
    }
    return Py_BuildValue("ii(LLLL)(KKKK)(KKK)Ks#", t->type, t->op, (long long)t->ne[0], (long long)t->ne[1],
                         (long long)t->ne[2], (long long)t->ne[3], (unsigned long long)t->nb[0],
                         (unsigned long long)t->nb[1], (unsigned long long)t->nb[2], (unsigned long long)t->nb[3],
                         (unsigned long long)(uintptr_t)t->src[0], (unsigned long long)(uintptr_t)t->src[1],
                         (unsigned long long)(uintptr_t)t->src[2], (unsigned long long)(uintptr_t)t->data, t->name,
                         (Py_ssize_t)strnlen(t->name, NAME_MAX_BYTES));
}
