"""Sums over examples from which scores and their standard errors follow. Sums add, so shards do."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class NodeStatistics:
    """Running sums of `q`, each example's squared mask gradient, per score name; float64, (nodes,)."""

    examples: int = 0
    total: dict[str, Tensor] = field(default_factory=dict)
    total_squares: dict[str, Tensor] = field(default_factory=dict)

    def add(self, squares: dict[str, Tensor]) -> None:
        """Add a batch: `squares` by score name, (batch, nodes)."""
        for site, q in squares.items():
            q = q.detach().to("cpu", torch.float64)
            self._accumulate(site, q.sum(0), (q**2).sum(0))
        self.examples += len(next(iter(squares.values())))

    def merge(self, other: "NodeStatistics") -> None:
        """Add another shard's sums."""
        for site in other.total:
            self._accumulate(site, other.total[site], other.total_squares[site])
        self.examples += other.examples

    def scores(self) -> dict[str, Tensor]:
        """`F_i`: the mean of `q` over examples."""
        return {site: total / self.examples for site, total in self.total.items()}

    def standard_errors(self, population: int) -> dict[str, Tensor]:
        """Of each score: `sqrt(var(q) / n * (1 - n / population))`, zero when every row was scored.

        Scores are heavy-tailed; below a few hundred examples these are too small.
        """
        n = self.examples
        if n < 2 or population <= n:
            return {site: torch.zeros_like(total) for site, total in self.total.items()}
        errors = {}
        for site, total in self.total.items():
            variance = (self.total_squares[site] - total**2 / n).clamp_min(0) / (n - 1)
            errors[site] = (variance / n * (1 - n / population)).sqrt()
        return errors

    def _accumulate(self, site: str, total: Tensor, squares: Tensor) -> None:
        if site in self.total:
            self.total[site] = self.total[site] + total
            self.total_squares[site] = self.total_squares[site] + squares
        else:
            self.total[site], self.total_squares[site] = total, squares
