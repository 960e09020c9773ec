/* Super-blocks of GGUF types, rounded with error feedback. The scales that come in (ggml's own, searched for the same
 * compensated weights) are a start: every group of weights that share a scale tries some near it, on the weights as the
 * groups left of it have left them, and keeps what makes the sum of its squared errors least. That sum over all
 * columns is the proxy loss tr(D H D^T), so greedy choices are made by the loss itself. Rows know nothing of each
 * other: LANES of them go side by side. */
#include "rounding.h"

#include <string.h>

#define CACHE_LINE 64

/* LANES rows of a super-block. */
typedef struct {
    lanes weights[SUPER_BLOCK];
    lanes error[SUPER_BLOCK];
    uint16_t codes[LANES][SUPER_BLOCK];
    uint8_t signs[LANES][SUPER_BLOCK / 8];
    block_scales scales[LANES];
    rounded best, trial;
} tile;

static void round_group(const task *job, int at, const lanes *weights, const float *scale, const float *minimum,
                        rounded *out) {
    if (job->format->vector) {
        round_group_grid(job, at, weights, scale, out);
    } else {
        round_group_scalar(job, at, weights, scale, minimum, out);
    }
}

/* The lanes of trial that lost less than best. */
HOT static void keep_better(int n, rounded *best, const rounded *trial) {
    int32_t better[LANES];
    EACH_LANE(r) {
        better[r] = trial->loss[r] < best->loss[r];
        best->loss[r] = better[r] ? trial->loss[r] : best->loss[r];
    }
    for (int j = 0; j < n; ++j) {
        EACH_LANE(r) {
            best->error[j][r] = better[r] ? trial->error[j][r] : best->error[j][r];
            best->code[j][r] = better[r] ? trial->code[j][r] : best->code[j][r];
        }
    }
    for (int j = 0; j < n / 8; ++j) {
        EACH_LANE(r) {
            best->sign[j][r] = better[r] ? trial->sign[j][r] : best->sign[j][r];
        }
    }
}

/* Tries all scales for group g, keeps the best in work->best and in work->scales. */
static void choose_scales(const task *job, int g, tile *work) {
    const block_format *format = job->format;
    const int at = g * format->group;
    int scale_codes[LANES], minimum_codes[LANES];
    EACH_LANE(r) {
        scale_codes[r] = work->scales[r].scale[g];
        minimum_codes[r] = work->scales[r].minimum[g];
    }
    for (int c = 0; c < job->n_factors; ++c) {
        int tried_scale[LANES], tried_minimum[LANES];
        lanes scale, minimum;
        EACH_LANE(r) {
            tried_scale[r] = scale_times(format, scale_codes[r], job->factors[c][0]);
            tried_minimum[r] = minimum_times(format, minimum_codes[r], job->factors[c][1]);
            scale[r] = scale_value(format, &work->scales[r], tried_scale[r]);
            minimum[r] = minimum_value(format, &work->scales[r], tried_minimum[r]);
        }
        round_group(job, at, work->weights + at, scale, minimum, c ? &work->trial : &work->best);
        EACH_LANE(r) {
            if (c == 0 || work->trial.loss[r] < work->best.loss[r]) {
                work->scales[r].scale[g] = tried_scale[r];
                work->scales[r].minimum[g] = tried_minimum[r];
            }
        }
        if (c) {
            keep_better(format->group, &work->best, &work->trial);
        }
    }
}

/* The errors of columns [at, at + n) change the columns right of them. */
HOT static void spread(const task *job, int at, int n, tile *work) {
    for (int k = at + n; k < job->n; k += 4) {
        lanes sum[4];
        memcpy(sum, work->weights[k], sizeof sum);
        for (int j = at; j < at + n; ++j) {
            const float *restrict upper = job->upper + (size_t)j * SUPER_BLOCK + k;
            for (int i = 0; i < 4; ++i) {
                EACH_LANE(r) {
                    sum[i][r] -= work->error[j][r] * upper[i];
                }
            }
        }
        memcpy(work->weights[k], sum, sizeof sum);
    }
}

static void collect(const task *job, int g, tile *work) {
    const int n = job->format->group, at = g * n, vector = job->format->vector;
    memcpy(work->error[at], work->best.error, (size_t)n * sizeof(lanes));
    EACH_LANE(r) {
        if (!vector) {
            for (int j = 0; j < n; ++j) {
                work->codes[r][at + j] = (uint16_t)work->best.code[j][r];
            }
            continue;
        }
        for (int j = 0; j < n; j += vector) {
            work->codes[r][(at + j) / vector] = job->grid.code[work->best.code[j][r]];
        }
        for (int j = 0; j < n / 8; ++j) {
            work->signs[r][at / 8 + j] = (uint8_t)work->best.sign[j][r];
        }
    }
}

/* Rows of [rows, n] weights, which become the errors; blocks [rows, stride] have scales when they come in. */
static void round_rows(const task *job, int rows, float *weights, uint8_t *blocks, size_t stride, tile *work) {
    memset(work, 0, sizeof *work);
    for (int r = 0; r < rows; ++r) {
        for (int j = 0; j < job->n; ++j) {
            work->weights[j][r] = weights[(size_t)r * job->n + j];
        }
        blocks_read_scales(job->format, blocks + r * stride, job->n, &work->scales[r]);
    }
    for (int g = 0; g < job->n / job->format->group; ++g) {
        choose_scales(job, g, work);
        collect(job, g, work);
        spread(job, g * job->format->group, job->format->group, work);
    }
    for (int r = 0; r < rows; ++r) {
        for (int j = 0; j < job->n; ++j) {
            weights[(size_t)r * job->n + j] = work->error[j][r];
        }
        blocks_write_scales(job->format, blocks + r * stride, job->n, &work->scales[r]);
        blocks_write_codes(job->format, blocks + r * stride, job->n, work->codes[r], work->signs[r]);
    }
}

enum { WEIGHTS, BLOCKS, UPPER, INVERSE, FACTORS, FIRST, SECOND, FIRST_OF, SECOND_OF, CODE, N_BUFFERS };

static bool is_aligned(const Py_buffer *buffer) {
    return (uintptr_t)buffer->buf % sizeof(float) == 0;
}

/* Why the buffers do not belong together, or NULL; fills the task in. */
static const char *check(Py_buffer *b, Py_ssize_t n, Py_ssize_t rows, task *out) {
    const block_format *format = out->format;
    if (format == NULL) {
        return "this type can't be rounded";
    }
    if (n < format->width || n > SUPER_BLOCK || n % format->width != 0 || rows < 0 || rows > INT32_MAX) {
        return "a super-block is whole blocks of at most 256 weights";
    }
    if (b[WEIGHTS].len / (Py_ssize_t)sizeof(float) / n != rows || b[WEIGHTS].len % (n * (Py_ssize_t)sizeof(float)) ||
        b[BLOCKS].len != rows * (n / format->width) * format->bytes) {
        return "weights and blocks are not of the same rows";
    }
    if (b[UPPER].len != n * SUPER_BLOCK * (Py_ssize_t)sizeof(float) ||
        b[INVERSE].len != n * (Py_ssize_t)sizeof(float)) {
        return "the factor is not of these columns";
    }
    if (b[FACTORS].len == 0 || b[FACTORS].len % (2 * sizeof(float)) != 0 || b[FACTORS].len > 1 << 16) {
        return "factors are pairs of float32";
    }
    for (int i = 0; i < N_BUFFERS; ++i) {
        if (i != BLOCKS && !is_aligned(&b[i])) {
            return "a buffer is not aligned";
        }
    }
    out->n = (int)n;
    out->upper = b[UPPER].buf;
    out->inverse = b[INVERSE].buf;
    out->factors = b[FACTORS].buf;
    out->n_factors = (int)(b[FACTORS].len / (2 * sizeof(float)));
    return NULL;
}

static const char *check_grid(Py_buffer *b, task *out) {
    const int half = out->format->vector / 2;
    if (half == 0) {
        return NULL;
    }
    const Py_ssize_t pattern = half * (Py_ssize_t)sizeof(float), n = b[FIRST_OF].len;
    if (b[FIRST].len % pattern || b[SECOND].len % pattern || b[FIRST].len / pattern > PATTERNS_MAX ||
        b[SECOND].len / pattern > PATTERNS_MAX || n == 0 || n > UINT16_MAX || b[SECOND_OF].len != n ||
        b[CODE].len != n * (Py_ssize_t)sizeof(uint16_t)) {
        return "the parts of the grid do not fit together";
    }
    grid *made = &out->grid;
    *made = (grid){(int)n, (int)(b[FIRST].len / pattern), (int)(b[SECOND].len / pattern), half, b[FIRST].buf,
                   b[SECOND].buf, b[FIRST_OF].buf, b[SECOND_OF].buf, b[CODE].buf};
    for (int i = 0; i < made->n; ++i) {
        if (made->first_of[i] >= made->n_first || made->second_of[i] >= made->n_second) {
            return "an entry of the grid has no such half";
        }
    }
    return NULL;
}

PyObject *round_super_block(PyObject *module, PyObject *args) {
    (void)module;
    int type;
    Py_ssize_t rows, n;
    Py_buffer b[N_BUFFERS];
    if (!PyArg_ParseTuple(args, "innw*w*y*y*y*y*y*y*y*y*:round_super_block", &type, &rows, &n, &b[0], &b[1], &b[2],
                          &b[3], &b[4], &b[5], &b[6], &b[7], &b[8], &b[9])) {
        return NULL;
    }
    task job = {.format = block_format_of(type)};
    const char *problem = check(b, n, rows, &job);
    problem = problem ? problem : check_grid(b, &job);
    char *memory = problem ? NULL : PyMem_Malloc(sizeof(tile) + CACHE_LINE);
    if (problem) {
        PyErr_SetString(PyExc_ValueError, problem);
    } else if (memory == NULL) {
        PyErr_NoMemory();
    } else {
        const size_t stride = (size_t)(n / job.format->width) * job.format->bytes;
        tile *work = (tile *)(memory + CACHE_LINE - (uintptr_t)memory % CACHE_LINE);
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t at = 0; at < rows; at += LANES) {
            const int count = rows - at < LANES ? (int)(rows - at) : LANES;
            round_rows(&job, count, (float *)b[WEIGHTS].buf + at * n, (uint8_t *)b[BLOCKS].buf + at * stride, stride,
                       work);
        }
        Py_END_ALLOW_THREADS
        PyMem_Free(memory);
    }
    for (int i = 0; i < N_BUFFERS; ++i) {
        PyBuffer_Release(&b[i]);
    }
    if (PyErr_Occurred()) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* half_bits(floats, out): half_of_float of each, and back in place: for tests. */
PyObject *half_bits(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer values, bits;
    if (!PyArg_ParseTuple(args, "w*w*:half_bits", &values, &bits)) {
        return NULL;
    }
    const bool fits = values.len / (Py_ssize_t)sizeof(float) == bits.len / (Py_ssize_t)sizeof(uint16_t);
    for (Py_ssize_t i = 0; fits && i < bits.len / (Py_ssize_t)sizeof(uint16_t); ++i) {
        uint16_t half = half_of_float(((float *)values.buf)[i]);
        ((uint16_t *)bits.buf)[i] = half;
        ((float *)values.buf)[i] = float_of_half(half);
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&bits);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "values and bits are not of the same length");
        return NULL;
    }
    Py_RETURN_NONE;
}
