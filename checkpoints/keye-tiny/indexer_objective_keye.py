"""The indexer's objective: KL divergence from the attention's own distribution to the indexer's, tile by tile.

For a query t with support S_t (every visible token in the warm-up, the selected tokens afterwards),

    KL_t = sum over s in S_t of p[t,s] (log p[t,s] - log q[t,s]),   q = softmax over S_t of the indexer's scores I

where p is the main attention over S_t, averaged over its heads and taken as a constant (DeepSeek-V3.2 report, eq. 3
and 4; the mean over heads is the L1-normalised sum). The loss of a layer is the mean over the real tokens of the
batch. Its gradient reaches the indexer's queries, keys and gates and nothing else.

The gradient of a row is known as soon as its value is (dL/dI = q - p), so it is computed along with it and only
multiplied by its scale in the backward pass: neither the scores nor the probabilities outlive their tile.

B batch, S queries, T keys, H query heads, G key groups, D head size, K selected keys, Hi and Di heads and head size of
the indexer.
"""

import torch

from .ops_keye import dense_kl, sparse_kl
from .sparse_attention_keye import resolve_backend
from .triton_common_keye import triton_usable
from .triton_kl_dense_keye import unsupported as _unsupported_dense
from .triton_kl_sparse_keye import unsupported as _unsupported_sparse

# Elements of the largest tile, heads x queries x keys. On two AVX-512 cores 2^19 to 2^22 take the same time; a GPU
# needs more to do per launch.
_TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
_QUERY_BLOCK = 256


class IndexerLoss:
    """The loss of one layer in one forward pass, collected from spans of queries by `add_dense` and `add_sparse`.

    Args:
        q: indexer queries [B, S, Hi, Di], k: indexer keys [B, T, Di], gates: [B, S, Hi] with every constant scale
            inside, as `select_tokens` takes them. Any float dtype; the statistics are float32, float64 for float64.
        query_offset: slot of the first query. key_mask: bool [B, T] at real tokens, or None when all are.
        backend: "auto" takes the Triton kernels on CUDA devices where they can run, PyTorch elsewhere.

    `add_dense` and `add_sparse` raise `ValueError` when a backend that was named cannot run.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        gates: torch.Tensor,
        *,
        query_offset: int = 0,
        key_mask: torch.Tensor | None = None,
        backend: str = "auto",
    ):
        self.backend = backend
        self.inputs = (q, k, gates)
        self.q, self.k, self.gates = (x.detach() for x in self.inputs)
        self.query_offset, self.key_mask = query_offset, key_mask
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.weights = query_weights(q.shape[:2], query_offset, key_mask, q.device, self.dtype)
        self.value = torch.zeros((), dtype=self.dtype, device=q.device)
        self.grads = None
        if torch.is_grad_enabled() and any(x.requires_grad for x in self.inputs):
            # Float16 cannot hold these before the loss scale is on them. Keys collect from many queries.
            wide = self.dtype if q.dtype == torch.float16 else q.dtype
            self.grads = (
                torch.zeros_like(self.q, dtype=wide),
                torch.zeros_like(self.k, dtype=self.dtype),
                torch.zeros_like(self.gates, dtype=self.dtype),
            )

    def add_dense(
        self,
        begin: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        scaling: float,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Queries that attend to all they see: queries [B, n, H, D] from number `begin` on, keys [B, G, T, D].

        The log-sum-exp [B, n, H] of that attention, where it is known, saves the kernels a pass over the keys.
        """
        with torch.no_grad():
            if self._chosen(_unsupported_dense, queries, keys) == "torch":
                self._add_dense_blocks(begin, queries, keys, scaling)
                return
            q, gates, weights, grads = self._part(begin, queries.shape[1])
            place = {"first_slot": self.query_offset + begin, "key_mask": self.key_mask}
            self.value += dense_kl(q, self.k, gates, weights, queries, keys, scaling, **place, lse=lse, grads=grads)

    def _add_dense_blocks(self, begin: int, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        first = self.query_offset + begin
        with torch.autocast(queries.device.type, enabled=False):
            for b in range(queries.shape[0]):
                mask = None if self.key_mask is None else self.key_mask[b]
                for block, last, visible in _blocks(queries, keys, first, mask):
                    place = slice(begin + block.start, begin + block.stop)
                    target = mean_attention(queries[b, block], keys[b, :, :last], visible, scaling, self.dtype)
                    q, gates = self.q[b, place].to(self.dtype), self.gates[b, place].to(self.dtype)
                    k = self.k[b, :last].to(self.dtype)
                    scores = torch.empty_like(target)
                    for tile in _key_tiles(q, last):
                        products = _products(q, k[tile])
                        scores[:, tile] = torch.bmm(gates.unsqueeze(1), products).squeeze(1)
                    grad_scores = self._divergence(scores, target, visible, self.weights[b, place])
                    if self.grads is None:
                        continue
                    grad_q, grad_gates = torch.zeros_like(q), torch.zeros_like(gates)
                    for tile in _key_tiles(q, last):
                        products = _products(q, k[tile])
                        grad_gates += torch.bmm(products, grad_scores[:, tile].unsqueeze(2)).squeeze(2)
                        grad_products = _grad_products(products, gates, grad_scores[:, tile]).flatten(0, 1)
                        grad_q += torch.mm(grad_products, k[tile]).view_as(q)
                        self.grads[1][b, tile] += torch.mm(grad_products.T, q.flatten(0, 1))
                    self.grads[0][b, place], self.grads[2][b, place] = grad_q.to(self.grads[0].dtype), grad_gates

    def add_sparse(
        self,
        begin: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        lse: torch.Tensor,
        selected: torch.Tensor,
        scaling: float,
    ) -> None:
        """Queries that attend to `selected` [B, n, K] (-1 where unused), with the log-sum-exp [B, n, H] of that
        attention; queries [B, n, H, D] from number `begin` on, keys [B, G, T, D]."""
        with torch.no_grad():
            if self._chosen(_unsupported_sparse, queries, keys) == "torch":
                self._add_sparse_blocks(begin, queries, keys, lse, selected, scaling)
                return
            q, gates, weights, grads = self._part(begin, queries.shape[1])
            self.value += sparse_kl(q, self.k, gates, weights, queries, keys, lse, selected, scaling, grads=grads)

    def _add_sparse_blocks(self, begin: int, queries, keys, lse, selected, scaling: float) -> None:
        batch, num_queries, heads, width = queries.shape
        groups, num_selected = keys.shape[1], selected.shape[-1]
        largest = num_selected * max(width, self.k.shape[-1], heads // groups, self.q.shape[2])
        step = max(1, _tile_elements(queries.device) // max(1, largest))
        with torch.autocast(queries.device.type, enabled=False):
            for b in range(batch):
                for start in range(0, num_queries, step):
                    block = slice(start, min(start + step, num_queries))
                    place = slice(begin + block.start, begin + block.stop)
                    picked = selected[b, block]
                    kept = picked >= 0
                    # An unused place repeats a key of the same query: row 0 may be padding.
                    rows = torch.where(kept, picked, picked.amax(dim=-1, keepdim=True).clamp(min=0)).long()
                    target = torch.zeros(rows.shape, dtype=self.dtype, device=rows.device)
                    for g in range(groups):
                        head = slice(g * heads // groups, (g + 1) * heads // groups)
                        near = keys[b, g][rows].to(self.dtype)  # [n, K, D]
                        logits = torch.bmm(queries[b, block, head].to(self.dtype) * scaling, near.transpose(1, 2))
                        target += logits.sub_(lse[b, block, head].to(self.dtype).unsqueeze(-1)).exp_().sum(dim=1)
                    target = (target / heads).masked_fill_(~kept, 0.0)
                    q, gates = self.q[b, place].to(self.dtype), self.gates[b, place].to(self.dtype)
                    k = self.k[b][rows].to(self.dtype)  # [n, K, Di]
                    products = torch.bmm(q, k.transpose(1, 2)).relu_()
                    scores = torch.bmm(gates.unsqueeze(1), products).squeeze(1)
                    grad_scores = self._divergence(scores, target, kept, self.weights[b, place])
                    if self.grads is None:
                        continue
                    self.grads[2][b, place] = torch.bmm(products, grad_scores.unsqueeze(2)).squeeze(2)
                    grad_products = _grad_products(products, gates, grad_scores)
                    self.grads[0][b, place] = torch.bmm(grad_products, k).to(self.grads[0].dtype)
                    grad_k = torch.bmm(grad_products.transpose(1, 2), q)
                    self.grads[1][b].index_add_(0, rows.flatten(), grad_k.flatten(0, 1))

    def _chosen(self, unsupported, queries, keys) -> str:
        """The backend that computes for these inputs; raises `ValueError` when the one that was named cannot."""
        asked = self.backend == "triton" or (self.backend == "auto" and queries.is_cuda)
        problem = (
            unsupported(queries, keys, self.q, self.k) if asked and triton_usable(queries.device) is None else None
        )
        dtypes = (queries.dtype, keys.dtype, self.q.dtype, self.k.dtype, self.gates.dtype)
        return resolve_backend(self.backend, queries.device, *dtypes, problem=problem)

    def _part(self, begin: int, count: int):
        """Indexer queries, gates, weights and gradients (or None) of `count` queries."""
        place = slice(begin, begin + count)
        grads = self.grads and (self.grads[0][:, place], self.grads[1], self.grads[2][:, place])
        return self.q[:, place], self.gates[:, place], self.weights[:, place], grads

    def _divergence(self, scores, target, support, weights) -> torch.Tensor:
        """Adds the weighted KL of the rows [n, T] to the value; returns its gradient by the scores."""
        scores.masked_fill_(~support, torch.finfo(scores.dtype).min)
        mass = target.sum(dim=-1, keepdim=True)  # 1 up to rounding, 0 in a row without a key
        norm = scores.logsumexp(dim=-1, keepdim=True)
        rows = (torch.special.xlogy(target, target) - target * scores).sum(dim=-1) + (norm * mass).squeeze(-1)
        # A weight of 0 must win over whatever a row without a key gives.
        self.value += (rows.masked_fill(weights == 0, 0.0) * weights).sum()
        return (scores.sub_(norm).exp_().mul_(mass) - target).mul_(weights.unsqueeze(-1)).masked_fill_(~support, 0.0)

    def result(self) -> torch.Tensor:
        """The loss [], with a gradient to the indexer's tensors that asked for one."""
        if self.grads is None:
            return self.value
        return _KnownGradient.apply(self.value, *self.inputs, *self.grads)


class _KnownGradient(torch.autograd.Function):
    """A value whose gradients by q, k and gates are there already."""

    @staticmethod
    def forward(ctx, value, q, k, gates, *grads):
        ctx.save_for_backward(*grads)
        ctx.dtypes = (q.dtype, k.dtype, gates.dtype)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        grads = (
            (grad * known).to(dtype) if needed else None
            for known, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1:4])
        )
        return None, *grads, None, None, None


@torch.no_grad()
def caught_mass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    selected: torch.Tensor,
    *,
    scaling: float,
    query_offset: int,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Share of the dense attention (mean over heads) that falls on the selected tokens, per query.

    queries [B, n, H, D] at the slots from `query_offset` on, keys [B, G, T, D], selected int32 [B, n, K] -> [B, n].
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    caught = torch.zeros(queries.shape[:2], dtype=dtype, device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        for b in range(queries.shape[0]):
            mask = None if key_mask is None else key_mask[b]
            for block, last, visible in _blocks(queries, keys, query_offset, mask):
                mass = mean_attention(queries[b, block], keys[b, :, :last], visible, scaling, dtype)
                picked = selected[b, block].long()
                caught[b, block] = mass.gather(1, picked.clamp(min=0)).masked_fill(picked < 0, 0.0).sum(dim=-1)
    return caught


def query_weights(
    shape: torch.Size, query_offset: int, key_mask: torch.Tensor | None, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """[B, S]: 1 / number of real queries of the batch at real queries, 0 at padding."""
    if key_mask is None:
        return torch.full(shape, 1 / shape.numel(), dtype=dtype, device=device)
    real = key_mask[:, query_offset : query_offset + shape[1]]
    return real.to(dtype) / real.sum().clamp(min=1)


def _tile_elements(device: torch.device) -> int:
    return _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS["cpu"])


def _blocks(queries: torch.Tensor, keys: torch.Tensor, first: int, key_mask: torch.Tensor | None):
    """(slice of the queries, number of keys the last of them sees, visible [n, keys]); query 0 stands at `first`."""
    num_queries, heads = queries.shape[1:3]
    in_group = heads // keys.shape[1]
    step = max(1, min(_QUERY_BLOCK, _tile_elements(queries.device) // (in_group * (first + num_queries))))
    for begin in range(0, num_queries, step):
        end = min(begin + step, num_queries)
        last = first + end
        slots = torch.arange(first + begin, last, device=queries.device)
        visible = torch.arange(last, device=queries.device) <= slots[:, None]
        yield slice(begin, end), last, visible if key_mask is None else visible & key_mask[:last]


def _key_tiles(q: torch.Tensor, num_keys: int):
    step = max(64, _tile_elements(q.device) // (q.shape[0] * q.shape[1]))
    return (slice(begin, min(begin + step, num_keys)) for begin in range(0, num_keys, step))


def mean_attention(queries, keys, visible, scaling, dtype) -> torch.Tensor:
    """Attention of queries [n, H, D] over the visible of keys [G, T, D], mean over the heads: [n, T]."""
    num_queries, heads, _ = queries.shape
    groups, num_keys, _ = keys.shape
    grouped = queries.transpose(0, 1).to(dtype).mul(scaling).reshape(groups, -1, queries.shape[-1])
    step = max(1, _tile_elements(queries.device) // (grouped.shape[1] * num_keys))
    mean = torch.zeros(num_queries, num_keys, dtype=dtype, device=queries.device)
    for begin in range(0, groups, step):
        part = slice(begin, begin + step)
        logits = torch.bmm(grouped[part], keys[part].to(dtype).transpose(1, 2)).view(-1, num_queries, num_keys)
        mean += logits.masked_fill_(~visible, torch.finfo(dtype).min).softmax(dim=-1).sum(dim=0)
    return mean.div_(heads).masked_fill_(~visible, 0.0)


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """relu(q . k) of q [n, Hi, Di] with k [T, Di]: [n, Hi, T]."""
    return torch.mm(q.flatten(0, 1), k.T).relu_().view(*q.shape[:2], -1)


def _grad_products(products: torch.Tensor, gates: torch.Tensor, grad_scores: torch.Tensor) -> torch.Tensor:
    """Gradient by q . k before the ReLU, in place of its result `products` [n, Hi, T]."""
    return products.sign_().mul_(gates.unsqueeze(2)).mul_(grad_scores.unsqueeze(1))


class LossScale:
    """What the loss that a backward pass starts from multiplies this model's loss by; `value` is None until known."""

    def __init__(self):
        self.value: torch.Tensor | float | None = None


class _FollowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, scale, share):
        ctx.scale, ctx.share = scale, share
        return loss.clone()  # no view: `Trainer` multiplies its loss in place

    @staticmethod
    def backward(ctx, grad):
        ctx.scale.value = grad * ctx.share
        return grad, None, None


class _AttachObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, objective, coefficient, scales):
        ctx.coefficient, ctx.scales = coefficient, scales
        ctx.save_for_backward(objective)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad):
        (objective,) = ctx.saved_tensors
        scale = next((scale.value for scale in ctx.scales if scale.value is not None), 1.0)
        if isinstance(scale, torch.Tensor):
            scale = scale.to(objective.device, objective.dtype)
        grad_objective = torch.zeros_like(objective)
        grad_objective[0] = ctx.coefficient * scale
        return grad, grad_objective, None, None


def follow_loss(loss: torch.Tensor, scale: LossScale, share: torch.Tensor | float = 1.0) -> torch.Tensor:
    """`loss` unchanged; its backward pass writes the gradient that reaches it, times `share`, into `scale`.

    Divisions by accumulation steps and loss scaling of mixed precision come after the loss, so they are in there.
    """
    return _FollowLoss.apply(loss, scale, share)


def attach_objective(
    hidden_states: torch.Tensor, objective: torch.Tensor, coefficient: float, scales: tuple[LossScale, ...]
) -> torch.Tensor:
    """`hidden_states` unchanged; their backward pass gives `objective[0]` the gradient coefficient x scale.

    The scale is that of the first of `scales` whose value is known, else 1.
    """
    return _AttachObjective.apply(hidden_states, objective, coefficient, scales)


def labelled_share(labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor | float:
    """Part of an optimizer step's labels that stand in this batch, labels [B, S]: 1 when their number is not known.

    A loss that is divided by the labels of the whole step is not divided by accumulation steps; this is its weight.
    """
    if num_items is None:
        return 1.0
    count = (labels[..., 1:] != -100).sum()
    return count / (num_items.to(count.device) if isinstance(num_items, torch.Tensor) else num_items)
