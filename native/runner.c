/* One batch through one window: check, look up embedding rows, llama_decode, collect what comes out.
 *
 * Done in Python this takes 0.03 ms hot but 0.25 ms in the middle of a decode, whose weights have just swept
 * the interpreter out of the caches. Functions of llama.cpp come in as addresses. */
#include "capture.h"

#include <time.h>

#define RUNNER_CAPSULE "homeinfer._native.runner"

/* struct llama_batch of llama.h; the caller compares the layout with llama-cpp-python's at start. */
typedef struct {
    int32_t n_tokens;
    int32_t *token;
    float *embd;
    int32_t *pos;
    int32_t *n_seq_id;
    int32_t **seq_id;
    int8_t *logits;
} llama_batch;

typedef int32_t (*decode_fn)(void *, llama_batch);
typedef float *(*logits_fn)(void *, int32_t);
typedef void (*to_float_fn)(const void *, float *, int64_t);

typedef struct {
    decode_fn decode;
    logits_fn logits_ith;
    to_float_fn to_float;
    void *context;
    PyObject *capture_capsule;
    capture *capture;
    int32_t capacity, n_embd, n_vocab, n_seq, n_ctx, sections, n_rows;
    size_t row_bytes;
    float scale;
    int takes_tokens, gives_logits, only_wanted, has_embedding;
    Py_buffer embedding;
    int32_t *tokens, *positions, *counts, *sequences, **sequence_pointers;
    int8_t *marks;
    float *hidden;
} runner;

static double now_us(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static void runner_release(runner *self) {
    if (self->has_embedding) {
        PyBuffer_Release(&self->embedding);
    }
    Py_XDECREF(self->capture_capsule);
    PyMem_Free(self->tokens);
    PyMem_Free(self->positions);
    PyMem_Free(self->counts);
    PyMem_Free(self->sequences);
    PyMem_Free(self->sequence_pointers);
    PyMem_Free(self->marks);
    PyMem_Free(self->hidden);
    PyMem_Free(self);
}

static void runner_free(PyObject *capsule) {
    runner_release(PyCapsule_GetPointer(capsule, RUNNER_CAPSULE));
}

static int allocate(runner *self) {
    const size_t n = (size_t)self->capacity;
    self->tokens = PyMem_Calloc(n, sizeof(int32_t));
    self->positions = PyMem_Calloc(n * (size_t)self->sections, sizeof(int32_t));
    self->counts = PyMem_Calloc(n, sizeof(int32_t));
    self->sequences = PyMem_Calloc(n, sizeof(int32_t));
    self->sequence_pointers = PyMem_Calloc(n + 1, sizeof(int32_t *));
    self->marks = PyMem_Calloc(n, 1);
    self->hidden = PyMem_Calloc(n * (size_t)self->n_embd, sizeof(float));
    if (!self->tokens || !self->positions || !self->counts || !self->sequences || !self->sequence_pointers ||
        !self->marks || !self->hidden) {
        return 0;
    }
    for (size_t i = 0; i < n; ++i) {
        self->counts[i] = 1;
        self->sequence_pointers[i] = self->sequences + i;
    }
    return 1;
}

static int attach_embedding(runner *self, PyObject *embedding) {
    if (embedding == Py_None) {
        return 1;
    }
    if (PyObject_GetBuffer(embedding, &self->embedding, PyBUF_SIMPLE) != 0) {
        return 0;
    }
    self->has_embedding = 1;
    if (self->n_rows < 1 || (size_t)self->embedding.len / (size_t)self->n_rows < self->row_bytes ||
        (!self->to_float && self->row_bytes != (size_t)self->n_embd * sizeof(float))) {
        PyErr_SetString(PyExc_ValueError, "the embedding is smaller than its rows");
        return 0;
    }
    return 1;
}

PyObject *runner_new(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"decode",   "logits_ith", "context",      "capture",      "capacity",  "n_embd",
                            "n_vocab",  "n_seq",      "n_ctx",        "sections",     "scale",     "takes_tokens",
                            "embedding", "n_rows",    "row_bytes",    "to_float",     "only_wanted", NULL};
    unsigned long long decode, logits_ith, context, row_bytes, to_float;
    PyObject *capsule, *embedding;
    (void)module;
    runner *self = PyMem_Calloc(1, sizeof *self);
    if (self == NULL) {
        return PyErr_NoMemory();
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KKKOiiiiiifpOiKKp", names, &decode, &logits_ith, &context, &capsule,
                                     &self->capacity, &self->n_embd, &self->n_vocab, &self->n_seq, &self->n_ctx,
                                     &self->sections, &self->scale, &self->takes_tokens, &embedding, &self->n_rows,
                                     &row_bytes, &to_float, &self->only_wanted)) {
        PyMem_Free(self);
        return NULL;
    }
    self->decode = (decode_fn)(uintptr_t)decode;
    self->logits_ith = (logits_fn)(uintptr_t)logits_ith;
    self->to_float = (to_float_fn)(uintptr_t)to_float;
    self->context = (void *)(uintptr_t)context;
    self->row_bytes = (size_t)row_bytes;
    self->gives_logits = capsule == Py_None;
    self->only_wanted = self->only_wanted || self->gives_logits;
    if (!self->gives_logits) {
        self->capture = PyCapsule_GetPointer(capsule, CAPTURE_CAPSULE);
        if (self->capture == NULL) {
            runner_release(self);
            return NULL;
        }
        Py_INCREF(capsule);
        self->capture_capsule = capsule;
    }
    if (self->capacity < 1 || self->n_embd < 1 || self->n_vocab < 1 || self->sections < 1 || !decode || !context) {
        PyErr_SetString(PyExc_ValueError, "a size below 1 or a null address");
        runner_release(self);
        return NULL;
    }
    if (!attach_embedding(self, embedding)) {
        runner_release(self);
        return NULL;
    }
    PyObject *result = allocate(self) ? PyCapsule_New(self, RUNNER_CAPSULE, runner_free) : PyErr_NoMemory();
    if (result == NULL) {
        runner_release(self);
    }
    return result;
}

/* What llama.cpp would abort on, or NULL. */
static const char *complaint(const runner *self, int32_t n, const Py_buffer *index, const Py_buffer *rows) {
    if (n < 1 || n > self->capacity || index->len != 9 * (Py_ssize_t)n) {
        return "the batch does not fit the window";
    }
    const int tokens = self->takes_tokens || self->has_embedding;
    if (rows->len != (Py_ssize_t)n * 4 * (tokens ? 1 : self->n_embd)) {
        return tokens ? "this window takes tokens, one for each position" : "this window takes hidden states";
    }
    for (int32_t i = 0; i < n; ++i) {
        int32_t position, sequence, token;
        memcpy(&position, (const char *)index->buf + 4 * i, 4);
        memcpy(&sequence, (const char *)index->buf + 4 * (n + i), 4);
        if (position < 0 || position >= self->n_ctx) {
            return "a position is outside the context";
        }
        if (sequence < 0 || sequence >= self->n_seq) {
            return "a sequence is outside those there are";
        }
        if (tokens) {
            memcpy(&token, (const char *)rows->buf + 4 * i, 4);
            if (token < 0 || token >= (self->has_embedding ? self->n_rows : self->n_vocab)) {
                return "a token is outside the vocabulary";
            }
        }
    }
    return NULL;
}

/* Where the part that starts at `start` ends: parts in which every sequence is one run and all runs are equally
 * long keep their order in llama.cpp (llama_batch_allocr::split_equal reorders others). */
static int32_t part_end(const char *sequences, int32_t start, int32_t n) {
    int32_t length = 0, end = start;
    while (end < n) {
        int32_t run = 1, here, seen;
        memcpy(&here, sequences + 4 * end, 4);
        while (end + run < n && memcmp(sequences + 4 * (end + run), &here, 4) == 0) {
            ++run;
        }
        for (int32_t i = start; i < end; ++i) {
            memcpy(&seen, sequences + 4 * i, 4);
            if (seen == here) {
                return end;
            }
        }
        if (length != 0 && run != length) {
            return end;
        }
        length = run;
        end += run;
    }
    return end;
}

static void fill_hidden(runner *self, const char *rows, int32_t start, int32_t n) {
    const size_t width = (size_t)self->n_embd;
    for (int32_t i = 0; self->has_embedding && i < n; ++i) {
        int32_t token;
        memcpy(&token, rows + 4 * (size_t)(start + i), 4);
        const char *row = (const char *)self->embedding.buf + (size_t)token * self->row_bytes;
        float *to = self->hidden + (size_t)i * width;
        if (self->to_float) {
            self->to_float(row, to, self->n_embd);
        } else {
            memcpy(to, row, width * sizeof(float));
        }
    }
    if (!self->has_embedding) {
        memcpy(self->hidden, rows + (size_t)start * width * sizeof(float), (size_t)n * width * sizeof(float));
    }
    for (size_t i = 0; self->scale != 1.0f && i < (size_t)n * width; ++i) {
        self->hidden[i] *= self->scale;
    }
}

static llama_batch fill(runner *self, const Py_buffer *index, const char *rows, int32_t total, int32_t start,
                        int32_t n) {
    const char *positions = index->buf, *sequences = positions + 4 * (size_t)total;
    const char *wanted = sequences + 4 * (size_t)total;
    llama_batch batch = {n, NULL, NULL, self->positions, self->counts, self->sequence_pointers, self->marks};
    memcpy(self->sequences, sequences + 4 * (size_t)start, 4 * (size_t)n);
    for (int32_t i = 0; i < n; ++i) {
        /* without all rows marked, llama.cpp drops them before the last layer's FFN */
        self->marks[i] = self->only_wanted ? wanted[start + i] != 0 : 1;
    }
    memcpy(self->positions, positions + 4 * (size_t)start, 4 * (size_t)n);
    if (self->takes_tokens) {
        memcpy(self->tokens, rows + 4 * (size_t)start, 4 * (size_t)n);
        batch.token = self->tokens;
        return batch;
    }
    /* llama.cpp's M-RoPE of text: time, height and width are the position, the fourth section is 0 */
    for (int32_t s = 1; s < self->sections; ++s) {
        if (s < 3) {
            memcpy(self->positions + (size_t)s * (size_t)n, self->positions, 4 * (size_t)n);
        } else {
            memset(self->positions + (size_t)s * (size_t)n, 0, 4 * (size_t)n);
        }
    }
    fill_hidden(self, rows, start, n);
    batch.embd = self->hidden;
    return batch;
}

/* Runs all parts without the GIL; returns llama_decode's status. */
static int32_t run_parts(runner *self, const Py_buffer *index, const char *rows, int32_t n, char *out) {
    const char *sequences = (const char *)index->buf + 4 * (size_t)n;
    for (int32_t start = 0; start < n;) {
        const int32_t end = part_end(sequences, start, n);
        const llama_batch batch = fill(self, index, rows, n, start, end - start);
        const int32_t status = self->decode(self->context, batch);
        if (status != 0) {
            return status;
        }
        for (int32_t i = 0; self->gives_logits && i < batch.n_tokens; ++i) {
            if (self->marks[i]) {
                memcpy(out, self->logits_ith(self->context, i), (size_t)self->n_vocab * sizeof(float));
                out += (size_t)self->n_vocab * sizeof(float);
            }
        }
        start = end;
    }
    return 0;
}

static Py_ssize_t out_bytes(const runner *self, const Py_buffer *index, int32_t n) {
    Py_ssize_t rows = 0;
    for (int32_t i = 0; i < n; ++i) {
        rows += !self->only_wanted || ((const char *)index->buf)[8 * (size_t)n + (size_t)i] != 0;
    }
    return rows * (self->gives_logits ? self->n_vocab : self->n_embd) * 4;
}

static PyObject *forward_checked(runner *self, int32_t n, const Py_buffer *index, const Py_buffer *rows) {
    const char *problem = complaint(self, n, index, rows);
    if (problem != NULL) {
        PyErr_SetString(PyExc_ValueError, problem);
        return NULL;
    }
    const Py_ssize_t size = out_bytes(self, index, n);
    PyObject *out = PyBytes_FromStringAndSize(NULL, size);
    if (out == NULL) {
        return NULL;
    }
    char *target = PyBytes_AsString(out);
    if (self->capture != NULL) {
        capture_aim(self->capture, target, (size_t)size);
    }
    int32_t status;
    double spent;
    Py_BEGIN_ALLOW_THREADS
    spent = now_us();
    status = run_parts(self, index, rows->buf, n, target);
    spent = now_us() - spent;
    Py_END_ALLOW_THREADS
    if (self->capture != NULL) {
        self->capture->target = NULL;
        if (status == 0 && self->capture->written != (size_t)size) {
            Py_DECREF(out);
            PyErr_Format(PyExc_ValueError, "the last layer's output had %zu bytes, not %zd", self->capture->seen, size);
            return NULL;
        }
    }
    return Py_BuildValue("iNd", status, out, spent);
}

PyObject *runner_forward(PyObject *module, PyObject *args) {
    PyObject *capsule, *index_object, *rows_object, *result = NULL;
    Py_buffer index, rows;
    int n;
    (void)module;
    if (!PyArg_ParseTuple(args, "OiOO", &capsule, &n, &index_object, &rows_object)) {
        return NULL;
    }
    runner *self = PyCapsule_GetPointer(capsule, RUNNER_CAPSULE);
    if (self == NULL || PyObject_GetBuffer(index_object, &index, PyBUF_SIMPLE) != 0) {
        return NULL;
    }
    if (PyObject_GetBuffer(rows_object, &rows, PyBUF_SIMPLE) == 0) {
        result = forward_checked(self, n, &index, &rows);
        PyBuffer_Release(&rows);
    }
    PyBuffer_Release(&index);
    return result;
}

PyObject *batch_layout(PyObject *module, PyObject *none) {
    (void)module;
    (void)none;
    return Py_BuildValue("nnnnnnnn", (Py_ssize_t)offsetof(llama_batch, n_tokens), (Py_ssize_t)offsetof(llama_batch, token),
                         (Py_ssize_t)offsetof(llama_batch, embd), (Py_ssize_t)offsetof(llama_batch, pos),
                         (Py_ssize_t)offsetof(llama_batch, n_seq_id), (Py_ssize_t)offsetof(llama_batch, seq_id),
                         (Py_ssize_t)offsetof(llama_batch, logits), (Py_ssize_t)sizeof(llama_batch));
}
