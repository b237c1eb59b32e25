"""Sums over examples, from which scores and their standard errors follow. Sums of shards can be added."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.methods import Normalize
from worker.engine.tasks.kind import TINY

STANDARD_ERROR = ".stderr"
SUMS = (".sum", ".sum_squares", ".sum_products")


@dataclass
class NodeStatistics:
    """Running sums over examples, by score name; float64, (nodes,).

    Let `q` be an example's squared mask gradients and `m` their mean over the name's nodes. The sums are those of `q`,
    `q^2` and `q m`. The sums of `m` and `m^2` are the means over nodes of the first and the third.
    """

    examples: int = 0
    total: dict[ScoreName, Tensor] = field(default_factory=dict)
    total_squares: dict[ScoreName, Tensor] = field(default_factory=dict)
    total_products: dict[ScoreName, Tensor] = field(default_factory=dict)

    def add(self, squares: Mapping[ScoreName, Tensor]) -> None:
        """Add a batch: `squares` by score name, (batch, nodes)."""
        for site, q in squares.items():
            q = q.detach().to("cpu", torch.float64)
            self._accumulate(site, q.sum(0), q.square().sum(0), q.mean(1) @ q)
        self.examples += len(next(iter(squares.values())))

    def merge(self, other: "NodeStatistics") -> None:
        """Add another shard's sums."""
        for site in other.total:
            self._accumulate(site, other.total[site], other.total_squares[site], other.total_products[site])
        self.examples += other.examples

    def scores(self) -> dict[ScoreName, Tensor]:
        """Return `F_i`, the mean of `q` over examples."""
        return {site: total / self.examples for site, total in self.total.items()}

    def standard_errors(self, population: int) -> dict[ScoreName, Tensor]:
        """Compute each score's standard error, `sqrt(var(q) / n * (1 - n / population))`; 0 if every row was scored.

        Scores are heavy-tailed: below a few hundred examples these errors are too small.
        """
        return {site: variance.sqrt() for site, variance, _, _ in self._covariances(population)}

    def relative_errors(
        self, population: int, normalize: Normalize = "layer", floor: float = 0.0
    ) -> dict[ScoreName, Tensor]:
        """Compute `rho_i`, a score's standard error after normalisation and floor, over that score; 0 where that is 0.

        - `layer`: `F' = F_i / M` with `M` the mean over the name's nodes. By the delta method its variance is that of
          the mean of `u = (q_i - F' m) / M`, in which a factor of an example's gradients at all nodes cancels.
        - `none`: the error is that of `F_i` itself.
        - `model`: the error is an upper bound, `rho_i + sum_k F_k^2 rho_k / sum_k F_k^2`. The second part bounds the
          norm's error by the triangle inequality, because the sums do not tell how nodes of different layers covary.

        A node at the floor has the error of its layer's mean, which normalisation by layer makes a constant.
        """
        scores = self.scores()
        found, unfloored = {}, {}
        for site, variance, with_mean, of_mean in self._covariances(population):
            score = scores[site]
            mean = score.mean()
            relative, floored = _ratio(variance, score**2), _ratio(of_mean, mean**2)
            if normalize == "layer":
                relative = relative - 2 * _ratio(with_mean, score * mean) + floored
                floored = torch.zeros_like(floored)
            unfloored[site] = torch.where(score > 0, relative, 0.0).clamp_min(0).sqrt()
            found[site] = torch.where(score < floor * mean, floored.sqrt(), unfloored[site])
        if normalize == "model":
            for kind in dict.fromkeys(site.kind for site in found):
                sites = [site for site in found if site.kind == kind]
                squares = torch.cat([scores[site] ** 2 for site in sites])
                of_norm = _ratio((squares * torch.cat([unfloored[site] for site in sites])).sum(), squares.sum())
                found |= {site: found[site] + of_norm for site in sites}
        return found

    def named(self) -> dict[str, Tensor]:
        """Return the sums as `<score name>.sum`, `.sum_squares` and `.sum_products`, to be kept."""
        sums = (self.total, self.total_squares, self.total_products)
        return {f"{site}{suffix}": of[site] for suffix, of in zip(SUMS, sums, strict=True) for site in of}

    @classmethod
    def from_named(cls, examples: int, names: Iterable[ScoreName], tensors: Mapping[str, Tensor]) -> Self:
        """Read the sums of these scores from the result of `named`, which may be among other tensors."""
        sums = [{name: tensors[f"{name}{suffix}"] for name in sorted(names)} for suffix in SUMS]
        return cls(examples, *sums)

    def _covariances(self, population: int) -> Iterator[tuple[ScoreName, Tensor, Tensor, Tensor]]:
        """Yield, by score name, the variances and the covariance of the means over examples of `q` and `m`.

        The order is: variance of `q`'s mean, covariance, variance of `m`'s mean. They are those of a sample without
        replacement, and zero for one example alone or for all of them.
        """
        n = self.examples
        nothing_to_tell = n < 2 or population <= n
        factor = 0.0 if nothing_to_tell else (1 - n / population) / n / (n - 1)
        for site, total in self.total.items():
            products = self.total_products[site]
            mean = total.mean()
            variance = (self.total_squares[site] - total**2 / n).clamp_min(0)
            of_mean = (products.mean() - mean**2 / n).clamp_min(0)
            yield site, factor * variance, factor * (products - total * mean / n), factor * of_mean

    def _accumulate(self, site: ScoreName, total: Tensor, squares: Tensor, products: Tensor) -> None:
        for of, new in ((self.total, total), (self.total_squares, squares), (self.total_products, products)):
            of[site] = of[site] + new if site in of else new


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; the result is 0 where the denominator is."""
    return torch.where(denominator > 0, numerator / denominator.clamp_min(TINY), 0.0)
