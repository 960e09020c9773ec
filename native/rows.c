/* Hidden states on their way between devices: float32 to f16, bf16 or blocks of int8 and back, and a look at every
 * number that comes in. Each row by itself, so that rows can be cut apart and put together. */
#include "rows.h"

#include <math.h>

enum { WIRE_F32, WIRE_F16, WIRE_BF16, WIRE_Q8 };

#define BLOCK 32
#define HALF_MOST 65504.0f

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Round to nearest even; |value| <= HALF_MOST. */
static uint16_t half_of(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u;
    const float magnitude = fabsf(value);
    if (magnitude < 6.103515625e-05f) { /* the smallest normal half: multiples of 2^-24 below it */
        return (uint16_t)(sign | (uint32_t)lrintf(magnitude * 16777216.0f));
    }
    const uint32_t all = bits & 0x7FFFFFFFu;
    return (uint16_t)(sign | (((all + 0xFFFu + (all >> 13 & 1u)) >> 13) - (112u << 10)));
}

static float float_of_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = half >> 10 & 0x1Fu, fraction = half & 0x3FFu;
    if (exponent == 0) {
        const float value = (float)fraction * 5.9604644775390625e-08f;
        return sign ? -value : value;
    }
    if (exponent == 31) {
        return float_of(sign | 0x7F800000u | fraction << 13);
    }
    return float_of(sign | (exponent + 112u) << 23 | fraction << 13);
}

static uint16_t bfloat_of(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    /* what would round to infinity stays the largest number there is */
    return (uint16_t)((rounded & 0x7FFFu) == 0x7F80u && isfinite(value) ? rounded - 1 : rounded);
}

static float largest_of(const float *row, size_t n) {
    float most = 0.0f;
    for (size_t i = 0; i < n; ++i) {
        const float magnitude = fabsf(row[i]);
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

static char *pack_f16(const float *row, size_t n, char *out) {
    float scale = 1.0f;
    for (const float most = largest_of(row, n); most / scale > HALF_MOST && scale < 1e38f;) {
        scale *= 2.0f;
    }
    memcpy(out, &scale, sizeof scale);
    out += sizeof scale;
    for (size_t i = 0; i < n; ++i) {
        uint16_t half = isfinite(row[i]) ? half_of(row[i] / scale) : 0x7E00u;
        if (isinf(float_of_half(half) * scale)) { /* rounded up past the largest number there is */
            --half;
        }
        memcpy(out + 2 * i, &half, sizeof half);
    }
    return out + 2 * n;
}

static char *pack_bf16(const float *row, size_t n, char *out) {
    for (size_t i = 0; i < n; ++i) {
        const uint16_t half = isfinite(row[i]) ? bfloat_of(row[i]) : 0x7FC0u;
        memcpy(out + 2 * i, &half, sizeof half);
    }
    return out + 2 * n;
}

static char *pack_q8(const float *row, size_t n, char *out) {
    for (size_t start = 0; start < n; start += BLOCK) {
        const size_t length = n - start < BLOCK ? n - start : BLOCK;
        const float most = largest_of(row + start, length);
        int is_number = isfinite(most);
        for (size_t i = 0; i < length; ++i) {
            is_number &= isfinite(row[start + i]) != 0;
        }
        const float step = fminf(most / 127.0f, HALF_MOST);
        const uint16_t half = is_number ? half_of(step) : 0x7E00u;
        const float scale = float_of_half(half);
        memcpy(out, &half, sizeof half);
        out += sizeof half;
        for (size_t i = 0; i < length; ++i) {
            const float steps = is_number && scale > 0.0f ? row[start + i] / scale : 0.0f;
            out[i] = (char)(signed char)lrintf(fmaxf(-127.0f, fminf(127.0f, steps)));
        }
        out += length;
    }
    return out;
}

static size_t packed_bytes(int kind, size_t width) {
    switch (kind) {
    case WIRE_F16:
        return sizeof(float) + 2 * width;
    case WIRE_BF16:
        return 2 * width;
    case WIRE_Q8:
        return width + 2 * ((width + BLOCK - 1) / BLOCK);
    default:
        return sizeof(float) * width;
    }
}

static void pack_row(int kind, const float *row, size_t width, char *out) {
    switch (kind) {
    case WIRE_F16:
        pack_f16(row, width, out);
        break;
    case WIRE_BF16:
        pack_bf16(row, width, out);
        break;
    case WIRE_Q8:
        pack_q8(row, width, out);
        break;
    default:
        memcpy(out, row, sizeof(float) * width);
    }
}

static void unpack_halves(int kind, const char *in, size_t width, float scale, float *row) {
    for (size_t i = 0; i < width; ++i) {
        uint16_t half;
        memcpy(&half, in + 2 * i, sizeof half);
        row[i] = kind == WIRE_F16 ? float_of_half(half) * scale : float_of((uint32_t)half << 16);
    }
}

static void unpack_row(int kind, const char *in, size_t width, float *row) {
    float scale = 1.0f;
    switch (kind) {
    case WIRE_F16:
        memcpy(&scale, in, sizeof scale);
        unpack_halves(kind, in + sizeof scale, width, scale, row);
        break;
    case WIRE_BF16:
        unpack_halves(kind, in, width, scale, row);
        break;
    case WIRE_Q8:
        for (size_t start = 0; start < width; start += BLOCK) {
            const size_t length = width - start < BLOCK ? width - start : BLOCK;
            uint16_t half;
            memcpy(&half, in, sizeof half);
            in += sizeof half;
            for (size_t i = 0; i < length; ++i) {
                row[start + i] = float_of_half(half) * (float)(signed char)in[i];
            }
            in += length;
        }
        break;
    default:
        memcpy(row, in, sizeof(float) * width);
    }
}

/* Infinities and NaNs have an exponent of ones: no such number is a matter of integers alone. */
static int all_numbers(const char *values, size_t n) {
    uint32_t found = 0;
    for (size_t i = 0; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, values + sizeof bits * i, sizeof bits);
        found |= (uint32_t)((bits & 0x7F800000u) == 0x7F800000u);
    }
    return !found;
}

PyObject *rows_pack(PyObject *module, PyObject *args) {
    PyObject *rows_object, *out = NULL;
    Py_buffer rows;
    int kind, width;
    (void)module;
    if (!PyArg_ParseTuple(args, "iOi", &kind, &rows_object, &width)) {
        return NULL;
    }
    if (PyObject_GetBuffer(rows_object, &rows, PyBUF_SIMPLE) != 0) {
        return NULL;
    }
    const size_t row_bytes = sizeof(float) * (size_t)(width > 0 ? width : 1);
    const size_t n = (size_t)rows.len / row_bytes, each = packed_bytes(kind, (size_t)(width > 0 ? width : 1));
    if (width < 1 || kind < WIRE_F32 || kind > WIRE_Q8 || (size_t)rows.len != n * row_bytes) {
        PyErr_SetString(PyExc_ValueError, "rows of another width");
    } else {
        out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(n * each));
    }
    char *to = out == NULL ? NULL : PyBytes_AsString(out);
    for (size_t i = 0; to != NULL && i < n; ++i) {
        pack_row(kind, (const float *)rows.buf + i * (size_t)width, (size_t)width, to + i * each);
    }
    PyBuffer_Release(&rows);
    return out;
}

static PyObject *unpacked(int kind, const Py_buffer *rows, PyObject *rows_object, size_t n, size_t width) {
    const size_t each = packed_bytes(kind, width);
    PyObject *out = NULL;
    if ((size_t)rows->len != n * each) {
        PyErr_Format(PyExc_ValueError, "%zd bytes for %zu rows of %zu numbers", rows->len, n, width);
        return NULL;
    }
    const char *values = rows->buf;
    if (kind != WIRE_F32) {
        out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(n * width * sizeof(float)));
        if (out == NULL) {
            return NULL;
        }
        char *to = PyBytes_AsString(out);
        values = to;
        for (size_t i = 0; i < n; ++i) {
            unpack_row(kind, (const char *)rows->buf + i * each, width, (float *)(void *)to + i * width);
        }
    }
    if (!all_numbers(values, n * width)) {
        Py_XDECREF(out);
        PyErr_SetString(PyExc_ValueError, "hidden states that are not numbers");
        return NULL;
    }
    if (out == NULL) {
        Py_INCREF(rows_object);
        return rows_object;
    }
    return out;
}

PyObject *rows_unpack(PyObject *module, PyObject *args) {
    PyObject *rows_object, *result = NULL;
    Py_buffer rows;
    int kind, n, width;
    (void)module;
    if (!PyArg_ParseTuple(args, "iOii", &kind, &rows_object, &n, &width)) {
        return NULL;
    }
    if (PyObject_GetBuffer(rows_object, &rows, PyBUF_SIMPLE) != 0) {
        return NULL;
    }
    if (n < 1 || width < 1 || kind < WIRE_F32 || kind > WIRE_Q8) {
        PyErr_SetString(PyExc_ValueError, "no rows");
    } else {
        result = unpacked(kind, &rows, rows_object, (size_t)n, (size_t)width);
    }
    PyBuffer_Release(&rows);
    return result;
}
