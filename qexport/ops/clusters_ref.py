"""The torch reference of the tree over keys or values (docs/math.md, "Clusters" and "Summaries")."""

import math

import torch

LEAF, CHUNK = 16, 512  # keys of a cluster, keys that clusters do not reach over when causal
DIRECTION_KEYS = 256


class Tree:
    """Clusters of the keys of one (batch, kv head), with their summaries."""

    def __init__(self, K, V, kept, causal, leaf=LEAF):
        n = K.shape[0]
        self.K, self.V, self.kept, self.leaf = K, V, kept, leaf
        self.clusters = math.ceil(n / leaf)
        self.members = [[] for _ in range(self.clusters)]
        for first in range(0, n, CHUNK if causal else n):
            keys = [j for j in range(first, min(n, first + CHUNK) if causal else n) if kept[j]]
            for i, members in enumerate(leaves(K, torch.tensor(keys, dtype=torch.long), leaf)):
                self.members[first // leaf + i] = members.tolist()
        used = [m for m in self.members if m]
        self.count = torch.tensor([len(m) for m in self.members], dtype=K.dtype)
        self.mean, self.variance = K.new_zeros(self.clusters, K.shape[1]), K.new_zeros(self.clusters, K.shape[1])
        self.value, self.spread = V.new_zeros(self.clusters, V.shape[1]), V.new_zeros(self.clusters)
        for c, m in enumerate(self.members):
            if m:
                k, v = K[m], V[m]
                self.mean[c], self.variance[c] = k.mean(0), k.var(0, unbiased=False)
                self.value[c], self.spread[c] = v.mean(0), v.var(0, unbiased=False).sum()
        self.step = 2 if causal else max(1, math.ceil(len(used) / 64))
        self.causal = causal

    def slope(self, clusters):
        """B, from clusters before this one if causal."""
        total, keys = self.K.new_zeros(self.K.shape[1], self.V.shape[1]), 0
        for m in self.members[: clusters if self.causal else None : self.step]:
            if m:
                total += (self.K[m] - self.K[m].mean(0)).T @ (self.V[m] - self.V[m].mean(0))
                keys += len(m)
        return total / max(keys, 1)


def leaves(X, rows, leaf=LEAF):
    """The clusters of the tree over rows of X.

    Args:
        X: (n, size). rows: int64 tensor, those that belong to the tree, in order. leaf: rows of a cluster.

    Returns:
        list of int64 tensors: the rows of each cluster, all full but the last.
    """
    if len(rows) <= leaf:
        return [rows] if len(rows) else []
    some = X[rows if len(rows) <= DIRECTION_KEYS else rows[torch.arange(DIRECTION_KEYS) * len(rows) // DIRECTION_KEYS]]
    x = some - some.mean(0)
    u = torch.zeros_like(x[0])
    u[x.square().sum(0).argmax()] = 1
    for _ in range(3):
        step = x.T @ (x @ u)
        u = step / step.norm() if step.norm() > 0 else u
    left = leaf * math.ceil(math.ceil(len(rows) / leaf) / 2)
    first = torch.zeros(len(rows), dtype=torch.bool)
    first[torch.argsort(X[rows] @ u, stable=True)[:left]] = True
    return leaves(X, rows[first], leaf) + leaves(X, rows[~first], leaf)
