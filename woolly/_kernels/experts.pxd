from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t

from woolly._kernels.kernels cimport woolly_kernels
from woolly._kernels.matmul cimport MatrixView

cdef enum:
    MAX_PARTS = 4              # tensors that one matmul operation multiplies by the same activations


cdef extern from "team.h" nogil:
    ctypedef struct woolly_tasks:
        int64_t next
    int64_t next_task(woolly_tasks *tasks)


cdef class PackedExperts:
    cdef readonly str format
    cdef readonly list matrices
    cdef readonly int64_t nbytes
    cdef object _data, _views
    cdef MatrixView *each          # (n_experts,)

# How scores become weights
cdef struct Routing:
    int64_t n_experts
    int64_t n_used
    bint over_chosen               # softmax over the chosen experts' scores, not over all
    bint normalise                 # divide by the sum of the chosen ones' weights
    float scale

# Which expert does what in one batch: a token and one of its slots make a pair, and pairs are sorted by expert
cdef struct ExpertPlan:
    Routing routing
    int64_t n_active               # experts that have any token
    int32_t *begin                 # (n_experts + 1,): pairs [begin[e], begin[e + 1]) go to expert e
    int32_t *expert                # (n_pairs,)
    int32_t *token                 # (n_pairs,)
    int32_t *pair                  # (n_tokens, n_used): the pair of a token's slot
    int32_t *column                # (n_pairs,): of tiles of bf16, each expert's from a new tile on; -1: it has too few
    bint has_tiles                 # any expert has

cdef struct ExpertPart:
    const MatrixView *each         # (n_experts,)
    float *out                     # (n_pairs, out_stride)
    int64_t out_stride

# One matmul of the chosen experts
cdef struct ExpertJob:
    const ExpertPlan *plan
    int n_parts
    int n_digits                   # of xq
    ExpertPart parts[MAX_PARTS]
    const float *x                 # (n_pairs, x_stride), sorted as the pairs
    int64_t x_stride
    const uint8_t *xq
    int64_t xq_stride
    int64_t width                  # of a row of x
    const uint16_t *bf16           # by the plan's columns; NULL: no matmul uses tiles
    const float *token_x           # (n_tokens, …): what an expert with a single token reads; NULL: rows of pairs
    int64_t token_x_stride
    const uint8_t *token_xq
    int64_t token_xq_stride

cdef Routing check_routing(str name, n_experts, n_used, gating, normalise, scale) except *
cdef int64_t plan_bytes(int64_t n_experts, int64_t n_used, int64_t max_tokens) noexcept nogil
cdef void init_plan(ExpertPlan *plan, const Routing *routing, int64_t max_tokens, uint8_t *memory) noexcept nogil
cdef void route_row(const woolly_kernels *kernels, const Routing *routing, float *scores, float *out) noexcept nogil
cdef void plan_experts(ExpertPlan *plan, const float *routes, int64_t stride, int64_t n_tokens) noexcept nogil
cdef bint is_alone(const ExpertPlan *plan, int64_t pair) noexcept nogil
cdef void run_expert_tasks(const woolly_kernels *kernels, const ExpertJob *job, woolly_tasks *tasks,
                           int n_threads) noexcept nogil
cdef void combine_row(const woolly_kernels *kernels, const ExpertPlan *plan, const float *route, int64_t token,
                      float *rows, int64_t stride, int64_t n, float *out) noexcept nogil
