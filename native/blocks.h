/* GGUF's blocks of quantized weights as data: where scales and codes stand, what a scale code is worth. */
#ifndef HOMEINFER_BLOCKS_H
#define HOMEINFER_BLOCKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SUPER_BLOCK 256 /* weights that are rounded together: one 256-wide block or up to eight 32-wide ones */
#define GROUPS_MAX 16   /* parts of a super-block that have a scale of their own */

/* enum ggml_type */
enum {
    Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
    IQ3_XXS = 18, IQ4_NL = 20, IQ3_S = 21, IQ2_S = 22, IQ4_XS = 23,
};

typedef struct {
    int type;
    int width, bytes;          /* weights and bytes of a block */
    int group;                 /* weights that share a scale */
    int lowest, highest;       /* multiples of the scale that codes stand for, if neither of the next two */
    const int8_t *table;       /* what codes stand for, IQ4's */
    int vector;                /* weights that one index into a grid stands for, or 0 */
    bool even_signs;           /* an even number of each eight weights is negative */
    int low_scale, high_scale; /* codes of scales; both 0: a block has a half of its own */
    int high_minimum;          /* codes of what is subtracted start at 0; 0: nothing is, or it is a half too */
    bool half_minimum;
    float step, offset; /* a scale is d * (step * code + offset) */
} block_format;

/* The scales of a super-block. Codes of 32-wide types are the bits of halves, d and d_minimum unused. */
typedef struct {
    float d, d_minimum;
    int scale[GROUPS_MAX], minimum[GROUPS_MAX];
} block_scales;

extern const int8_t iq4_values[16];

/* NULL for a type that is not here. */
const block_format *block_format_of(int type);

/* Nearest half, ties to even, too large ones and infinities to infinity, as the hardware's conversion does. */
uint16_t half_of_float(float value);
float float_of_half(uint16_t half);

/* Blocks of n weights (up to SUPER_BLOCK, a multiple of the format's width). A d that is Inf or NaN is read as the
 * largest finite half or as 0, and written so. */
void blocks_read_scales(const block_format *format, const uint8_t *blocks, int n, block_scales *out);
void blocks_write_scales(const block_format *format, uint8_t *blocks, int n, const block_scales *scales);

float scale_value(const block_format *format, const block_scales *scales, int code);
float minimum_value(const block_format *format, const block_scales *scales, int code);

/* The code whose value is nearest to `factor` times that of `code`: another one whenever the factor is not 1, as long
 * as there is one. */
int scale_times(const block_format *format, int code, float factor);
int minimum_times(const block_format *format, int code, float factor);

/* Codes count from 0 (lowest), one per weight; of grid types one per vector, and signs one byte per eight weights. */
void blocks_write_codes(const block_format *format, uint8_t *blocks, int n, const uint16_t *codes,
                        const uint8_t *signs);

#endif
