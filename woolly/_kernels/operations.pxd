"""What a program is recorded as: operations on buffers, the stages between barriers, and a run of them."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t

from woolly._kernels.dispatch cimport Activations
from woolly._kernels.experts cimport MAX_PARTS, ExpertPlan, woolly_tasks
from woolly._kernels.kernels cimport woolly_kernels
from woolly._kernels.matmul cimport MatrixView

cdef extern from "team.h" nogil:
    ctypedef struct woolly_team:
        pass

# What is before MATMUL works on one row at a time
cdef enum:
    EMBED
    RMSNORM
    ADD
    SCALE
    GLU
    QUANTIZE
    ROPE_STORE
    SELECT
    LAYERNORM
    BIAS
    ACTIVATE
    SOFTCAP
    ROUTE
    GATHER
    EXPERT_BIAS
    COMBINE
    MATMUL
    ATTENTION
    PLAN
    EXPERT_MATMUL

cdef enum:
    LOGITS = -1                # the output of the head is the caller's array

cdef struct Buffer:
    float *data                # (max_tokens, stride), of which width are used; rows a pair: max_tokens * pairs
    int64_t width
    int64_t stride
    int64_t pairs              # of a token with its experts, each with a row here; 0: one row a token
    ExpertPlan *plan           # where the rows of pairs are
    uint8_t *q16                # records of quantised activations, NULL where no matmul wants them; with int8 of 8 bits
    int64_t q16_stride
    uint16_t *bf16              # the same for tiles of bf16 (pairs: by the plan), or rounded to bf16 (no pairs)
    bint for_exact              # matmuls that are exact whatever the others are: of experts and routers

cdef struct Part:
    MatrixView m
    const MatrixView *each     # the matrices of all experts, where those are multiplied
    int out

cdef struct Op:
    int kind
    bint outputs_only          # rows are the tokens whose logits are wanted, not all tokens
    bint quantize_out          # a matmul reads the output quantised, or rounded to bf16
    bint accumulate            # out += instead of out =
    bint exact                 # a matmul, whatever the others are
    int x
    int y
    int z
    int out
    int activation
    int pairing
    int n_parts
    int64_t pairs              # of a token, where it works on those
    ExpertPlan *plan           # of the pairs that a row or matmul is about
    bint gather_floats         # as float32, not only quantised
    int64_t layer
    int64_t n_heads
    int64_t n_kv_heads
    int64_t head_dim
    int64_t n_rot
    int64_t width              # of the logits, where they are capped
    int64_t window
    float eps
    float factor
    float softcap
    const float *weight
    const float *weight2
    const float *cos
    const float *sin
    MatrixView table           # of an embedding
    Part parts[MAX_PARTS]

# Operations [begin, end) between two barriers: token by token, or one matmul, or one attention
cdef struct Stage:
    int begin
    int end

cdef struct Span:
    int64_t t0                 # first token in the batch
    int64_t n
    int64_t pos                # its position in the sequence
    uint8_t *k
    uint8_t *v
    int64_t layer_bytes
    int64_t head_bytes
    int64_t padded
    int kv_type

cdef struct Run:
    const woolly_kernels *kernels
    Activations how
    const int32_t *tokens
    const int32_t *positions
    const int32_t *span_of     # of each token
    const int32_t *outputs     # rows of the batch whose logits are wanted
    int64_t n_tokens
    int64_t n_outputs
    int64_t n_spans
    const Span *spans
    float *logits
    const Buffer *buffers
    const Op *ops
    const Stage *stages
    int n_stages
    woolly_tasks *tasks        # two a stage
    woolly_team team
    float *scratch             # (n_threads, scratch_floats)
    int64_t scratch_floats
    float *partial
    bint split
    double *times              # of each stage, or NULL
    volatile int *asked        # of the caller's Stop, or NULL
    double deadline_s          # 0 for none
    double checked_s           # when signals were last looked for
    double before_s            # when the last stage ended


cdef inline int64_t n_rows(const Run *run, const Op *op) noexcept nogil:
    return (run.n_outputs if op.outputs_only else run.n_tokens) * max(<int64_t>1, op.pairs)


cdef void work_stage(Run *run, int32_t turn, float *scratch, int n_threads) noexcept nogil
cdef int64_t chunk_weights(const Op *op, int64_t i, int n_threads, const uint8_t **weights) noexcept nogil
