/* Rounding of weights to GGUF's blocks with error feedback, see rounding.c. */
#ifndef HOMEINFER_ROUNDING_H
#define HOMEINFER_ROUNDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "blocks.h"

#define LANES 16 /* rows that are rounded side by side */
#define GROUP_MAX 32
#define HALF_VECTOR 4    /* weights in half a grid vector, at most */
#define PATTERNS_MAX 128 /* different halves of a grid's vectors, at most */

/* HOT functions are compiled for several processors, INLINE ones become part of them. EACH_LANE keeps GCC from
 * unrolling the loop before it can make one vector instruction of it: that alone is a factor of 5. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3", "no-tree-slp-vectorize", "no-trapping-math", "no-math-errno")
#define EACH_LANE(r) _Pragma("GCC unroll 1") for (int r = 0; r < LANES; ++r)
#else
#define EACH_LANE(r) for (int r = 0; r < LANES; ++r)
#endif
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define HOT __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define HOT
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#if defined(_MSC_VER)
#define restrict __restrict
#endif

typedef float lanes[LANES];

/* A grid's vectors, cut into halves: entry i is first[first_of[i]] then second[second_of[i]]. */
typedef struct {
    int n, n_first, n_second, half;
    const float *first, *second; /* [n_first or n_second, half] */
    const uint8_t *first_of, *second_of; /* ascending by first_of */
    const uint16_t *code; /* the index that the file format gives to the entry */
} grid;

/* What is the same for every row of a super-block. upper is [n, SUPER_BLOCK], inverse [n]. */
typedef struct {
    const block_format *format;
    int n;
    const float *upper, *inverse;
    const float (*factors)[2]; /* what scale and minimum are multiplied by, to try */
    int n_factors;
    grid grid;
} task;

/* A group of LANES rows, rounded: codes and errors per weight (codes of a grid: the first of each vector). */
typedef struct {
    lanes error[GROUP_MAX];
    int32_t code[GROUP_MAX][LANES];
    int32_t sign[GROUP_MAX / 8][LANES];
    lanes loss;
} rounded;

/* Rounds the group of weights [at, at + format->group) to given scales; `weights` are the group's. */
void round_group_scalar(const task *job, int at, const lanes *weights, const float *scale, const float *minimum,
                        rounded *out);
void round_group_grid(const task *job, int at, const lanes *weights, const float *scale, rounded *out);

PyObject *round_super_block(PyObject *module, PyObject *args);
PyObject *half_bits(PyObject *module, PyObject *args);

#endif
