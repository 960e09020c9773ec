/* Layout of GGUF's blocks (block_q4_0 to block_iq4_xs of llama.cpp's ggml-common.h, dequantize_row_* of
 * ggml-quants.c). Fields are little-endian bytes; nothing here depends on alignment or on the host's order. */
#include "blocks.h"

#include <math.h>
#include <string.h>

#define HALF_MAX 0x7BFF
#define HALF_INFINITY 0x7C00

const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static const block_format formats[] = {
    {Q4_0, 32, 18, 32, -8, 7, NULL, 0, false, 0, 0, 0, false, 1, 0},
    {Q4_1, 32, 20, 32, 0, 15, NULL, 0, false, 0, 0, 0, true, 1, 0},
    {Q5_0, 32, 22, 32, -16, 15, NULL, 0, false, 0, 0, 0, false, 1, 0},
    {Q5_1, 32, 24, 32, 0, 31, NULL, 0, false, 0, 0, 0, true, 1, 0},
    {Q8_0, 32, 34, 32, -127, 127, NULL, 0, false, 0, 0, 0, false, 1, 0},
    {IQ4_NL, 32, 18, 32, 0, 15, iq4_values, 0, false, 0, 0, 0, false, 1, 0},
    {Q2_K, 256, 84, 16, 0, 3, NULL, 0, false, 0, 15, 15, false, 1, 0},
    {Q3_K, 256, 110, 16, -4, 3, NULL, 0, false, -32, 31, 0, false, 1, 0},
    {Q4_K, 256, 144, 32, 0, 15, NULL, 0, false, 0, 63, 63, false, 1, 0},
    {Q5_K, 256, 176, 32, 0, 31, NULL, 0, false, 0, 63, 63, false, 1, 0},
    {Q6_K, 256, 210, 16, -32, 31, NULL, 0, false, -128, 127, 0, false, 1, 0},
    {IQ4_XS, 256, 136, 32, 0, 15, iq4_values, 0, false, -32, 31, 0, false, 1, 0},
    {IQ3_S, 256, 110, 32, 0, 0, NULL, 4, false, 0, 15, 0, false, 2, 1},
    {IQ3_XXS, 256, 98, 32, 0, 0, NULL, 4, true, 0, 15, 0, false, 0.5F, 0.25F},
    {IQ2_S, 256, 82, 16, 0, 0, NULL, 8, false, 0, 15, 0, false, 0.25F, 0.125F},
};

const block_format *block_format_of(int type) {
    for (size_t i = 0; i < sizeof formats / sizeof *formats; ++i) {
        if (formats[i].type == type) {
            return &formats[i];
        }
    }
    return NULL;
}

uint16_t half_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) {
        return sign | 0x7E00;
    }
    if (magnitude >= 0x477FF000) { /* 65520 and more round to infinity */
        return sign | HALF_INFINITY;
    }
    int shift = 13;
    if (magnitude < 0x38800000) { /* below 2^-14: steps of 2^-24 */
        int exponent = (int)(magnitude >> 23);
        if (exponent < 102) { /* below 2^-25 */
            return sign;
        }
        shift = 126 - exponent;
        magnitude = (magnitude & 0x7FFFFF) | 0x800000;
    } else {
        magnitude -= (uint32_t)(127 - 15) << 23;
    }
    uint32_t rest = magnitude & ((1U << shift) - 1), middle = 1U << (shift - 1);
    uint32_t half = magnitude >> shift;
    half += rest > middle || (rest == middle && (half & 1));
    return (uint16_t)(sign | half);
}

float float_of_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3FF;
    uint32_t bits;
    float value;
    if (exponent == 0) {
        value = (float)mantissa * 0x1p-24F;
        memcpy(&bits, &value, sizeof bits);
        bits |= sign;
    } else if (exponent == 31) {
        bits = sign | 0x7F800000 | mantissa << 13;
    } else {
        bits = sign | (exponent + 127 - 15) << 23 | mantissa << 13;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t finite_half(uint16_t half) {
    if ((half & HALF_INFINITY) != HALF_INFINITY) {
        return half;
    }
    return half & 0x3FF ? 0 : (uint16_t)((half & 0x8000) | HALF_MAX);
}

static uint16_t load16(const uint8_t *at) {
    return (uint16_t)(at[0] | at[1] << 8);
}

static void store16(uint8_t *at, unsigned value) {
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

static float load_half(const uint8_t *at) {
    return float_of_half(finite_half(load16(at)));
}

/* Where d stands in a 256-wide block; d_minimum follows it. */
static int d_offset(int type) {
    return type == Q2_K ? 80 : type == Q3_K ? 108 : type == Q6_K ? 208 : 0;
}

static void read_6bit_pairs(const uint8_t *packed, block_scales *out) {
    for (int i = 0; i < 4; ++i) {
        out->scale[i] = packed[i] & 63;
        out->minimum[i] = packed[i + 4] & 63;
        out->scale[i + 4] = (packed[i + 8] & 15) | (packed[i] >> 6) << 4;
        out->minimum[i + 4] = packed[i + 8] >> 4 | (packed[i + 4] >> 6) << 4;
    }
}

static void write_6bit_pairs(uint8_t *packed, const block_scales *scales) {
    for (int i = 0; i < 4; ++i) {
        int scale = scales->scale[i + 4], minimum = scales->minimum[i + 4];
        packed[i] = (uint8_t)(scales->scale[i] | (scale >> 4) << 6);
        packed[i + 4] = (uint8_t)(scales->minimum[i] | (minimum >> 4) << 6);
        packed[i + 8] = (uint8_t)((scale & 15) | (minimum & 15) << 4);
    }
}

static int nibble(const uint8_t *packed, int i) {
    return packed[i / 2] >> 4 * (i % 2) & 15;
}

static void write_nibbles(uint8_t *packed, const int *values, int n) {
    for (int i = 0; i < n; i += 2) {
        packed[i / 2] = (uint8_t)((values[i] & 15) | (values[i + 1] & 15) << 4);
    }
}

static void read_halves(const block_format *format, const uint8_t *blocks, int n, block_scales *out) {
    for (int i = 0; i < n / format->width; ++i) {
        const uint8_t *block = blocks + (size_t)i * format->bytes;
        out->scale[i] = finite_half(load16(block));
        out->minimum[i] = format->half_minimum ? finite_half(load16(block + 2)) : 0;
    }
}

void blocks_read_scales(const block_format *format, const uint8_t *blocks, int n, block_scales *out) {
    memset(out, 0, sizeof *out);
    if (format->width < SUPER_BLOCK) {
        read_halves(format, blocks, n, out);
        return;
    }
    const uint8_t *d = blocks + d_offset(format->type);
    out->d = load_half(d);
    out->d_minimum = format->high_minimum ? load_half(d + 2) : 0;
    const uint8_t *q = blocks;
    for (int i = 0; i < SUPER_BLOCK / format->group; ++i) {
        switch (format->type) {
        case Q2_K:
            out->scale[i] = q[i] & 15;
            out->minimum[i] = q[i] >> 4;
            break;
        case Q3_K:
            out->scale[i] = ((q[96 + i % 8] >> 4 * (i / 8) & 15) | (q[104 + i % 4] >> 2 * (i / 4) & 3) << 4) - 32;
            break;
        case Q6_K:
            out->scale[i] = (int8_t)q[192 + i];
            break;
        case IQ4_XS:
            out->scale[i] = (nibble(q + 4, i) | (load16(q + 2) >> 2 * i & 3) << 4) - 32;
            break;
        case IQ3_S:
            out->scale[i] = nibble(q + 106, i);
            break;
        case IQ3_XXS:
            out->scale[i] = q[66 + 4 * i + 3] >> 4;
            break;
        case IQ2_S:
            out->scale[i] = nibble(q + 74, i);
            break;
        default:
            break;
        }
    }
    if (format->group == 32 && format->high_minimum) {
        read_6bit_pairs(blocks + 4, out);
    }
}

static void write_q3_scales(uint8_t *packed, const int *scale) {
    memset(packed, 0, 12);
    for (int i = 0; i < 16; ++i) {
        int code = scale[i] + 32;
        packed[i % 8] |= (uint8_t)((code & 15) << 4 * (i / 8));
        packed[8 + i % 4] |= (uint8_t)((code >> 4) << 2 * (i / 4));
    }
}

static void write_iq4_scales(uint8_t *packed, const int *scale) {
    unsigned high = 0;
    int low[8];
    for (int i = 0; i < 8; ++i) {
        low[i] = (scale[i] + 32) & 15;
        high |= (unsigned)(scale[i] + 32) >> 4 << 2 * i;
    }
    store16(packed, high);
    write_nibbles(packed + 2, low, 8);
}

static void write_scale_codes(const block_format *format, uint8_t *block, const block_scales *scales) {
    switch (format->type) {
    case Q2_K:
        for (int i = 0; i < 16; ++i) {
            block[i] = (uint8_t)(scales->scale[i] | scales->minimum[i] << 4);
        }
        break;
    case Q3_K:
        write_q3_scales(block + 96, scales->scale);
        break;
    case Q4_K:
    case Q5_K:
        write_6bit_pairs(block + 4, scales);
        break;
    case Q6_K:
        for (int i = 0; i < 16; ++i) {
            block[192 + i] = (uint8_t)scales->scale[i];
        }
        break;
    case IQ4_XS:
        write_iq4_scales(block + 2, scales->scale);
        break;
    case IQ3_S:
        write_nibbles(block + 106, scales->scale, 8);
        break;
    case IQ3_XXS:
        for (int i = 0; i < 8; ++i) {
            uint8_t *top = block + 66 + 4 * i + 3;
            *top = (uint8_t)((*top & 15) | scales->scale[i] << 4);
        }
        break;
    case IQ2_S:
        write_nibbles(block + 74, scales->scale, 16);
        break;
    default:
        break;
    }
}

void blocks_write_scales(const block_format *format, uint8_t *blocks, int n, const block_scales *scales) {
    if (format->width == SUPER_BLOCK) {
        uint8_t *d = blocks + d_offset(format->type);
        store16(d, half_of_float(scales->d));
        if (format->high_minimum) {
            store16(d + 2, half_of_float(scales->d_minimum));
        }
        write_scale_codes(format, blocks, scales);
        return;
    }
    for (int i = 0; i < n / format->width; ++i) {
        uint8_t *block = blocks + (size_t)i * format->bytes;
        store16(block, (unsigned)scales->scale[i]);
        if (format->half_minimum) {
            store16(block + 2, (unsigned)scales->minimum[i]);
        }
    }
}

float scale_value(const block_format *format, const block_scales *scales, int code) {
    if (format->width < SUPER_BLOCK) {
        return float_of_half((uint16_t)code);
    }
    return scales->d * (format->step * (float)code + format->offset);
}

float minimum_value(const block_format *format, const block_scales *scales, int code) {
    if (format->half_minimum) {
        return -float_of_half((uint16_t)code); /* these blocks add it */
    }
    return scales->d_minimum * (float)code;
}

static int half_times(int code, float factor) {
    return finite_half(half_of_float(float_of_half((uint16_t)code) * factor));
}

static int clamp(int value, int low, int high) {
    return value < low ? low : value > high ? high : value;
}

/* c with c + shift nearest to factor * (code + shift), at least one step away. */
static int code_times(int code, float factor, float shift, int low, int high) {
    float from = (float)code + shift, to = from * factor;
    int found = (int)floorf(to - shift + 0.5F);
    if (found == code && factor != 1) {
        found += (factor > 1) == (from >= 0) ? 1 : -1;
    }
    return clamp(found, low, high);
}

int scale_times(const block_format *format, int code, float factor) {
    if (format->width < SUPER_BLOCK) {
        return half_times(code, factor);
    }
    return code_times(code, factor, format->offset / format->step, format->low_scale, format->high_scale);
}

int minimum_times(const block_format *format, int code, float factor) {
    if (format->half_minimum) {
        return half_times(code, factor);
    }
    return format->high_minimum ? code_times(code, factor, 0, 0, format->high_minimum) : 0;
}
