"""Mixtures of experts: which experts a token goes to, and the matmuls of those alone.

Owns routing (the best experts of a token and their weights), the plan of a batch (its pairs of token and expert, sorted
by expert, so that each expert is one matmul over its tokens) and the tasks cut from it. What runs when, on which
buffers, is `Program`'s business. A token's result depends on its own scores and experts, not on the tokens beside it.
"""

import numpy as np

from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memset

from woolly._kernels.dispatch cimport active
from woolly._kernels.kernels cimport (
    WOOLLY_BF16_COLS, WOOLLY_BF16_LEAST_COLS, WOOLLY_BF16_ROW_STEP, WOOLLY_ROW_STEP, woolly_format, woolly_kernels,
    woolly_matmul_args,
)
from woolly._kernels.matmul cimport MatrixView, PackedMatrix

from woolly._kernels.matmul import aligned_empty

GATINGS = ("softmax", "softmax_chosen")


cdef class PackedExperts:
    """The matrices of a layer's experts, one packed tensor.

    Parameters
    ----------
    n_experts, n_rows, n_cols : int
        Shape of the tensor: each expert's matrix is (n_rows, n_cols).
    format : str
        A format with kernels, see `kernel_formats`.

    Attributes
    ----------
    matrices : list of PackedMatrix
        Each expert's, in the one memory of all.
    nbytes : int
        Bytes of the packed tensor, padding of each matrix to whole groups of 16 rows included.
    """

    def __init__(self, n_experts, n_rows, n_cols, format, /):
        if n_experts < 1:
            raise ValueError(f"PackedExperts: expected at least one expert, got {n_experts}")
        self.format = format
        self.matrices = [PackedMatrix(n_rows, n_cols, format) for _ in range(n_experts)]
        self.nbytes = n_experts * self.matrices[0].nbytes
        self._views = aligned_empty(n_experts * sizeof(MatrixView))
        self.each = <MatrixView *><size_t>self._views.ctypes.data
        self._data = None

    @property
    def shape(self):
        """(n_experts, n_rows, n_cols)."""
        return len(self.matrices), *self.matrices[0].shape

    def reserve(self):
        """Reserve the memory of all matrices without touching it; each can be packed by itself then.

        Returns
        -------
        PackedExperts
            self
        """
        cdef PackedMatrix matrix
        if self._data is None:
            self._data = aligned_empty(self.nbytes)
            parts = self._data.reshape(len(self.matrices), -1)
            for e, matrix in enumerate(self.matrices):
                matrix.reserve(take=lambda n_bytes, part=parts[e]: part)
                self.each[e] = matrix.view
        return self

    def pack(self, const uint8_t[:, :, ::1] rows not None, *, n_threads=None):
        """Fill all matrices from GGUF rows.

        Parameters
        ----------
        rows : uint8, (n_experts, n_rows, row_bytes), C-contiguous
            Each row's blocks as the file has them. Not referenced afterwards.
        n_threads : int, optional

        Returns
        -------
        PackedExperts
            self

        Raises
        ------
        ValueError
            The shape is not (n_experts, n_rows, row_bytes).
        """
        cdef MatrixView m = (<PackedMatrix>self.matrices[0]).view
        cdef const woolly_format *f = &active().formats[m.format]
        cdef int64_t n_experts = len(self.matrices), row_bytes = m.n_blocks * f.block_bytes
        if (rows.shape[0], rows.shape[1], rows.shape[2]) != (n_experts, m.n_rows, row_bytes):
            raise ValueError(f"pack: expected {self.format} rows of shape ({n_experts}, {m.n_rows}, {row_bytes}) "
                             f"bytes, got ({rows.shape[0]}, {rows.shape[1]}, {rows.shape[2]})")
        self.reserve()
        for matrix, each in zip(self.matrices, rows, strict=True):
            matrix.pack(each, n_threads=n_threads)
        return self


cdef int64_t plan_bytes(int64_t n_experts, int64_t n_used, int64_t max_tokens) noexcept nogil:
    """Of the arrays of a plan."""
    return (n_experts + 1 + 4 * n_used * max_tokens) * sizeof(int32_t)


def pair_columns(n_experts, n_used, max_tokens, /):
    """Columns of tiles of bf16 that the pairs of max_tokens tokens with their experts take at most.

    An expert leaves at most 15 of them empty, and, as it has at least 9 tokens then, fewer than it fills.
    """
    cdef int64_t n_pairs = n_used * max_tokens
    return n_pairs + min(n_pairs, (WOOLLY_BF16_COLS - 1) * <int64_t>n_experts)


cdef void init_plan(ExpertPlan *plan, const Routing *routing, int64_t max_tokens, uint8_t *memory) noexcept nogil:
    cdef int64_t n_pairs = routing.n_used * max_tokens
    plan.routing = routing[0]
    plan.n_active = 0
    plan.begin = <int32_t *>memory
    plan.expert = plan.begin + routing.n_experts + 1
    plan.token = plan.expert + n_pairs
    plan.pair = plan.token + n_pairs
    plan.column = plan.pair + n_pairs
    plan.has_tiles = False


cdef bint is_better(float score, int64_t expert, float than, int64_t than_expert) noexcept nogil:
    """The order of experts: by score, the lower index first where they are equal."""
    return score > than or (score == than and expert < than_expert)


cdef int64_t next_best(const float *scores, int64_t n, int64_t after) noexcept nogil:
    """The best expert that comes after another in their order (after < 0: the best of all). NaN counts as -inf."""
    cdef int64_t e, best = -1
    cdef float score, most = 0, bound = 0
    if after >= 0:
        bound = scores[after] if scores[after] == scores[after] else -INFINITY
    for e in range(n):
        score = scores[e] if scores[e] == scores[e] else -INFINITY
        if after >= 0 and (e == after or not is_better(bound, after, score, e)):
            continue
        if best < 0 or is_better(score, e, most, best):
            best, most = e, score
    return best


cdef void route_row(const woolly_kernels *kernels, const Routing *routing, float *scores, float *out) noexcept nogil:
    """A token's scores (n_experts,) -> out: n_used weights, then the experts they belong to, best first.

    The scores are overwritten. Indices are exact as float32.
    """
    cdef int64_t n = routing.n_experts, k = routing.n_used, slot, expert = -1
    cdef float *experts = out + k
    cdef float total = 0
    for slot in range(k):
        expert = next_best(scores, n, expert)
        experts[slot] = <float>expert
        out[slot] = scores[expert]
    if routing.over_chosen:
        kernels.softmax(out, k, out)
    else:
        kernels.softmax(scores, n, scores)
        for slot in range(k):
            out[slot] = scores[<int64_t>experts[slot]]
    if routing.normalise:
        for slot in range(k):
            total += out[slot]
        for slot in range(k):
            out[slot] = out[slot] / total
    for slot in range(k):
        out[slot] = out[slot] * routing.scale


cdef void plan_experts(ExpertPlan *plan, const float *routes, int64_t stride, int64_t n_tokens) noexcept nogil:
    """Sort the pairs by expert, tokens ascending: routes (n_tokens, stride) as `route_row` writes them."""
    cdef int64_t k = plan.routing.n_used, n = plan.routing.n_experts, token, slot, e, at
    memset(plan.begin, 0, (n + 1) * sizeof(int32_t))
    for token in range(n_tokens):
        for slot in range(k):
            plan.begin[<int64_t>routes[token * stride + k + slot] + 1] += 1
    plan.n_active = 0
    for e in range(n):
        plan.n_active += plan.begin[e + 1] > 0
        plan.begin[e + 1] += plan.begin[e]
    for token in range(n_tokens):
        for slot in range(k):
            e = <int64_t>routes[token * stride + k + slot]
            at = plan.begin[e]
            plan.begin[e] += 1
            plan.expert[at], plan.token[at] = <int32_t>e, <int32_t>token
            plan.pair[token * k + slot] = <int32_t>at
    for e in range(n, 0, -1):  # each begin has run to its end, the next one's begin
        plan.begin[e] = plan.begin[e - 1]
    plan.begin[0] = 0
    place_columns(plan)


cdef void place_columns(ExpertPlan *plan) noexcept nogil:
    """Columns of tiles for the pairs of experts that have tokens enough."""
    cdef int64_t e, pair, n, begin = 0
    for e in range(plan.routing.n_experts):
        n = plan.begin[e + 1] - plan.begin[e]
        for pair in range(n):
            plan.column[plan.begin[e] + pair] = <int32_t>(begin + pair) if n >= WOOLLY_BF16_LEAST_COLS else -1
        if n >= WOOLLY_BF16_LEAST_COLS:
            begin += (n + WOOLLY_BF16_COLS - 1) // WOOLLY_BF16_COLS * WOOLLY_BF16_COLS
    plan.has_tiles = begin > 0


cdef bint is_alone(const ExpertPlan *plan, int64_t pair) noexcept nogil:
    """Whether a pair's expert has no other token."""
    cdef int64_t expert = plan.expert[pair]
    return plan.begin[expert + 1] - plan.begin[expert] == 1


cdef void set_columns(const ExpertJob *job, int64_t expert, woolly_matmul_args *args) noexcept nogil:
    """The tokens of one expert: rows of pairs, or the only token's own row."""
    cdef int64_t pair = job.plan.begin[expert], token
    args.n_cols = job.plan.begin[expert + 1] - pair
    args.bf16 = NULL
    if job.bf16 != NULL and job.plan.column[pair] >= 0:
        args.bf16 = job.bf16 + job.plan.column[pair] * job.n_digits * job.width
    if args.n_cols == 1 and job.token_x != NULL:
        token = job.plan.token[pair]
        args.x, args.x_stride = job.token_x + token * job.token_x_stride, job.token_x_stride
        args.xq, args.xq_stride = job.token_xq + token * job.token_xq_stride, job.token_xq_stride
    else:
        args.x, args.x_stride = job.x + pair * job.x_stride, job.x_stride
        args.xq, args.xq_stride = job.xq + pair * job.xq_stride, job.xq_stride


cdef void run_expert_tasks(const woolly_kernels *kernels, const ExpertJob *job, woolly_tasks *tasks,
                           int n_threads) noexcept nogil:
    """For each expert that has tokens the row groups of all parts, in chunks; whoever is free takes one."""
    cdef int64_t total = 0, task = next_task(tasks), begin = 0, chunk, n_chunks, expert, pair
    cdef bint has_tiles = job.bf16 != NULL and job.plan.has_tiles
    cdef int64_t step = 2 * WOOLLY_BF16_ROW_STEP if has_tiles else WOOLLY_ROW_STEP
    cdef const MatrixView *m
    cdef woolly_matmul_args args
    cdef int i
    for i in range(job.n_parts):
        total += job.parts[i].each[0].n_groups * job.plan.n_active
    chunk = total if n_threads == 1 else total // (n_threads * 8) // step * step
    chunk = max(chunk, <int64_t>(WOOLLY_BF16_ROW_STEP if has_tiles else WOOLLY_ROW_STEP))
    args.accumulate, args.n_digits, args.streams = 0, job.n_digits, True
    for expert in range(job.plan.routing.n_experts):
        pair = job.plan.begin[expert]
        if job.plan.begin[expert + 1] == pair:
            continue
        set_columns(job, expert, &args)
        for i in range(job.n_parts):
            m = &job.parts[i].each[expert]
            n_chunks = (m.n_groups + chunk - 1) // chunk
            args.w, args.n_rows, args.n_k = m.w, m.n_rows, m.n_cols
            args.out, args.out_stride = job.parts[i].out + pair * job.parts[i].out_stride, job.parts[i].out_stride
            while task < begin + n_chunks:
                kernels.formats[m.format].matmul(
                    &args, (task - begin) * chunk, min(m.n_groups, (task - begin + 1) * chunk))
                task = next_task(tasks)
            begin += n_chunks


cdef void combine_row(const woolly_kernels *kernels, const ExpertPlan *plan, const float *route, int64_t token,
                      float *rows, int64_t stride, int64_t n, float *out) noexcept nogil:
    """out += the weighted rows of a token's pairs, best expert first. The rows are overwritten."""
    cdef int64_t slot, k = plan.routing.n_used
    cdef float *row
    for slot in range(k):
        row = rows + plan.pair[token * k + slot] * stride
        kernels.scale(row, route[slot], n, row)
        kernels.add(out, row, n, out)


def route_experts(const float[:, ::1] scores not None, /, *, n_used, gating="softmax", normalise=True, scale=1.0):
    """The best n_used experts of each token and their weights.

    Parameters
    ----------
    scores : float32, (n_tokens, n_experts), C-contiguous
        Of the router.
    n_used : int
        Experts of a token.
    gating : {"softmax", "softmax_chosen"}
        Weights are a softmax over all scores, or over the chosen ones.
    normalise : bool
        Divide the weights by their sum.
    scale : float
        Weights are multiplied by it.

    Returns
    -------
    weights : float32, (n_tokens, n_used)
    experts : int32, (n_tokens, n_used)
        Best first; of equal scores the lower index. A NaN counts as the least.

    Raises
    ------
    ValueError
        n_used is not in 1 to n_experts, or the gating is unknown.
    """
    cdef Routing routing = check_routing("route_experts", scores.shape[1], n_used, gating, normalise, scale)
    out = np.empty((scores.shape[0], 2 * n_used), dtype=np.float32)
    copied = np.array(scores, dtype=np.float32, order="C")
    cdef float[:, ::1] rows = out, work = copied
    cdef int64_t token
    with nogil:
        for token in range(rows.shape[0]):
            route_row(active(), &routing, &work[token, 0], &rows[token, 0])
    return out[:, :n_used].copy(), out[:, n_used:].astype(np.int32)


cdef Routing check_routing(str name, n_experts, n_used, gating, normalise, scale) except *:
    if not 1 <= n_used <= n_experts:
        raise ValueError(f"{name}: expected 1 to {n_experts} experts a token, got {n_used}")
    if gating not in GATINGS:
        raise ValueError(f"{name}: unknown gating {gating!r}, known: {', '.join(GATINGS)}")
    return Routing(n_experts, n_used, gating == "softmax_chosen", normalise, scale)
