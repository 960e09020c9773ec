/* Codes into GGUF's blocks, see blocks.h. The other fields of a block stay as they are. */
#include "blocks.h"

#include <string.h>

/* Two bits of each of 256 codes: four weights 32 apart share a byte. */
static void write_2bit(uint8_t *out, const uint16_t *codes, int shift) {
    for (int i = 0; i < 64; ++i) {
        const uint16_t *q = codes + i / 32 * 128 + i % 32;
        int byte = 0;
        for (int part = 0; part < 4; ++part) {
            byte |= (q[32 * part] >> shift & 3) << 2 * part;
        }
        out[i] = (uint8_t)byte;
    }
}

/* Four bits of each of `pairs * 2 * span` codes: two weights `span` apart share a byte. */
static void write_4bit(uint8_t *out, const uint16_t *codes, int pairs, int span) {
    for (int i = 0; i < pairs * span; ++i) {
        const uint16_t *q = codes + i / span * 2 * span + i % span;
        out[i] = (uint8_t)((q[0] & 15) | (q[span] & 15) << 4);
    }
}

/* One bit of each of 256 codes: eight weights 32 apart share a byte. */
static void write_1bit(uint8_t *out, const uint16_t *codes, int shift) {
    for (int i = 0; i < 32; ++i) {
        int byte = 0;
        for (int part = 0; part < 8; ++part) {
            byte |= (codes[32 * part + i] >> shift & 1) << part;
        }
        out[i] = (uint8_t)byte;
    }
}

static void write_small_block(int type, uint8_t *block, const uint16_t *codes) {
    if (type == Q8_0) {
        for (int i = 0; i < 32; ++i) {
            block[2 + i] = (uint8_t)(codes[i] - 127);
        }
        return;
    }
    uint8_t *at = block + (type == Q4_1 || type == Q5_1 ? 4 : 2);
    if (type == Q5_0 || type == Q5_1) {
        memset(at, 0, 4);
        for (int i = 0; i < 32; ++i) {
            at[i / 8] |= (uint8_t)((codes[i] >> 4) << i % 8);
        }
        at += 4;
    }
    write_4bit(at, codes, 1, 16);
}

static void write_q6(uint8_t *block, const uint16_t *codes) {
    for (int half = 0; half < 2; ++half) {
        write_4bit(block + 64 * half, codes + 128 * half, 1, 64);
    }
    write_2bit(block + 128, codes, 4);
}

static void write_iq3_s(uint8_t *block, const uint16_t *codes, const uint8_t *signs) {
    memset(block + 66, 0, 8);
    for (int i = 0; i < 64; ++i) {
        block[2 + i] = (uint8_t)codes[i];
        block[66 + i / 8] |= (uint8_t)((codes[i] >> 8) << i % 8);
    }
    memcpy(block + 74, signs, 32);
}

/* Seven signs of eight are kept: the last follows from an even number of minuses. */
static void write_iq3_xxs(uint8_t *block, const uint16_t *codes, const uint8_t *signs) {
    for (int i = 0; i < 64; ++i) {
        block[2 + i] = (uint8_t)codes[i];
    }
    for (int i = 0; i < 8; ++i) {
        uint8_t *word = block + 66 + 4 * i;
        uint32_t bits = (uint32_t)(word[3] >> 4) << 28;
        for (int part = 0; part < 4; ++part) {
            bits |= (uint32_t)(signs[4 * i + part] & 127) << 7 * part;
        }
        for (int byte = 0; byte < 4; ++byte) {
            word[byte] = (uint8_t)(bits >> 8 * byte);
        }
    }
}

static void write_iq2_s(uint8_t *block, const uint16_t *codes, const uint8_t *signs) {
    memset(block + 66, 0, 8);
    for (int i = 0; i < 32; ++i) {
        block[2 + i] = (uint8_t)codes[i];
        block[66 + i / 4] |= (uint8_t)((codes[i] >> 8) << 2 * (i % 4));
    }
    memcpy(block + 34, signs, 32);
}

void blocks_write_codes(const block_format *format, uint8_t *blocks, int n, const uint16_t *codes,
                        const uint8_t *signs) {
    switch (format->type) {
    case Q2_K:
        write_2bit(blocks + 16, codes, 0);
        break;
    case Q3_K:
        write_1bit(blocks, codes, 2);
        write_2bit(blocks + 32, codes, 0);
        break;
    case Q4_K:
        write_4bit(blocks + 16, codes, 4, 32);
        break;
    case Q5_K:
        write_1bit(blocks + 16, codes, 4);
        write_4bit(blocks + 48, codes, 4, 32);
        break;
    case Q6_K:
        write_q6(blocks, codes);
        break;
    case IQ4_XS:
        write_4bit(blocks + 8, codes, 8, 16);
        break;
    case IQ3_S:
        write_iq3_s(blocks, codes, signs);
        break;
    case IQ3_XXS:
        write_iq3_xxs(blocks, codes, signs);
        break;
    case IQ2_S:
        write_iq2_s(blocks, codes, signs);
        break;
    default:
        for (int i = 0; i < n / format->width; ++i) {
            write_small_block(format->type, blocks + (size_t)i * format->bytes, codes + 32 * i);
        }
    }
}
