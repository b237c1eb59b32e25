"""`featcal`, see its catalog entry.

The authors' code is for CLIP; here tokens that the head does not read are found by what its outputs depend on. Where
models have weights, which the paper does not have, model j's sums count `lambda_j` times the number of models. Norms
that are no layer norms, and layers outside of the blocks, such as a pooler, stay as the start has them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from worker.engine.catalog.families import Kind
from worker.engine.catalog.methods import FeatCalParameters, MethodParameters
from worker.engine.catalog.planning.plan import MergePlan, required_family
from worker.engine.merging.methods.starting import build
from worker.engine.merging.refits.block_refits import Pair, lambdas_at, refit_blocks
from worker.engine.merging.refits.comparison import Expert
from worker.engine.merging.refits.linear_groups import LinearGroup, augmented, bias_of
from worker.engine.merging.refits.regression import Products
from worker.engine.runtime.device import Precision

__all__ = ["build", "refit"]

OF_ALL_TOKENS = (Kind.KEY, Kind.VALUE)
"""Layers of the last block that count all tokens alike, since the tokens that are read attend to these."""


def refit(
    plan: MergePlan,
    start: Mapping[str, Tensor],
    experts: Sequence[Expert],
    parameters: MethodParameters,
    precision: Precision,
    on_group: Callable[[], None],
) -> dict[str, Tensor]:
    from worker.engine.merging.backbone import base_alone  # imported here because it imports the methods

    if not isinstance(parameters, FeatCalParameters):
        raise TypeError(f"parameters of featcal expected, got {type(parameters).__name__}")
    base = base_alone(plan)
    anchors = {
        name: torch.lerp(base[name].double(), tensor.double(), parameters.anchor) if name in base else tensor.double()
        for name, tensor in start.items()
    }
    return refit_blocks(plan, start, experts, precision, on_group, partial(_block, plan, parameters, anchors))


@dataclass(frozen=True)
class LinearSums:
    """Means over a model's tokens: x of the merge, augmented by 1, and d, the expert's inputs minus the merge's."""

    moment: Tensor
    """Mean of `x x^T`, (inputs + 1, inputs + 1), float64."""
    shift: Tensor
    """Mean of `d x^T`, (inputs, inputs + 1), float64."""


@dataclass
class NormSums:
    """Weighted sums over a model's tokens of z, the merge's normalised values, and of their squares, (width,)."""

    first: Tensor
    second: Tensor
    count: Tensor


def calibrated_linear(
    sums: Sequence[LinearSums],
    layers: Sequence[Tensor],
    shares: Tensor,
    anchor: Tensor,
    *,
    teacher: float,
    strength: float,
) -> Tensor:
    """Solve for a linear layer.

    Args:
        layers: the experts' weights with a last column of biases, (outputs, inputs + 1), float64.
        shares: weights of the models, summing to their number.
        anchor: the same of the anchor.

    Returns:
        (outputs, inputs + 1), float64.
    """
    outputs, inputs = anchor.shape[0], anchor.shape[1] - 1
    left = strength * torch.eye(inputs, dtype=torch.float64, device=anchor.device)
    right = strength * anchor[:, :inputs]
    scales = [share / of.moment[:inputs, :inputs].norm() for share, of in zip(shares, sums, strict=True)]
    for scale, of, layer in zip(scales, sums, layers, strict=True):
        left += scale * of.moment[:inputs, :inputs]
        asked = of.moment[:inputs, :inputs] + teacher * of.shift[:, :inputs]
        right = right + scale * (layer[:, :inputs] @ asked)
    weight = torch.linalg.solve(left, right, left=False)
    total = strength * anchor[:, inputs]
    for scale, of, layer in zip(scales, sums, layers, strict=True):
        mean = of.moment[:inputs, inputs]
        total = total + scale * (
            layer[:, inputs] + layer[:, :inputs] @ (mean + teacher * of.shift[:, inputs]) - weight @ mean
        )
    bias = total / (torch.stack(scales).sum() + strength)
    return torch.cat([weight, bias.view(outputs, 1)], dim=1)


def calibrated_norm(
    sums: Sequence[NormSums],
    norms: Sequence[tuple[Tensor, Tensor]],
    shares: Tensor,
    anchor: tuple[Tensor, Tensor],
    strength: float,
) -> tuple[Tensor, Tensor]:
    """Solve for factor and shift of a layer norm, (width,) each, float64: those of the experts are `norms`."""
    energy, mean, one = strength + torch.zeros_like(anchor[0]), torch.zeros_like(anchor[0]), strength + shares.sum()
    for_factor, for_shift = strength * anchor[0], strength * anchor[1]
    for share, of, (factor, shift) in zip(shares, sums, norms, strict=True):
        second, first = share * of.second / of.count, share * of.first / of.count
        energy, mean = energy + second, mean + first
        for_factor = for_factor + second * factor + first * shift
        for_shift = for_shift + first * factor + share * shift
    determinant = energy * one - mean.square()
    return (one * for_factor - mean * for_shift) / determinant, (energy * for_shift - mean * for_factor) / determinant


def _block(
    plan: MergePlan,
    parameters: FeatCalParameters,
    anchors: Mapping[str, Tensor],
    groups: Sequence[LinearGroup],
    pairs: Sequence[Pair],
    merged: nn.Module,
) -> dict[str, Tensor]:
    """Solve for the linear layers and layer norms of a block."""
    layer = groups[0].layer
    if layer is None:
        return {}
    slots = {tensor.slot.name.rpartition(".")[0]: tensor for tensor in plan.backbone if tensor.slot.layer == layer}
    norms = [path for path in slots if isinstance(merged.get_submodule(path), nn.LayerNorm)]
    is_last = layer == required_family(plan).size(plan.checkpoints[0].config, "layers") - 1
    kinds = {module: slots[module].slot.kind for group in groups for module in group.modules}
    unread = parameters.unread if is_last else 1.0
    summed = [_sums(groups, kinds, norms, pair, merged, unread) for pair in pairs]
    experts = [pair.expert for pair in pairs]
    device = experts[0].loaded.device
    found: dict[str, Tensor] = {}
    for group in groups:
        for module in group.modules:
            single = LinearGroup(group.input, layer, (module,), group.reader, None, transposed=group.transposed)
            anchor = anchors[f"{module}.weight"].to(device)
            anchor = anchor.T if module in group.transposed else anchor
            has_bias = bias_of(merged, module) is not None
            constant = anchors[f"{module}.bias"].to(anchor) if has_bias else anchor.new_zeros(len(anchor))
            place = slots[module].place
            solved = calibrated_linear(
                [linear[module] for linear, _ in summed],
                [augmented(pair.own, single) for pair in pairs],
                len(experts) * lambdas_at(experts, place),
                torch.cat([anchor, constant[:, None]], dim=1),
                teacher=parameters.teacher,
                strength=parameters.strength,
            )
            weight = solved[:, :-1]
            found[f"{module}.weight"] = weight.T if module in group.transposed else weight
            if has_bias:
                found[f"{module}.bias"] = solved[:, -1]
    for path in norms:
        names = [name for name in (f"{path}.weight", f"{path}.bias") if name in anchors]
        factor, shift = calibrated_norm(
            [of_norms[path] for _, of_norms in summed],
            [_affine(expert.loaded.model, path) for expert in experts],
            len(experts) * lambdas_at(experts, slots[path].place),
            (anchors[names[0]].to(device), anchors[names[-1]].to(device) * (len(names) - 1)),
            parameters.strength,
        )
        found |= dict(zip(names, (factor, shift), strict=False))
    return found


def _affine(model: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Return factor and shift of a layer norm, float64; a shift that it lacks is 0."""
    parameters = dict(model.get_submodule(path).named_parameters(recurse=False))
    weight = parameters["weight"].double()
    bias = parameters.get("bias")
    return weight, torch.zeros_like(weight) if bias is None else bias.double()


def _sums(
    groups: Sequence[LinearGroup],
    kinds: Mapping[str, Kind],
    norms: Sequence[str],
    pair: Pair,
    merged: nn.Module,
    unread: float,
) -> tuple[dict[str, LinearSums], dict[str, NormSums]]:
    """Compute what a model contributes to each linear layer and to each layer norm of a block, by the module's path.

    Layers with the same input and the same weights of tokens have the same sums.

    Args:
        kinds: of the linear layers, by path.
        unread: weight of tokens that the head does not read; 1 where the block is not the last.
    """
    for run in (pair.ours, pair.theirs):
        run.enter(groups[0].layer, groups)
    products: dict[tuple[str, bool], Products] = {}
    of_norms: dict[str, NormSums] = {}
    readers = [group.reader for group in groups]

    def alike(module: str) -> bool:
        return unread == 1 or kinds[module] in OF_ALL_TOKENS

    for number in range(pair.batches):
        theirs = pair.theirs.read(number, groups[0], readers)
        ours = pair.ours.read(number, groups[0], [*readers, *norms])
        pair.ours.forget()
        is_read = pair.theirs.tokens_read(number) if unread < 1 else torch.ones((), dtype=torch.bool)
        for group in groups:
            x = ours[group.reader]
            weights = torch.where(is_read.to(x.device), 1.0, unread).expand(len(x))
            for counts_all in {alike(module) for module in group.modules}:
                of = products.setdefault((group.input, counts_all), Products(x.shape[1], x.shape[1], x.device))
                of.add(x, theirs[group.reader] - x, None if counts_all else weights)
        for path in norms:
            norm = merged.get_submodule(path)
            if not isinstance(norm, nn.LayerNorm):
                raise TypeError(f"{path} is no layer norm")
            z = layer_norm(ours[path], norm.normalized_shape, eps=norm.eps)
            weights = torch.where(is_read.to(z.device), 1.0, unread).expand(len(z))
            sums = of_norms.setdefault(
                path, NormSums(*(z.new_zeros(width, dtype=torch.float64) for width in (z.shape[1], z.shape[1], 1)))
            )
            sums.first += weights @ z
            sums.second += weights @ z.square()
            sums.count += weights.sum()
    means = {}
    for key, of in products.items():
        moment, shift = of.sums()
        means[key] = LinearSums(moment / moment[-1, -1], shift / moment[-1, -1])
    return {module: means[group.input, alike(module)] for group in groups for module in group.modules}, of_norms
