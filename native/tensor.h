/* struct ggml_tensor, for those that look into graph nodes. */
#ifndef HOMEINFER_TENSOR_H
#define HOMEINFER_TENSOR_H

#include <stddef.h>
#include <stdint.h>

#define TENSOR_COMPUTE 16 /* GGML_TENSOR_FLAG_COMPUTE */

/* Up to its name, as ggml.h has it; engine code compares tensor_fields() with a real one. */
typedef struct tensor {
    int type;
    void *buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    struct tensor *src[10];
    struct tensor *view_src;
    size_t view_offs;
    void *data;
    char name[64]; /* GGML_MAX_NAME */
} tensor;

#endif
