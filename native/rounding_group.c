/* One group of weights (those that share a scale) of LANES rows, rounded with error feedback: the error of a weight is
 * spread over the weights right of it as the factor of the inverse Hessian says (GPTQ, arXiv 2210.17323, section 3.3,
 * there in columns; LDLQ of arXiv 2307.13304 is the same). Every loop over lanes is one vector instruction. */
#include "rounding.h"

#include <string.h>

#define ROUND_MAGIC 12582912.0F /* 1.5 * 2^23: adding it leaves no room for a fraction */

INLINE void clamp_and_round(lanes x, float low, float high) {
    EACH_LANE(r) {
        float v = x[r] > low ? x[r] : low; /* NaN becomes low */
        v = v < high ? v : high;
        x[r] = (v + ROUND_MAGIC) - ROUND_MAGIC;
    }
}

/* x in units of the scale becomes the value of the table nearest to it. */
INLINE void look_up(const int8_t *table, lanes x, int32_t *code) {
    lanes value;
    EACH_LANE(r) {
        value[r] = table[0];
        code[r] = 0;
    }
    for (int i = 0; i < 15; ++i) {
        float middle = 0.5F * (float)(table[i] + table[i + 1]), step = (float)(table[i + 1] - table[i]);
        EACH_LANE(r) {
            value[r] += x[r] > middle ? step : 0;
            code[r] += x[r] > middle;
        }
    }
    memcpy(x, value, sizeof value);
}

HOT void round_group_scalar(const task *job, int at, const lanes *weights, const float *scale, const float *minimum,
                            rounded *out) {
    const block_format *format = job->format;
    const int n = format->group, lowest = format->lowest;
    lanes w[GROUP_MAX], inverse;
    memcpy(w, weights, (size_t)n * sizeof *w);
    EACH_LANE(r) {
        inverse[r] = scale[r] != 0 ? 1 / scale[r] : 0;
        out->loss[r] = 0;
    }
    for (int j = 0; j < n; ++j) {
        const float *restrict upper = job->upper + (size_t)(at + j) * SUPER_BLOCK + at;
        const float weight = job->inverse[at + j];
        lanes x, e;
        EACH_LANE(r) {
            x[r] = (w[j][r] + minimum[r]) * inverse[r];
        }
        if (format->table) {
            look_up(format->table, x, out->code[j]);
        } else {
            clamp_and_round(x, (float)lowest, (float)format->highest);
            EACH_LANE(r) {
                out->code[j][r] = (int32_t)x[r] - lowest;
            }
        }
        EACH_LANE(r) {
            e[r] = (w[j][r] - (scale[r] * x[r] - minimum[r])) * weight;
            out->error[j][r] = e[r];
            out->loss[r] += e[r] * e[r];
        }
        for (int k = j + 1; k < n; ++k) {
            EACH_LANE(r) {
                w[k][r] -= e[r] * upper[k];
            }
        }
    }
}

/* Feedback through `half` weights of one vector that start at column `at`: error of w when it is rounded to value. */
INLINE void solve(const task *job, int at, int half, const lanes *w, const lanes *value, lanes *error) {
    for (int i = 0; i < half; ++i) {
        lanes rest;
        EACH_LANE(r) {
            rest[r] = w[i][r] - value[i][r];
        }
        for (int k = 0; k < i; ++k) {
            const float upper = job->upper[(size_t)(at + k) * SUPER_BLOCK + at + i];
            EACH_LANE(r) {
                rest[r] -= error[k][r] * upper;
            }
        }
        EACH_LANE(r) {
            error[i][r] = rest[r] * job->inverse[at + i];
        }
    }
}

/* For every half: the sum of its squared errors, and twice (or once) the errors' part that meets the other half's. */
typedef struct {
    lanes loss[PATTERNS_MAX];
    lanes cross[PATTERNS_MAX][HALF_VECTOR];
} half_table;

INLINE void scaled(const float *pattern, int half, const lanes *scale, lanes *out) {
    for (int i = 0; i < half; ++i) {
        EACH_LANE(r) {
            out[i][r] = pattern[i] * scale[i][r];
        }
    }
}

INLINE void tabulate_first(const task *job, int at, int half, const lanes *w, const lanes *scale, half_table *out) {
    static const lanes zero[HALF_VECTOR];
    for (int p = 0; p < job->grid.n_first; ++p) {
        lanes value[HALF_VECTOR], error[HALF_VECTOR], spread[HALF_VECTOR], moved[HALF_VECTOR], sum = {0};
        scaled(job->grid.first + p * half, half, scale, value);
        solve(job, at, half, w, value, error);
        memset(spread, 0, sizeof spread);
        for (int i = 0; i < half; ++i) {
            for (int k = 0; k < half; ++k) {
                const float upper = job->upper[(size_t)(at + k) * SUPER_BLOCK + at + half + i];
                EACH_LANE(r) {
                    spread[i][r] += error[k][r] * upper;
                }
            }
        }
        solve(job, at + half, half, spread, zero, moved);
        for (int i = 0; i < half; ++i) {
            EACH_LANE(r) {
                sum[r] += error[i][r] * error[i][r] + moved[i][r] * moved[i][r];
                out->cross[p][i][r] = 2 * moved[i][r];
            }
        }
        memcpy(out->loss[p], sum, sizeof sum);
    }
}

INLINE void tabulate_second(const task *job, int at, int half, const lanes *w, const lanes *scale, half_table *out) {
    for (int q = 0; q < job->grid.n_second; ++q) {
        lanes value[HALF_VECTOR], sum = {0};
        scaled(job->grid.second + q * half, half, scale, value);
        solve(job, at, half, w, value, out->cross[q]);
        for (int i = 0; i < half; ++i) {
            EACH_LANE(r) {
                sum[r] += out->cross[q][i][r] * out->cross[q][i][r];
            }
        }
        memcpy(out->loss[q], sum, sizeof sum);
    }
}

/* The entry of least loss. The second half's errors are v - z, v of its own target and z of what the first half
 * spreads, so an entry's loss is (|e|^2 + |z|^2) + |v|^2 - 2 v z: few operations once the halves are tabulated. */
INLINE void search(const grid *entries, int half, const half_table *first, const half_table *second, int32_t *best) {
    lanes least, found;
    EACH_LANE(r) {
        least[r] = 3e38F;
        found[r] = 0;
    }
    for (int t = 0; t < entries->n; ++t) {
        const int p = entries->first_of[t], q = entries->second_of[t];
        const float entry = (float)t;
        lanes loss;
        EACH_LANE(r) {
            loss[r] = first->loss[p][r] + second->loss[q][r];
        }
        for (int i = 0; i < half; ++i) {
            EACH_LANE(r) {
                loss[r] -= first->cross[p][i][r] * second->cross[q][i][r];
            }
        }
        EACH_LANE(r) {
            found[r] = loss[r] < least[r] ? entry : found[r];
            least[r] = loss[r] < least[r] ? loss[r] : least[r];
        }
    }
    EACH_LANE(r) {
        best[r] = (int32_t)found[r];
    }
}

/* Signs of eight weights, those of the compensated weights; where they must be even, the cheapest of them gives in. */
INLINE void choose_signs(const task *job, int at, const lanes *w, int32_t *signs) {
    lanes least;
    int32_t odd[LANES] = {0}, cheapest[LANES] = {0};
    EACH_LANE(r) {
        least[r] = 3e38F;
        signs[r] = 0;
    }
    for (int i = 0; i < 8; ++i) {
        EACH_LANE(r) {
            const int negative = w[i][r] < 0;
            const float cost = (negative ? -w[i][r] : w[i][r]) * job->inverse[at + i];
            signs[r] |= negative << i;
            odd[r] ^= negative;
            cheapest[r] = cost < least[r] ? 1 << i : cheapest[r];
            least[r] = cost < least[r] ? cost : least[r];
        }
    }
    EACH_LANE(r) {
        signs[r] ^= job->format->even_signs && odd[r] ? cheapest[r] : 0;
    }
}

/* The last four of eight signs, anew: the first four weights' errors have moved these. */
INLINE void choose_late_signs(const lanes *w, int32_t *signs) {
    EACH_LANE(r) {
        signs[r] &= 15;
    }
    for (int i = 0; i < 4; ++i) {
        EACH_LANE(r) {
            signs[r] |= (w[i][r] < 0) << (4 + i);
        }
    }
}

/* Errors of one whole vector at its chosen entry, spread over the rest of the group. */
INLINE void settle(const task *job, int at, int j, int half, lanes *w, const lanes *scale, const int32_t *best,
                   rounded *out) {
    const grid *entries = &job->grid;
    const int n = job->format->group;
    for (int i = 0; i < 2 * half; ++i) {
        const float *upper = job->upper + (size_t)(at + j + i) * SUPER_BLOCK + at;
        const float weight = job->inverse[at + j + i];
        lanes e;
        EACH_LANE(r) {
            const int t = best[r];
            const float value = i < half ? entries->first[entries->first_of[t] * half + i]
                                         : entries->second[entries->second_of[t] * half + i - half];
            e[r] = (w[j + i][r] - value * scale[i][r]) * weight;
            out->error[j + i][r] = e[r];
            out->loss[r] += e[r] * e[r];
        }
        for (int k = j + i + 1; k < n; ++k) {
            EACH_LANE(r) {
                w[k][r] -= e[r] * upper[k];
            }
        }
    }
}

INLINE void round_vectors(const task *job, int at, int half, const lanes *weights, const float *scale, rounded *out) {
    const int n = job->format->group, dim = 2 * half;
    lanes w[GROUP_MAX], signed_scale[2 * HALF_VECTOR];
    half_table first, second;
    memcpy(w, weights, (size_t)n * sizeof *w);
    memset(out->loss, 0, sizeof out->loss);
    for (int j = 0; j < n; j += dim) {
        if (j % 8 == 0) {
            choose_signs(job, at + j, w + j, out->sign[j / 8]);
        } else if (!job->format->even_signs) {
            choose_late_signs(w + j, out->sign[j / 8]);
        }
        for (int i = 0; i < dim; ++i) {
            EACH_LANE(r) {
                signed_scale[i][r] = out->sign[j / 8][r] >> (j + i) % 8 & 1 ? -scale[r] : scale[r];
            }
        }
        tabulate_first(job, at + j, half, w + j, signed_scale, &first);
        tabulate_second(job, at + j + half, half, w + j + half, signed_scale + half, &second);
        search(&job->grid, half, &first, &second, out->code[j]);
        settle(job, at, j, half, w, signed_scale, out->code[j], out);
    }
}

/* The lengths are constants for the compiler: loops over them become straight code. */
HOT void round_group_grid(const task *job, int at, const lanes *weights, const float *scale, rounded *out) {
    if (job->grid.half == 2) {
        round_vectors(job, at, 2, weights, scale, out);
    } else {
        round_vectors(job, at, HALF_VECTOR, weights, scale, out);
    }
}
