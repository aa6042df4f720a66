"""A model's forward pass as a list of operations that one parallel region runs.

Owns the recording, the buffers between operations and the checks of a run; how an operation is computed is the
business of operations.pyx, how threads go through them that of executor.pyx. A model records its operations once, with
`Program`'s methods; a step then runs all of them for a ragged batch of sequences without returning to Python.
Operations that work on one token at a time are run token by token with no barrier in between; matmuls are shared out by
rows, attention by heads, tokens and tiles. Behind a router, what works on the pairs of tokens and their experts goes
pair by pair, and matmuls expert by expert. There is this one path: capturing activations (`run(..., capture=...)`) runs
the same operations with a stop after the wanted ones.
"""

import numpy as np

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from woolly._kernels.attention cimport KVCache, job_scratch
from woolly._kernels.dispatch cimport active, active_activations
from woolly._kernels.executor cimport Executor, Stop
from woolly._kernels.experts cimport (
    MAX_PARTS, ExpertPlan, PackedExperts, Routing, check_routing, init_plan, plan_bytes, woolly_tasks,
)
from woolly._kernels.kernels cimport woolly_bf16_bytes, woolly_kv_head, woolly_q16_stride, woolly_rounded_bytes
from woolly._kernels.matmul cimport PackedMatrix
from woolly._kernels.operations cimport (
    ACTIVATE, ADD, ATTENTION, BIAS, COMBINE, EMBED, EXPERT_BIAS, EXPERT_MATMUL, GATHER, GLU, LAYERNORM, LOGITS, MATMUL,
    PLAN, QUANTIZE, RMSNORM, ROPE_STORE, ROUTE, SCALE, SELECT, SOFTCAP, Buffer, Op, Part, Run, Span, Stage,
)

from woolly._kernels.dispatch import check_compute
from woolly._kernels.experts import pair_columns
from woolly._kernels.matmul import aligned_empty
from woolly._kernels.rows import ACTIVATIONS, GATED_ACTIVATIONS, ROPE_PAIRINGS
from woolly._kernels.threads import check_threads, usable_threads

cdef enum:
    SPANS_ON_STACK = 64        # of a run with more sequences, they are in an array of numpy


def row_stride(width, /):
    """Values from one row of activations to the next.

    An odd number of cache lines where they are whole: rows an even number apart would share a part of the L1 sets.
    """
    return width + 16 if width % 32 == 0 else width


cdef class Program:
    """Operations over named activation buffers, recorded once and run many times.

    Parameters
    ----------
    max_tokens : int
        Most tokens in one run; buffers are of this size.
    n_threads : int, optional
    compute : {"exact", "int8", "bf16"}
        int8: matmuls of quantised weights read activations of 8 bits instead of 16. bf16: matmuls of 8 tokens or more
        round to bf16, but for those of experts and routers.

    Notes
    -----
    Methods that record return the name of the buffer they write. One run at a time: `run` holds a lock, and lets go of
    the GIL while it computes.
    """

    cdef readonly int64_t max_tokens
    cdef readonly int n_threads
    cdef readonly str compute
    cdef bint _rounds                 # whether compute is bf16
    cdef readonly int64_t buffer_bytes  # of all activation buffers
    cdef readonly list names          # of the operations, such as "blk.3.attn_norm"
    cdef readonly list part_names     # of the outputs of matmuls that have several, such as "blk.3.attn_qkv.k"
    cdef dict _parts_of               # operation name -> buffer names, where there are several
    cdef list _out_of                 # the buffer name each operation writes
    cdef dict _buffers                # name -> index
    cdef list _alive                  # everything whose memory an operation points to
    cdef dict _writer                 # buffer name -> index of the last operation that wrote it
    cdef dict _plans                  # buffer name of routes -> address of their ExpertPlan
    cdef Buffer *_buf
    cdef Op *_ops
    cdef Stage *_stages
    cdef woolly_tasks *_tasks
    cdef int _n_bufs, _n_ops, _n_stages, _capacity
    cdef bint _outputs_only
    cdef int64_t _n_layers, _n_kv_heads, _head_dim, _max_heads, _vocab_size, _logits_width, _max_positions
    cdef object _scratch, _partial
    cdef Executor _executor

    def __cinit__(self, max_tokens, n_threads=None, *, compute="exact"):
        if max_tokens < 1:
            raise ValueError(f"Program: max_tokens must be positive, got {max_tokens}")
        self.max_tokens = max_tokens
        self.n_threads = check_threads(n_threads)
        check_compute(compute)
        self._rounds, self.compute = compute == "bf16", compute
        self._capacity = 4096
        self._ops = <Op *>calloc(self._capacity, sizeof(Op))
        self._buf = <Buffer *>calloc(self._capacity, sizeof(Buffer))
        self._stages = <Stage *>calloc(self._capacity, sizeof(Stage))
        self._tasks = <woolly_tasks *>calloc(2 * self._capacity, sizeof(woolly_tasks))
        if self._ops == NULL or self._buf == NULL or self._stages == NULL or self._tasks == NULL:
            raise MemoryError
        self.part_names, self._parts_of = [], {}
        self.names, self._out_of, self._alive, self._buffers, self._writer = [], [], [], {}, {}
        self._plans = {}
        self._executor = Executor()
        self._max_positions = 2**31 - 1

    def __dealloc__(self):
        free(self._ops)
        free(self._buf)
        free(self._stages)
        free(self._tasks)

    # Recording

    def buffer(self, name, width, /, *, pairs=0):
        """A float32 buffer (max_tokens, width); one name is one buffer, whoever asks.

        pairs : of a token with its experts, each with a row; 0 for one row a token.
        """
        index = self._buffers.get(name)
        if index is not None:
            if self._buf[index].width != width:
                raise ValueError(f"buffer {name!r} has width {self._buf[index].width}, not {width}")
            if self._buf[index].pairs != pairs:
                raise ValueError(f"buffer {name!r} has rows for {self._buf[index].pairs} pairs a token, not {pairs}")
            return name
        index = self._n_bufs
        self._need(index)
        stride = row_stride(width)
        memory = self._memory(self.max_tokens * max(1, pairs) * stride * 4)
        self._buf[index].data = <float *><size_t>memory.ctypes.data
        self._buf[index].width = width
        self._buf[index].stride = stride
        self._buf[index].pairs = pairs
        self._buffers[name] = index
        self._n_bufs += 1
        return name

    def width(self, name, /):
        """Values a token has in a buffer."""
        return self._buf[<int>self._buffers[name]].width

    def _memory(self, n_bytes):
        memory = aligned_empty(n_bytes)
        self._alive.append(memory)
        self.buffer_bytes += n_bytes
        return memory

    def _need(self, count):
        if count >= self._capacity:
            raise ValueError(f"Program: more than {self._capacity} operations")

    cdef Op *_record(self, int kind, str name, str out) except NULL:
        self._need(self._n_ops)
        cdef Op *op = &self._ops[self._n_ops]
        op.kind = kind
        op.outputs_only = self._outputs_only
        op.out = self._buffers[out] if out in self._buffers else LOGITS
        op.pairs = self._buf[op.out].pairs if op.out != LOGITS else 0
        self.names.append(name)
        self._out_of.append(out)
        if out:
            self._writer[out] = self._n_ops
        # operations on one token join the stage before them, if that works on the same tokens
        cdef Stage *stage = &self._stages[self._n_stages - 1] if self._n_stages else NULL
        cdef bint by_row = kind < MATMUL
        if by_row and stage != NULL and self._ops[stage.begin].kind < MATMUL and \
                self._ops[stage.begin].outputs_only == op.outputs_only and \
                self._ops[stage.begin].pairs == op.pairs:
            stage.end += 1
        else:
            stage = &self._stages[self._n_stages]
            stage.begin = self._n_ops
            stage.end = self._n_ops + 1
            self._n_stages += 1
        self._n_ops += 1
        return op

    cdef const float *_floats(self, array, tuple shape, str what) except? NULL:
        """Pointer to float32 values that live as long as the program."""
        array = np.ascontiguousarray(array, dtype=np.float32)
        if array.shape != shape:
            raise ValueError(f"{what}: expected values of shape {shape}, got {array.shape}")
        self._alive.append(array)
        return <const float *><size_t>array.ctypes.data

    def embed(self, out, PackedMatrix table not None, /, *, factor=1.0, name="embd"):
        """out = rows of the embedding table for the batch's tokens, times factor."""
        self.buffer(out, table.n_cols)
        table._check_packed()
        cdef Op *op = self._record(EMBED, name, out)
        self._alive.append(table)
        op.table = table.view
        op.factor = factor
        self._vocab_size = table.n_rows
        return out

    def rmsnorm(self, out, x, weight, /, *, eps, accumulate=False, name):
        """out = x / sqrt(mean(x^2) + eps) * weight; with accumulate, out += that."""
        self.buffer(out, self.width(x))
        cdef Op *op = self._record(RMSNORM, name, out)
        op.x = self._buffers[x]
        op.weight = self._floats(weight, (self.width(x),), name)
        op.eps = eps
        op.accumulate = accumulate
        return out

    def layernorm(self, out, x, weight, bias, /, *, eps, name):
        """out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""
        self.buffer(out, self.width(x))
        cdef Op *op = self._record(LAYERNORM, name, out)
        op.x = self._buffers[x]
        op.weight = self._floats(weight, (self.width(x),), name)
        op.weight2 = self._floats(bias, (self.width(x),), name)
        op.eps = eps
        return out

    def bias(self, x, bias, /, *, name):
        """x += bias, the same for every token."""
        cdef Op *op = self._record(BIAS, name, x)
        op.x = self._buffers[x]
        op.weight = self._floats(bias, (self.width(x),), name)
        return x

    def activate(self, out, x, /, *, activation, name):
        """out = activation(x), without a gate."""
        self.buffer(out, self.width(x))
        cdef Op *op = self._record(ACTIVATE, name, out)
        op.x = self._buffers[x]
        op.activation = ACTIVATIONS[activation]
        return out

    def softcap_logits(self, cap, /, *, name="logits_softcap"):
        """logits = cap tanh(logits / cap)."""
        if not self._logits_width:
            raise ValueError(f"{name}: there are no logits yet")
        cdef Op *op = self._record(SOFTCAP, name, "logits")
        op.factor = cap
        op.width = self._logits_width

    def add(self, out, x, y, /, *, name):
        """out = x + y."""
        if self.width(x) != self.width(y):
            raise ValueError(f"{name}: widths {self.width(x)} and {self.width(y)} differ")
        self.buffer(out, self.width(x))
        cdef Op *op = self._record(ADD, name, out)
        op.x, op.y = self._buffers[x], self._buffers[y]
        return out

    def glu(self, out, gate, up, /, *, activation, name):
        """out = activation(gate) * up."""
        if self.width(gate) != self.width(up):
            raise ValueError(f"{name}: widths {self.width(gate)} and {self.width(up)} differ")
        cdef const Buffer *from_gate = &self._buf[<int>self._buffers[gate]]
        cdef ExpertPlan *plan = from_gate.plan
        self.buffer(out, from_gate.width, pairs=from_gate.pairs)
        self._set_plan(out, plan, name)
        cdef Op *op = self._record(GLU, name, out)
        op.x, op.y = self._buffers[gate], self._buffers[up]
        op.activation = GATED_ACTIVATIONS[activation]
        return out

    def matmul(self, outs, x, matrices, /, *, accumulate=False, exact=False, name):
        """outs[i] = matrices[i] x for matrices that share their input; with accumulate, outs[i] += that.

        With exact it is not rounded to bf16 whatever the program computes in.

        An output named "logits" goes to the array that `run` is given.
        """
        outs, matrices = list(outs), list(matrices)
        if len(outs) != len(matrices) or not 1 <= len(outs) <= MAX_PARTS:
            raise ValueError(f"{name}: {len(outs)} outputs for {len(matrices)} matrices, at most {MAX_PARTS}")
        cdef PackedMatrix w
        for out, w in zip(outs, matrices):
            if w.n_cols != self.width(x):
                raise ValueError(f"{name}: the matrix has {w.n_cols} columns, {x!r} has {self.width(x)}")
            w._check_packed()
            if out != "logits":
                self.buffer(out, w.n_rows)
            elif not self._outputs_only:
                raise ValueError(f"{name}: select the rows whose logits are wanted first")
            else:
                self._logits_width = w.n_rows
        cdef bint quantised = any((<PackedMatrix>w).view.quantised for w in matrices)
        if quantised or self._rounds and not exact:
            self._want_quantised(x, quantised)
            self._buf[<int>self._buffers[x]].for_exact |= exact
        cdef Op *op = self._record(MATMUL, name, outs[0])
        op.x = self._buffers[x]
        op.accumulate, op.exact = accumulate, exact
        op.n_parts = len(outs)
        cdef Part *part
        for i, (out, w) in enumerate(zip(outs, matrices)):
            part = &op.parts[i]
            part.m = w.view
            part.out = LOGITS if out == "logits" else self._buffers[out]
            self._writer[out] = self._n_ops - 1
            self._alive.append(w)
        if len(outs) > 1:
            self._parts_of[name] = outs
            self.part_names += [f"{name}.{out}" for out in outs]
        return outs if len(outs) > 1 else outs[0]

    def _want_quantised(self, x, quantised=True, *, tiles=True):
        """Have x quantised or rounded by the operation that writes it, or by one of its own; for tiles of bf16 too."""
        cdef int index = self._buffers[x]
        cdef Buffer *buf = &self._buf[index]
        if quantised and buf.q16 == NULL:
            buf.q16_stride = woolly_q16_stride(buf.width)
            memory = self._memory(self.max_tokens * max(1, buf.pairs) * buf.q16_stride)
            buf.q16 = <uint8_t *><size_t>memory.ctypes.data
        cdef int64_t n = self.max_tokens
        if buf.pairs:
            n = pair_columns(buf.plan.routing.n_experts, buf.plan.routing.n_used, self.max_tokens)
        if tiles and buf.bf16 == NULL and not (self._rounds and buf.pairs):  # experts are exact
            memory = aligned_empty(woolly_rounded_bytes(buf.width, n) if self._rounds else
                                   woolly_bf16_bytes(buf.width, n))
            self._alive.append(memory)
            if self._rounds or active().bf16_of_q16 != NULL:  # pages that nothing writes take no memory
                self.buffer_bytes += memory.nbytes
            buf.bf16 = <uint16_t *><size_t>memory.ctypes.data
        cdef Op *writer = &self._ops[<int>self._writer[x]]
        if writer.kind < MATMUL:
            writer.quantize_out = True
        else:
            self._record(QUANTIZE, self.names[<int>self._writer[x]] + ".q16", x).quantize_out = True

    def route(self, out, scores, /, *, n_used, gating, normalise=True, scale=1.0, name):
        """out = the weights of each token's best experts, then their indices, by a router's scores.

        See `route_experts` for the options. What is recorded with this route is about these experts only.
        """
        cdef Routing routing = check_routing(name, self.width(scores), n_used, gating, normalise, scale)
        cdef ExpertPlan *plan
        if self._outputs_only:
            raise ValueError(f"{name}: experts come before the selection of outputs")
        self.buffer(out, 2 * n_used)
        if out not in self._plans:
            memory = self._memory(sizeof(ExpertPlan) + plan_bytes(routing.n_experts, n_used, self.max_tokens))
            plan = <ExpertPlan *><size_t>memory.ctypes.data
            init_plan(plan, &routing, self.max_tokens, <uint8_t *>plan + sizeof(ExpertPlan))
            self._plans[out] = <size_t>plan
        plan = <ExpertPlan *><size_t>self._plans[out]
        if <object>plan.routing != <object>routing:
            raise ValueError(f"{name}: all routes in {out!r} must choose in the same way")
        cdef Op *op = self._record(ROUTE, name, out)
        op.x, op.plan = self._buffers[scores], plan
        op = self._record(PLAN, name + ".plan", out)
        op.x, op.plan = self._buffers[out], plan
        return out

    def expert_matmul(self, outs, x, experts, /, *, route, biases=None, name):
        """outs[i] = experts[i] x (+ biases[i]) for each pair of a token and one of its experts: a row a pair.

        x : a row a token, or a row a pair, as an earlier product has.
        experts : sequence of PackedExperts.
        biases : sequence of float32 (n_experts, n_rows), or None, optional.
        """
        outs, experts = list(outs), list(experts)
        if len(outs) != len(experts) or not 1 <= len(outs) <= MAX_PARTS:
            raise ValueError(f"{name}: {len(outs)} outputs for {len(experts)} tensors, at most {MAX_PARTS}")
        if route not in self._plans:
            raise ValueError(f"{name}: nothing routes to {route!r}")
        cdef ExpertPlan *plan = <ExpertPlan *><size_t>self._plans[route]
        cdef PackedExperts w
        for out, w in zip(outs, experts):
            if w.shape[0] != plan.routing.n_experts or w.shape[2] != self.width(x):
                raise ValueError(f"{name}: the experts are {w.shape}, the router knows {plan.routing.n_experts} and "
                                 f"{x!r} has {self.width(x)} columns")
            (<PackedMatrix>w.matrices[0])._check_packed()
            self.buffer(out, w.shape[1], pairs=plan.routing.n_used)
            self._set_plan(out, plan, name)
        rows = self._gather(x, experts, plan, name)
        cdef Op *op = self._record(EXPERT_MATMUL, name, outs[0])
        op.x, op.y, op.plan, op.n_parts = self._buffers[rows], self._buffers[x], plan, len(outs)
        for i, (out, w) in enumerate(zip(outs, experts)):
            op.parts[i].each, op.parts[i].out = w.each, self._buffers[out]
            self._writer[out] = self._n_ops - 1
            self._alive.append(w)
        for out, bias in zip(outs, biases or ()):
            if bias is not None:
                op = self._record(EXPERT_BIAS, f"{name}_bias", out)
                op.plan = plan
                op.weight = self._floats(bias, (plan.routing.n_experts, self.width(out)), name)
        return outs if len(outs) > 1 else outs[0]

    cdef _set_plan(self, rows, ExpertPlan *plan, str name):
        """Rows of pairs are those of one route."""
        cdef Buffer *buf = &self._buf[<int>self._buffers[rows]]
        if buf.plan != NULL and buf.plan != plan:
            raise ValueError(f"{name}: {rows!r} has rows of the pairs of another route")
        buf.plan = plan

    cdef _gather(self, x, experts, ExpertPlan *plan, str name):
        """The rows of pairs that a matmul reads: x itself, or x's rows once more for each pair."""
        cdef bint quantised = any((<PackedExperts>w).each.quantised for w in experts)
        if x not in self._writer:
            raise ValueError(f"{name}: nothing writes {x!r}")
        cdef int index = self._buffers[x]
        cdef bint has_pairs = self._buf[index].pairs > 0
        if has_pairs:
            self._set_plan(x, plan, name)
        if quantised:
            self._want_quantised(x, tiles=has_pairs)  # tokens' own rows are copied
            self._buf[index].for_exact = True
        if has_pairs:
            return x
        rows = self.buffer(x + ".by_expert", self.width(x), pairs=plan.routing.n_used)
        self._set_plan(rows, plan, name)
        cdef Op *op = self._record(GATHER, name + ".gather", rows)
        self._out_of[-1] = x  # what a capture shows: rows of experts with one token stay where they are
        op.x, op.plan = self._buffers[x], plan
        op.gather_floats = not all((<PackedExperts>w).each.quantised for w in experts)
        if quantised:
            self._want_quantised(rows)
        return rows

    def combine(self, out, rows, /, *, route, name):
        """out += the rows of each token's pairs times the weights of their experts, best first; overwrites the rows."""
        if route not in self._plans:
            raise ValueError(f"{name}: nothing routes to {route!r}")
        cdef ExpertPlan *plan = <ExpertPlan *><size_t>self._plans[route]
        cdef const Buffer *buf = &self._buf[<int>self._buffers[rows]]
        if buf.pairs != plan.routing.n_used or buf.width != self.width(out):
            raise ValueError(f"{name}: {rows!r} has rows of {buf.width} for {buf.pairs} pairs a token, expected "
                             f"{self.width(out)} for {plan.routing.n_used}")
        cdef Op *op = self._record(COMBINE, name, out)
        op.x, op.y, op.plan = self._buffers[rows], self._buffers[route], plan
        return out

    def rope_store(self, q, k, v, /, *, layer, n_heads, n_kv_heads, head_dim, cos, sin, pairing, scale, q_norm=None,
                   k_norm=None, eps=0.0, name):
        """Normalise (if weights are given) and rotate the heads of q and k, scale q, and write k and v to the cache.

        cos, sin : float32 (n_ctx, n_rot / 2), or None for a layer without RoPE.
        """
        if self.width(q) != n_heads * head_dim or self.width(k) != n_kv_heads * head_dim or \
                self.width(v) != n_kv_heads * head_dim:
            raise ValueError(f"{name}: q, k, v are {self.width(q)}, {self.width(k)}, {self.width(v)} wide, expected "
                             f"{n_heads} and {n_kv_heads} heads of {head_dim}")
        if layer < 0 or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"{name}: layer {layer}, {n_heads} heads on {n_kv_heads} KV heads is no attention")
        if self._n_kv_heads and (self._n_kv_heads, self._head_dim) != (n_kv_heads, head_dim):
            raise ValueError(f"{name}: all layers must have {self._n_kv_heads} KV heads of {self._head_dim}")
        cdef Op *op = self._record(ROPE_STORE, name, q)
        op.x, op.y, op.z = self._buffers[q], self._buffers[k], self._buffers[v]
        op.layer, op.n_heads, op.n_kv_heads, op.head_dim = layer, n_heads, n_kv_heads, head_dim
        op.factor = scale
        op.eps = eps
        op.weight = self._floats(q_norm, (head_dim,), name) if q_norm is not None else NULL
        op.weight2 = self._floats(k_norm, (head_dim,), name) if k_norm is not None else NULL
        if cos is not None:
            if cos.shape != sin.shape or 2 * cos.shape[1] > head_dim or cos.dtype != np.float32:
                raise ValueError(f"{name}: cos {cos.shape} and sin {sin.shape} do not fit heads of {head_dim}")
            self._alive += [cos, sin]
            op.cos = <const float *><size_t>cos.ctypes.data
            op.sin = <const float *><size_t>sin.ctypes.data
            op.n_rot = 2 * cos.shape[1]
            self._max_positions = min(self._max_positions, cos.shape[0])
            op.pairing = ROPE_PAIRINGS[pairing]
        self._n_layers = max(self._n_layers, layer + 1)
        self._n_kv_heads, self._head_dim = n_kv_heads, head_dim
        self._max_heads = max(self._max_heads, n_heads)
        return q

    def attention(self, out, q, /, *, layer, n_heads, window=0, softcap=0.0, sinks=None, name):
        """out = softmax(q k) v over the cache of each token's own sequence; sinks (n_heads,) as in `attention_f32`."""
        if self.width(q) != n_heads * self._head_dim:
            raise ValueError(f"{name}: q is {self.width(q)} wide, expected {n_heads} heads of {self._head_dim}")
        if not 0 <= layer < self._n_layers:
            raise ValueError(f"{name}: nothing stores keys and values for layer {layer}")
        self.buffer(out, self.width(q))
        cdef Op *op = self._record(ATTENTION, name, out)
        op.x = self._buffers[q]
        op.layer, op.n_heads, op.n_kv_heads, op.head_dim = layer, n_heads, self._n_kv_heads, self._head_dim
        op.window, op.softcap = window, softcap
        op.weight = self._floats(sinks, (n_heads,), name) if sinks is not None else NULL
        return out

    def select(self, out, x, /, *, name="select"):
        """out = x's rows whose logits are wanted; what is recorded after this works on those rows only."""
        self.buffer(out, self.width(x))
        self._outputs_only = True
        self._record(SELECT, name, out).x = self._buffers[x]
        return out

    def scale(self, out, x, factor, /, *, name):
        """out = factor * x."""
        self.buffer(out, self.width(x))
        cdef Op *op = self._record(SCALE, name, out)
        op.x = self._buffers[x]
        op.factor = factor
        return out

    # Running

    def close(self):
        """Refuse further runs, and end the one that runs, in whatever thread it is, with WoollyError."""
        self._executor.close()

    def run(self, tokens, spans, outputs, logits, /, *, capture=None, times=None, stop=None):
        """Run every operation for one batch.

        Parameters
        ----------
        tokens : int32, (n_tokens,)
            Those of all sequences, one after the other.
        spans : sequence of (KVCache, int, int)
            For each sequence: its cache, the position of its first token here, and how many tokens are here.
        outputs : int32, (n_outputs,)
            Rows of the batch whose logits are wanted.
        logits : float32, (n_outputs, vocab_size), C-contiguous
            Written.
        capture : dict, optional
            Keys are operation names, or `part_names` for single outputs of matmuls that have several; each value
            becomes the float32 (n_rows, width) output of that operation, the first one where it has several.
        times : float64, (n_stages,), optional
            Seconds of each stage are added.
        stop : Stop, optional
            Ends the run from outside, between two stages or while it waits for another run.

        Raises
        ------
        CancelledError
            `stop` was cancelled or its deadline has passed; the caches hold a part of the batch, as for Ctrl-C.
        WoollyError
            The program was closed.
        ValueError
            A token, position, cache or array does not fit the program.
        KeyboardInterrupt
            Ctrl-C was pressed; the caches hold a part of the batch and positions must be rewound.
        """
        tokens = np.ascontiguousarray(tokens, dtype=np.int32)
        outputs = np.ascontiguousarray(outputs, dtype=np.int32)
        self._check(tokens, spans, outputs, logits)
        if len(tokens) == 0:
            return
        positions, span_of = self._expand(spans)
        self._executor.enter(stop)
        try:
            if capture is None:
                self._run_stages(tokens, spans, positions, span_of, outputs, logits, 0, -1, times, stop)
            else:
                self._run_capturing(tokens, spans, positions, span_of, outputs, logits, capture, stop)
        finally:
            self._executor.leave()

    def _check(self, tokens, spans, outputs, logits):
        if tokens.ndim != 1 or len(tokens) > self.max_tokens:
            raise ValueError(f"run: at most {self.max_tokens} tokens in a vector, got shape {tokens.shape}")
        if len(tokens) and not (0 <= tokens.min() and tokens.max() < self._vocab_size):
            raise ValueError(f"run: token ids must be in [0, {self._vocab_size}), got {tokens.min()} to {tokens.max()}")
        if len(outputs) and not (0 <= outputs.min() and outputs.max() < len(tokens)):
            raise ValueError(f"run: outputs must be rows in [0, {len(tokens)}), got {outputs.min()} to {outputs.max()}")
        if logits.shape != (len(outputs), self._logits_width) or logits.dtype != np.float32 or \
                not logits.flags.c_contiguous or not logits.flags.writeable:
            raise ValueError(f"run: logits must be writable C-contiguous float32 ({len(outputs)}, "
                             f"{self._logits_width}), got {logits.dtype} {logits.shape}")
        cdef KVCache cache
        total = 0
        for cache, pos, n in spans:
            if (cache.n_layers, cache.n_kv_heads, cache.head_dim) != (self._n_layers, self._n_kv_heads, self._head_dim):
                raise ValueError(f"run: the cache has {cache.n_layers} layers, {cache.n_kv_heads} heads of "
                                 f"{cache.head_dim}; the program wants {self._n_layers}, {self._n_kv_heads}, "
                                 f"{self._head_dim}")
            if pos < 0 or n < 1 or pos + n > min(cache.n_ctx, self._max_positions):
                raise ValueError(f"run: positions {pos} to {pos + n} are not in a cache of {cache.n_ctx}")
            total += n
        if total != len(tokens) or len({id(span[0]) for span in spans}) != len(spans):
            raise ValueError(f"run: {len(tokens)} tokens, but the spans hold {total}, each with a cache of its own")

    def _expand(self, spans):
        if len(spans) == 1:
            _, pos, n = spans[0]
            return np.arange(pos, pos + n, dtype=np.int32), np.zeros(n, dtype=np.int32)
        positions = np.concatenate([np.arange(pos, pos + n, dtype=np.int32) for _, pos, n in spans])
        return positions, np.repeat(np.arange(len(spans), dtype=np.int32), [n for _, _, n in spans])

    def _run_capturing(self, tokens, spans, positions, span_of, outputs, logits, capture, stop):
        unknown = sorted(set(capture) - set(self.names) - set(self.part_names))
        if unknown:
            raise ValueError(f"capture: no operation named {', '.join(unknown)}")
        cdef int op
        for op in range(self._n_ops):
            self._run_stages(tokens, spans, positions, span_of, outputs, logits, op, op + 1, None, stop)
            name = self.names[op]
            n = len(outputs) if self._ops[op].outputs_only else len(tokens)
            for out in self._parts_of.get(name, ()):
                if f"{name}.{out}" in capture and out != "logits":
                    capture[f"{name}.{out}"] = self._read(out, n)
            if name in capture:
                is_logits = self._out_of[op] == "logits"
                capture[name] = logits.copy() if is_logits else self._read(self._out_of[op], n)

    def _read(self, name, n):
        """float32 (n, width), or (n, slots, width) of rows a pair: best expert first."""
        cdef Buffer *buf = &self._buf[<int>self._buffers[name]]
        cdef int64_t total = n * max(<int64_t>1, buf.pairs), row, source
        out = np.empty((total, buf.width), dtype=np.float32)
        cdef float[:, ::1] view = out
        for row in range(total):
            source = buf.plan.pair[row] if buf.pairs else row
            memcpy(&view[row, 0], buf.data + source * buf.stride, buf.width * sizeof(float))
        return out.reshape(n, buf.pairs, buf.width) if buf.pairs else out

    cdef _run_stages(self, tokens, spans, positions, span_of, outputs, logits, int op_begin, int op_end, times,
                     Stop stop):
        """All stages (op_end < 0), or the single operation [op_begin, op_end)."""
        cdef const int32_t[::1] token_view = tokens, position_view = positions, span_view = span_of
        cdef const int32_t[::1] output_view = outputs
        cdef float[:, ::1] logits_view = logits
        cdef double[::1] times_view = times
        cdef Stage single
        cdef Span[SPANS_ON_STACK] few
        cdef Span *span_array = few
        cdef Run run
        cdef int threads = usable_threads(self.n_threads)
        many = None
        if len(spans) > SPANS_ON_STACK:
            many = np.empty(len(spans) * sizeof(Span), dtype=np.uint8)
            span_array = <Span *><size_t>many.ctypes.data
        memset(&run, 0, sizeof(Run))
        run.kernels = active()
        run.how = active_activations(self.compute)
        run.tokens, run.positions, run.span_of = &token_view[0], &position_view[0], &span_view[0]
        run.n_tokens, run.n_outputs = len(tokens), len(outputs)
        run.outputs = &output_view[0] if len(outputs) else NULL
        run.logits = &logits_view[0, 0] if len(outputs) else NULL
        run.buffers, run.ops = self._buf, self._ops
        run.stages, run.n_stages, run.tasks = self._stages, self._n_stages, self._tasks
        if op_end >= 0:
            single = Stage(op_begin, op_end)
            run.stages, run.n_stages = &single, 1
        if times is not None:
            if times.shape != (self._n_stages,):
                raise ValueError(f"run: times must be ({self._n_stages},), got {times.shape}")
            run.times = &times_view[0]
        self._set_spans(&run, span_array, spans, threads)
        self._set_scratch(&run, threads)
        self._executor.execute(&run, threads, stop)

    cdef _set_spans(self, Run *run, Span *span_array, spans, int threads):
        """The sequences of a run, and whether their attention is split by tiles."""
        cdef KVCache cache
        cdef woolly_kv_head head
        cdef int64_t t0 = 0, n_partial = 0
        cdef int i
        for i, (cache, pos, n) in enumerate(spans):
            head = cache.head(0, 0)
            span_array[i] = Span(t0, n, pos, <uint8_t *>head.k, <uint8_t *>head.v, cache.n_kv_heads * cache.head_bytes,
                                 cache.head_bytes, cache.padded, cache.kv_type)
            n_partial += (pos // 128 + 1) * self._max_heads * (cache.padded + 2)
            t0 += n
        run.spans, run.n_spans = span_array, len(spans)
        # one token a sequence and few of them: let the tiles be tasks, so that all threads have one
        run.split = t0 == len(spans) and len(spans) * self._n_kv_heads < 8 * threads and threads > 1
        if run.split:
            if self._partial is None or self._partial.size < n_partial:
                self._partial = np.empty(2 * n_partial, dtype=np.float32)
            run.partial = <float *><size_t>self._partial.ctypes.data

    cdef _set_scratch(self, Run *run, int threads):
        """Memory of each thread: for attention, or for what one row of an operation needs."""
        cdef int64_t floats = max(job_scratch((self._head_dim + 15) // 16 * 16), (self._max_row_bytes() + 3) // 4)
        run.scratch_floats = (floats + 31) // 16 * 16
        if self._scratch is None or self._scratch.size < run.scratch_floats * threads * 4:
            self._scratch = aligned_empty(run.scratch_floats * threads * 4)
        run.scratch = <float *><size_t>self._scratch.ctypes.data

    def _max_row_bytes(self):
        cdef int i
        cdef int64_t most = 0
        for i in range(self._n_ops):
            if self._ops[i].kind == EMBED:  # the stored blocks
                most = max(most, self._ops[i].table.row_bytes)
            elif self._ops[i].kind == RMSNORM and self._ops[i].accumulate:  # what is added
                most = max(most, 4 * self._buf[self._ops[i].out].width)
        return most

    @property
    def stage_names(self):
        """Name of each stage: its first operation's. Kind of `times`' entries."""
        return [self.names[self._stages[i].begin] for i in range(self._n_stages)]

    @property
    def vocab_size(self):
        """Rows of the embedding table: token ids are below this."""
        return self._vocab_size
