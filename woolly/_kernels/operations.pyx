"""The operations of a program, as one thread computes its share of them.

Owns how a stage is cut into tasks that threads take one by one, and which kernels an operation calls on which rows.
What is recorded is `Program`'s business, which stage comes when and who waits for whom the `Executor`'s.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memcpy

from woolly._kernels.attention cimport (
    AttentionJob, n_job_tasks, n_merge_tasks, plan_job, run_job_task, run_merge_task,
)
from woolly._kernels.experts cimport (
    ExpertJob, ExpertPart, combine_row, is_alone, next_task, plan_experts, route_row, run_expert_tasks, woolly_tasks,
)
from woolly._kernels.kernels cimport (
    WOOLLY_BF16_LEAST_COLS, WOOLLY_BF16_ROW_STEP, WOOLLY_NEAR_BYTES, WOOLLY_ROUNDED_LEAST_COLS, WOOLLY_ROW_STEP,
    woolly_kernels, woolly_kv_head, woolly_matmul_args, woolly_matmul_fn, woolly_rounded_k,
)
from woolly._kernels.matmul cimport matrix_row

cdef enum:
    COLUMN_STEP = 48                # a multiple of every tile's columns
    BF16_COLUMN_BLOCK = 256         # for tiles of bf16, which read activations ahead, so that they need not stay in L2
    FEW_COLUMNS = 8                 # from so many on the arithmetic takes longer than the weights do to come
    MOST_BYTES_AHEAD = 0x40000      # of weights that wait in L2 for their turn
    FLOAT_COLUMN_BLOCK = 264        # of float formats, which cut k themselves


cdef void work_stage(Run *run, int32_t turn, float *scratch, int n_threads) noexcept nogil:
    """Tasks of the stage turn / 2, of its second half where turn is odd, until there are none left."""
    cdef const Stage *stage = &run.stages[turn // 2]
    cdef const Op *op = &run.ops[stage.begin]
    cdef woolly_tasks *tasks = &run.tasks[turn]
    if op.kind == MATMUL:
        work_matmul(run, op, tasks, n_threads)
    elif op.kind == ATTENTION:
        work_attention(run, op, tasks, turn % 2, scratch, n_threads)
    elif op.kind == EXPERT_MATMUL:
        work_expert_matmul(run, op, tasks, n_threads)
    elif op.kind == PLAN:
        work_plan(run, op, tasks)
    else:
        work_rows(run, stage, tasks, scratch, n_threads)


# How the row groups of all parts of a matmul are cut into chunks: for few columns a large one for each thread to begin
# with, whose weights stream by without a break, then small ones for whoever is free
cdef struct Chunks:
    int64_t total
    int64_t n_large
    int64_t large
    int64_t small


cdef Chunks cut_rows(const Op *op, int64_t n_cols, int64_t step, int n_threads) noexcept nogil:
    cdef Chunks chunks
    cdef int64_t total = 0
    cdef int i
    for i in range(op.n_parts):
        total += op.parts[i].m.n_groups
    chunks.total, chunks.n_large = total, n_threads
    chunks.large = total if n_threads == 1 else total * 3 // (4 * n_threads) // step * step
    if n_cols >= FEW_COLUMNS and n_threads > 1:
        chunks.n_large = chunks.large = 0
    chunks.small = max(step, total // (n_threads * 8) // step * step)
    if step == WOOLLY_BF16_ROW_STEP and total > n_threads * 4 * step:  # fewer, of whole panels
        chunks.small = (total + n_threads * 8 * step - 1) // (n_threads * 8 * step) * (2 * step)
    return chunks


cdef int64_t n_chunks(const Chunks *chunks) noexcept nogil:
    cdef int64_t rest = chunks.total - chunks.n_large * chunks.large
    return chunks.n_large + (rest + chunks.small - 1) // chunks.small


cdef int64_t chunk_begin(const Chunks *chunks, int64_t i) noexcept nogil:
    cdef int64_t n_large = min(i, chunks.n_large)
    return min(chunks.total, n_large * chunks.large + (i - n_large) * chunks.small)


cdef int64_t chunk_weights(const Op *op, int64_t i, int n_threads, const uint8_t **weights) noexcept nogil:
    """Where the weights of chunk i of a matmul begin; returns how many bytes there are of its first part, at most."""
    cdef int64_t first = 0, begin, end
    cdef int part
    cdef Chunks chunks = cut_rows(op, 1, WOOLLY_ROW_STEP, n_threads)
    begin, end = chunk_begin(&chunks, i), chunk_begin(&chunks, i + 1)
    for part in range(op.n_parts):
        if begin < first + op.parts[part].m.n_groups:
            weights[0] = op.parts[part].m.w + (begin - first) * op.parts[part].m.group_bytes
            end = min(end, first + op.parts[part].m.n_groups)
            return min(MOST_BYTES_AHEAD, (end - begin) * op.parts[part].m.group_bytes)
        first += op.parts[part].m.n_groups
    return 0


cdef void work_matmul(Run *run, const Op *op, woolly_tasks *tasks, int n_threads) noexcept nogil:
    """Blocks of columns, for each the row groups of all parts in chunks; whoever is free takes one."""
    cdef int64_t n_cols = n_rows(run, op)
    cdef const Buffer *x = &run.buffers[op.x]
    cdef bint rounds = run.how.unit != NULL and not op.exact and n_cols >= WOOLLY_ROUNDED_LEAST_COLS
    cdef bint has_digits = run.how.bf16_of != NULL and x.bf16 != NULL and n_cols >= WOOLLY_BF16_LEAST_COLS
    cdef int64_t bf16_stride = woolly_rounded_k(x.width) if rounds else run.how.n_digits * x.width
    cdef int64_t block = FLOAT_COLUMN_BLOCK, step = WOOLLY_ROW_STEP, task, begin = 0, count, col = 0
    cdef woolly_matmul_args args
    cdef Chunks chunks
    if op.parts[0].m.quantised:
        # activations stay in L2 while row groups go by; of a record, words are read, or lo, and what follows
        block = WOOLLY_NEAR_BYTES // (x.q16_stride - 2 * x.width)
        block = max(COLUMN_STEP, block // COLUMN_STEP * COLUMN_STEP)
    if rounds or has_digits and op.parts[0].m.quantised:
        block, step = BF16_COLUMN_BLOCK, WOOLLY_BF16_ROW_STEP
    chunks = cut_rows(op, n_cols, step, n_threads)
    count = n_chunks(&chunks)
    args.x_stride, args.xq_stride, args.n_digits = x.stride, x.q16_stride, run.how.n_digits
    args.accumulate, args.streams = op.accumulate, True  # all other weights are read in between
    task = next_task(tasks)
    while col < n_cols:
        args.n_cols = min(block, n_cols - col)
        args.x, args.xq = x.data + col * x.stride, x.q16 + col * x.q16_stride
        args.bf16 = x.bf16 + col * bf16_stride if rounds or has_digits else NULL
        while task < begin + count:
            matmul_rows(run, op, col, chunk_begin(&chunks, task - begin), chunk_begin(&chunks, task - begin + 1),
                        rounds, &args)
            task = next_task(tasks)
        begin += count
        col += block


cdef void matmul_rows(Run *run, const Op *op, int64_t col, int64_t group_begin, int64_t group_end, bint rounds,
                      woolly_matmul_args *args) noexcept nogil:
    """Row groups [group_begin, group_end), counted through all parts; rounds: by the BF16 unit."""
    cdef int64_t first = 0, n_groups
    cdef const Part *part
    cdef woolly_matmul_fn multiply
    cdef int i
    for i in range(op.n_parts):
        part = &op.parts[i]
        n_groups = part.m.n_groups
        if group_begin < first + n_groups and group_end > first:
            set_part(run, part, col, args)
            multiply = run.how.unit.matmul[part.m.format] if rounds else run.kernels.formats[part.m.format].matmul
            multiply(args, max(<int64_t>0, group_begin - first), min(n_groups, group_end - first))
        first += n_groups


cdef void set_part(Run *run, const Part *part, int64_t col, woolly_matmul_args *args) noexcept nogil:
    args.w, args.n_rows, args.n_k = part.m.w, part.m.n_rows, part.m.n_cols
    if part.out == LOGITS:
        args.out, args.out_stride = run.logits, part.m.n_rows
    else:
        args.out, args.out_stride = run.buffers[part.out].data, run.buffers[part.out].stride
    args.out = args.out + col * args.out_stride


cdef void work_plan(Run *run, const Op *op, woolly_tasks *tasks) noexcept nogil:
    """One thread's work, whoever comes first."""
    if next_task(tasks) == 0:
        plan_experts(op.plan, run.buffers[op.x].data, run.buffers[op.x].stride, run.n_tokens)


cdef void work_expert_matmul(Run *run, const Op *op, woolly_tasks *tasks, int n_threads) noexcept nogil:
    cdef const Buffer *x = &run.buffers[op.x]
    cdef const Buffer *tokens = &run.buffers[op.y]
    cdef const Buffer *out
    cdef ExpertJob job
    cdef int i
    job.plan, job.n_parts, job.n_digits = op.plan, op.n_parts, run.how.n_digits
    job.x, job.x_stride, job.xq, job.xq_stride = x.data, x.stride, x.q16, x.q16_stride
    job.width, job.bf16 = x.width, x.bf16 if run.how.bf16_of != NULL else NULL
    job.token_x = tokens.data if op.x != op.y else NULL
    job.token_x_stride, job.token_xq, job.token_xq_stride = tokens.stride, tokens.q16, tokens.q16_stride
    for i in range(op.n_parts):
        out = &run.buffers[op.parts[i].out]
        job.parts[i] = ExpertPart(op.parts[i].each, out.data, out.stride)
    run_expert_tasks(run.kernels, &job, tasks, n_threads)


cdef void work_gather(Run *run, const Op *op, int64_t pair) noexcept nogil:
    """A token's row once more, beside the others of the same expert; an expert with one token reads that one's own."""
    cdef const Buffer *out = &run.buffers[op.out]
    cdef const Buffer *x = &run.buffers[op.x]
    cdef int64_t token = op.plan.token[pair]
    if is_alone(op.plan, pair):
        return
    if op.gather_floats:
        memcpy(out.data + pair * out.stride, x.data + token * x.stride, x.width * sizeof(float))
    if op.quantize_out:
        memcpy(out.q16 + pair * out.q16_stride, x.q16 + token * x.q16_stride, x.q16_stride)
        fill_tiles(run, out, pair, op.plan.column[pair])


cdef void work_rows(Run *run, const Stage *stage, woolly_tasks *tasks, float *scratch, int n_threads) noexcept nogil:
    cdef int64_t n = n_rows(run, &run.ops[stage.begin])
    cdef int64_t chunk = max(<int64_t>1, min(<int64_t>16, n // (n_threads * 4)))
    cdef int64_t task, row
    cdef int op
    while True:
        task = next_task(tasks)
        if task * chunk >= n:
            return
        for row in range(task * chunk, min(n, task * chunk + chunk)):
            for op in range(stage.begin, stage.end):
                work_row(run, &run.ops[op], row, scratch)


cdef void work_row(Run *run, const Op *op, int64_t row, float *scratch) noexcept nogil:
    """One operation for one token (or, after select, one output; or one pair of a token and an expert)."""
    cdef const woolly_kernels *kernels = run.kernels
    if op.kind == SOFTCAP:
        kernels.softcap(run.logits + row * op.width, op.factor, op.width, run.logits + row * op.width)
        return
    cdef const Buffer *buf = &run.buffers[op.out]
    cdef float *out = buf.data + row * buf.stride
    cdef const float *x = run.buffers[op.x].data + row * run.buffers[op.x].stride
    if op.kind == EMBED:
        matrix_row(kernels, &op.table, run.tokens[row], <uint8_t *>scratch, out)
        if op.factor != 1:
            kernels.scale(out, op.factor, buf.width, out)
    elif op.kind == RMSNORM:
        kernels.rmsnorm(x, op.weight, buf.width, op.eps, scratch if op.accumulate else out)
        if op.accumulate:
            kernels.add(out, scratch, buf.width, out)
    elif op.kind == LAYERNORM:
        kernels.layernorm(x, op.weight, op.weight2, buf.width, op.eps, out)
    elif op.kind == BIAS:
        kernels.add(x, op.weight, buf.width, out)
    elif op.kind == ACTIVATE:
        kernels.act(op.activation, x, buf.width, out)
    elif op.kind == ADD:
        kernels.add(x, run.buffers[op.y].data + row * run.buffers[op.y].stride, buf.width, out)
    elif op.kind == SCALE:
        kernels.scale(x, op.factor, buf.width, out)
    elif op.kind == GLU:
        kernels.glu(op.activation, x, run.buffers[op.y].data + row * run.buffers[op.y].stride, buf.width, out)
    elif op.kind == SELECT:
        memcpy(out, run.buffers[op.x].data + run.outputs[row] * run.buffers[op.x].stride, buf.width * sizeof(float))
    elif op.kind == ROPE_STORE:
        work_rope_store(run, op, row)
    elif op.kind == ROUTE:
        route_row(kernels, &op.plan.routing, <float *>x, out)
    elif op.kind == EXPERT_BIAS:
        kernels.add(out, op.weight + op.plan.expert[row] * buf.width, buf.width, out)
    elif op.kind == COMBINE:
        combine_row(kernels, op.plan, run.buffers[op.y].data + row * run.buffers[op.y].stride, row,
                    run.buffers[op.x].data, run.buffers[op.x].stride, buf.width, out)
    elif op.kind == GATHER:
        work_gather(run, op, row)
        return
    if op.quantize_out:
        quantize_row(run, buf, row, n_rows(run, op))


cdef void quantize_row(Run *run, const Buffer *buf, int64_t row, int64_t n) noexcept nogil:
    """One of n rows as the matmuls that read it want it."""
    cdef const float *x = buf.data + row * buf.stride
    cdef bint rounds = run.how.unit != NULL and buf.bf16 != NULL and n >= WOOLLY_ROUNDED_LEAST_COLS
    if rounds:
        run.how.unit.round(x, buf.width, row, buf.bf16)
    if buf.q16 == NULL or rounds and not buf.for_exact:
        return
    run.how.quantize(x, buf.width, buf.q16 + row * buf.q16_stride)
    if buf.pairs:
        fill_tiles(run, buf, row, buf.plan.column[row])
    elif n >= WOOLLY_BF16_LEAST_COLS:
        fill_tiles(run, buf, row, row)


cdef void fill_tiles(Run *run, const Buffer *buf, int64_t row, int64_t column) noexcept nogil:
    """A quantised row once more, as a column of tiles of bf16, where it has one and matmuls will use it."""
    if buf.bf16 != NULL and run.how.bf16_of != NULL and column >= 0:
        run.how.bf16_of(buf.q16 + row * buf.q16_stride, buf.width, column, buf.bf16)


cdef void work_rope_store(Run *run, const Op *op, int64_t row) noexcept nogil:
    cdef const woolly_kernels *kernels = run.kernels
    cdef float *q = run.buffers[op.x].data + row * run.buffers[op.x].stride
    cdef float *k = run.buffers[op.y].data + row * run.buffers[op.y].stride
    cdef const float *v = run.buffers[op.z].data + row * run.buffers[op.z].stride
    cdef int64_t h, dim = op.head_dim, pos = run.positions[row], half = op.n_rot // 2
    cdef const Span *span = &run.spans[run.span_of[row]]
    cdef woolly_kv_head kv
    for h in range(op.n_heads):
        if op.weight != NULL:
            kernels.rmsnorm(q + h * dim, op.weight, dim, op.eps, q + h * dim)
        if half:
            kernels.rope(op.pairing, q + h * dim, op.n_rot, op.cos + pos * half, op.sin + pos * half)
    kernels.scale(q, op.factor, op.n_heads * dim, q)
    kv.head_dim = span.padded
    kv.kv_type = span.kv_type
    for h in range(op.n_kv_heads):
        if op.weight2 != NULL:
            kernels.rmsnorm(k + h * dim, op.weight2, dim, op.eps, k + h * dim)
        if half:
            kernels.rope(op.pairing, k + h * dim, op.n_rot, op.cos + pos * half, op.sin + pos * half)
        kv.k = span.k + op.layer * span.layer_bytes + h * span.head_bytes
        kv.v = span.v + op.layer * span.layer_bytes + h * span.head_bytes
        kernels.store_kv(&kv, dim, pos, k + h * dim, v + h * dim)


cdef void work_attention(Run *run, const Op *op, woolly_tasks *tasks, bint merges, float *scratch,
                         int n_threads) noexcept nogil:
    """Tasks of all sequences in a row; when they were split by tiles, then the merging."""
    cdef AttentionJob job
    cdef int64_t s, task = next_task(tasks), begin = 0, n_tasks, partial = 0
    for s in range(run.n_spans):
        set_job(run, op, &run.spans[s], n_threads, &job)
        job.partial = run.partial + partial
        partial += job.n_tiles * op.n_heads * (job.padded + 2)
        n_tasks = n_merge_tasks(&job) if merges else n_job_tasks(&job)
        while task < begin + n_tasks:
            if merges:
                run_merge_task(run.kernels, &job, task - begin, scratch)
            else:
                run_job_task(run.kernels, &job, task - begin, scratch)
            task = next_task(tasks)
        begin += n_tasks


cdef void set_job(Run *run, const Op *op, const Span *span, int n_threads, AttentionJob *job) noexcept nogil:
    cdef const Buffer *q = &run.buffers[op.x]
    cdef const Buffer *out = &run.buffers[op.out]
    job.queries.q = q.data + span.t0 * q.stride
    job.queries.q_stride = q.stride
    job.queries.q_head_stride = op.head_dim
    job.queries.head_dim = op.head_dim
    job.queries.n_rep = op.n_heads // op.n_kv_heads
    job.queries.pos = span.pos
    job.queries.window = op.window
    job.queries.softcap = op.softcap
    job.n_tokens = span.n
    job.n_kv_heads = op.n_kv_heads
    job.k = span.k + op.layer * span.layer_bytes
    job.v = span.v + op.layer * span.layer_bytes
    job.head_bytes = span.head_bytes
    job.padded = span.padded
    job.kv_type = span.kv_type
    job.out = out.data + span.t0 * out.stride
    job.out_stride = out.stride
    job.sinks = op.weight
    plan_job(job, run.split, n_threads)
