"""The torch reference of strategy `tree` (docs/math.md), written to be read and checked, not to be fast."""

import math
from dataclasses import dataclass

import torch

from qexport.ops.clusters_ref import CHUNK, LEAF, Tree
from qexport.ops.draws_ref import T, inclusion_scale
from qexport.ops.philox import philox4x32

FEWEST_QUERIES, FEWEST_KEYS, MOST_DENSITY = 32, 256, 0.5
QUERIES_FOR_TOLERANCE, KEYS_FOR_TOLERANCE = 1024, 200
MASKED = -1e4
HALF_SAMPLE, PROBES, TRIALS, AUDIT_ROWS, AUDIT_DRAW = 4, 3, 2, 128, 2
MARGIN = 0.8


def kept_keys(attn_mask, a, batch, q_len, total_len):
    """Keys that the mask leaves to all rows of a batch item, bool (batch, total_len); None where the call is exact."""
    reach = total_len - q_len / 2 if a["is_causal"] else total_len
    read = min(a["num_samples"]) + (CHUNK / 2 if a["is_causal"] else 0)
    if q_len < FEWEST_QUERIES or total_len < FEWEST_KEYS or read > MOST_DENSITY * reach:
        return None
    tolerance = a["error_tolerance"]
    if tolerance and (q_len < QUERIES_FOR_TOLERANCE or total_len * tolerance < KEYS_FOR_TOLERANCE):
        return None
    if a["softcap"] or a["left_window_size"] >= 0 or a["right_window_size"] >= 0:
        return None
    if attn_mask is None:
        return torch.ones(batch, total_len, dtype=torch.bool)
    mask = attn_mask.reshape(*[1] * (4 - attn_mask.ndim), *attn_mask.shape)
    if (mask != mask[:, :1, :1]).any():
        return None
    mask = mask[:, 0, 0].expand(batch, -1)
    kept = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not ((kept | (mask <= MASKED)).all() and kept.any(1).all()):
        return None
    return torch.nn.functional.pad(kept, (0, total_len - mask.shape[1]), value=False)


@dataclass(frozen=True)
class Blocks:
    """Keys of a cluster, and queries that share a choice of clusters: what differs between devices (docs/math.md)."""

    keys: int = LEAF
    queries: int = 32


CPU, CUDA = Blocks(), Blocks(keys=64, queries=128)


def tree_attention_ref(Q, K, V, kept, offset, a, seed, blocks=CPU):
    """Y and error_estimate of strategy `tree`.

    Args:
        Q: (batch, q_heads, q_len, head_size), scaled. K, V: (batch, kv_heads, total_len, ...).
        kept: bool (batch, total_len), the keys that padding and mask leave.
        offset: position of the first query of each batch item.
        a: attributes of the op. seed: int of 64 bits.
        blocks: those of the device.
    """
    batch, q_heads = Q.shape[:2]
    group = q_heads // K.shape[1]
    Y, errors = Q.new_zeros(*Q.shape[:3], V.shape[-1]), torch.zeros(batch, q_heads)
    for b in range(batch):
        trees = [Tree(K[b, h], V[b, h], kept[b], bool(a["is_causal"]), blocks.keys) for h in range(K.shape[1])]
        heads = [
            Head(
                trees[h // group], Q[b, h], int(offset[b]), b * q_heads + h, a, seed, _budget(a, h, trees[0]), blocks.queries
            )
            for h in range(q_heads)
        ]
        if a["error_tolerance"]:
            for head in heads:
                head.settle()
        elif len(a["num_samples"]) == 1 and not a["is_causal"] and heads[0].budget < trees[0].clusters:
            _share(heads)
        for h, head in enumerate(heads):
            Y[b, h], errors[b, h] = head.run()
    return Y, errors


def _budget(a, h, tree):
    return min(math.ceil(a["num_samples"][h % len(a["num_samples"])] / tree.leaf), tree.clusters)


@dataclass
class Head:
    """One query head of one batch item."""

    tree: Tree
    Q: torch.Tensor
    offset: int
    place: int
    a: dict
    seed: int
    budget: int
    tile_rows: int
    threshold: float = 0.0

    @property
    def tiles(self):
        return math.ceil(len(self.Q) / self.tile_rows)

    def run(self):
        if self.budget >= self.tree.clusters:
            return self.exact(torch.arange(len(self.Q))), 0.0
        Y = torch.cat([self.tile(t, self.budget) for t in range(self.tiles)])
        rows = self.audit_rows()
        exact = self.exact(rows)
        norm = exact.norm()
        error = float((Y[rows] - exact).norm() / norm) if norm > 0 else 0.0
        if self.a["error_tolerance"] and error > MARGIN * self.a["error_tolerance"]:
            return self.exact(torch.arange(len(self.Q))), 0.0
        return Y, error

    def exact(self, rows):
        scores = torch.where(self.allowed(rows), self.Q[rows] @ self.tree.K.T, -torch.inf)
        return torch.softmax(scores, -1).nan_to_num(0.0) @ self.tree.V

    def allowed(self, rows):
        allowed = self.tree.kept.expand(len(rows), -1)
        if self.a["is_causal"]:
            allowed = allowed & (torch.arange(len(self.tree.K)) <= rows[:, None] + self.offset)
        return allowed

    def rows(self, tile):
        return torch.arange(tile * self.tile_rows, min(len(self.Q), (tile + 1) * self.tile_rows))

    def probe(self, i):
        return self.tiles * (2 * (PROBES - i) - 1) // (2 * PROBES)

    def open(self, tile):
        """Keys from here on are read as they come, and clusters that may be chosen lie before."""
        if not self.a["is_causal"]:
            return self.tree.clusters * self.tree.leaf, self.tree.clusters
        first = max(tile * self.tile_rows + self.offset, 0) // CHUNK * CHUNK
        return first, min(first // self.tree.leaf, self.tree.clusters)

    def model(self, tile, candidates):
        """log w and g of the clusters that may be chosen: (rows, candidates) and (candidates,)."""
        q, tree = self.Q[self.rows(tile)], self.tree
        s2 = q.square() @ tree.variance[:candidates].T
        t = (s2 - 2).clamp(min=0)
        log_w = q @ tree.mean[:candidates].T + (s2.clamp(max=2) + t / (1 + t / 4)) / 2 + tree.count[:candidates].log()
        share = torch.softmax(log_w, -1).nan_to_num(0.0)
        g = (share.square() * (s2.clamp(max=30 * math.log(2)).exp() - 1)).sum(0) * tree.spread[:candidates]
        return log_w, g

    def tile(self, tile, budget, choose=True):
        """The output of a tile; with choose=False of centroids alone."""
        first, candidates = self.open(tile)
        rows, tree = self.rows(tile), self.tree
        if budget >= candidates and choose:
            return self.exact(rows)
        log_w, g = self.model(tile, candidates)
        if choose and self.threshold > 0:
            budget = min(max((g >= self.threshold).sum().item(), math.ceil(budget / 4)), 4 * budget)
            if budget >= candidates:
                return self.exact(rows)
        chosen = torch.zeros(candidates, dtype=torch.bool)
        if choose:
            chosen[torch.argsort(g, descending=True, stable=True)[:budget]] = True
        q = self.Q[rows]
        read = torch.zeros(len(tree.K), dtype=torch.bool)
        read[[j for c in torch.nonzero(chosen)[:, 0].tolist() for j in tree.members[c]]] = True
        read[first:] = True
        scores = torch.where(self.allowed(rows) & read, q @ tree.K.T, -torch.inf)
        tail = torch.where(chosen, -torch.inf, log_w)
        top = torch.cat([scores, log_w], 1).amax(1, keepdim=True)
        top = torch.where(top > -torch.inf, top, 0)
        e, w = (scores - top).exp(), (tail - top).exp()
        shift = q @ tree.slope(candidates)
        numerator, total = e @ tree.V + w @ tree.value[:candidates] + w.sum(1, keepdim=True) * shift, e.sum(1) + w.sum(1)
        if choose and self.a["residual"] in ("unbiased", "james_stein"):
            numerator, total = self.correct(tile, numerator, total, g, chosen, (log_w - top).exp(), q, top, shift)
        return torch.where(total > 0, 1 / total, 0)[:, None] * numerator

    def correct(self, tile, numerator, total, g, chosen, w, q, top, shift):
        tree, y = self.tree, numerator / total[:, None]
        open_clusters = ~chosen & (tree.count[: len(g)] > 0)
        root = torch.where(open_clusters, g.sqrt(), 0)
        x = torch.where(open_clusters, root + 0.25 * root.sum() / open_clusters.sum().clamp(min=1), 0)
        halves = []
        for h in range(2):
            word = philox4x32(self.seed, self.a["layer"], *(torch.tensor(i) for i in (self.place, tile, h)))[0]
            extra, extra_total = torch.zeros_like(numerator), torch.zeros_like(total)
            for c, factor in systematic_sample(x, HALF_SAMPLE, int(word)):
                m = tree.members[c]
                e = (q @ tree.K[m].T - top).exp()
                extra += factor * (e @ tree.V[m] - w[:, c, None] * (tree.value[c] + shift))
                extra_total += factor * (e.sum(1) - w[:, c])
            halves.append((extra, extra_total))
        shrink = 1.0
        if self.a["residual"] == "james_stein":
            d0, d1 = ((n - z[:, None] * y) / total[:, None] for n, z in halves)
            square = ((d0 + d1) / 2).square().sum()
            shrink = float(((d0 * d1).sum() / square).clamp(0, 1)) if square > 0 else 0.0
        numerator = numerator + shrink / 2 * (halves[0][0] + halves[1][0])
        return numerator, torch.maximum(total + shrink / 2 * (halves[0][1] + halves[1][1]), total / 2)

    def audit_rows(self):
        n = len(self.Q)
        parts = min(AUDIT_ROWS, n)
        rows = []
        for part in range(parts):
            first, end = part * n // parts, (part + 1) * n // parts
            counter = (torch.tensor(i) for i in (self.place, part, AUDIT_DRAW))
            rows.append(first + (int(philox4x32(self.seed, self.a["layer"], *counter)[0]) * (end - first) >> 32))
        return torch.tensor(rows)

    def settle(self):
        """The least budget, doubled, that keeps the tolerance on the trial tiles."""
        clusters, limit = self.tree.clusters, (MARGIN * self.a["error_tolerance"]) ** 2
        budgets = [self.budget << i for i in range(16) if self.budget << i <= MOST_DENSITY * clusters]
        errors, norm = [0.0] * len(budgets), 0.0
        for i in range(TRIALS):
            tile = self.probe(i)
            exact = self.exact(self.rows(tile))
            norm += float(exact.square().sum())
            errors = [e + float((self.tile(tile, k) - exact).square().sum()) for e, k in zip(errors, budgets, strict=True)]
            if not budgets or errors[-1] > limit * norm:
                self.budget = clusters
                return
        self.budget = next(k for e, k in zip(errors, budgets, strict=True) if e <= limit * norm)


def systematic_sample(x, size, word):
    """(place, 1 / pi) of a systematic pi-ps sample of `size` of x; as `stratified`."""
    if not x.sum() > 0:
        return []
    scale = inclusion_scale(x, torch.tensor(float(size), dtype=x.dtype))
    f = torch.where(x > 0, (scale * x).clamp(max=1).mul(T).floor().clamp(max=T - 1) + 1, 0).long()
    strata = (f.cumsum(0) + (T - 1) - (word >> 8)) >> 24
    chosen = strata != torch.nn.functional.pad(strata, (1, 0))[:-1]
    return [(c, T / int(f[c])) for c in torch.nonzero(chosen)[:, 0].tolist()]


def _share(heads):
    """Thresholds such that the probe tiles of the heads of a batch item read the budget on average."""
    budget = heads[0].budget
    least, most = math.ceil(budget / 4), 4 * budget
    scores, norms = [], []
    for head in heads:
        tiles = [head.probe(i) for i in range(PROBES)]
        scores.append([head.model(t, head.open(t)[1])[1] for t in tiles])
        norms.append(sum(float(head.tile(t, 0, choose=False).square().sum()) for t in tiles) / PROBES)

    def read(tau):
        return sum(
            min(max(int((g >= tau * norm).sum()), least), most)
            for probes, norm in zip(scores, norms, strict=True)
            for g in probes
        )

    low, high = -60.0, 0.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if read(2**middle) > len(heads) * PROBES * budget else (low, middle)
    for head, norm in zip(heads, norms, strict=True):
        head.threshold = 2**high * norm
