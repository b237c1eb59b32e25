"""The linear layers that are refitted: groups of those that read the same, in the order in which they run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from worker.engine.catalog.families import Kind, Slot
from worker.engine.catalog.families.table import LAYER_INPUTS
from worker.engine.catalog.planning.plan import MergePlan, required_family

ORDER = (*LAYER_INPUTS, Kind.POOLER)


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers with the same input, as paths of modules.

    The input is seen at the module `reader`. Where the layers' output is added to a residual, the sum is the input of
    `norm`, or the output of the block.
    """

    input: str
    layer: int | None
    """Place of their layer among all layers in the order in which they run, those of an encoder first."""
    modules: tuple[str, ...]
    reader: str
    norm: str | None
    ends_block: bool = False
    transposed: frozenset[str] = frozenset()
    """Modules of the group whose weights are stored as (inputs, outputs)."""
    reads_decoder: bool = False
    """Whether the tokens of the input are those of a decoder beside an encoder."""
    expert: str | None = None
    """The module of the expert that the layers are part of, in a mixture of experts: (its tokens, width)."""
    router: str | None = None
    """The module that reads what all experts of that mixture read."""

    @property
    def is_added(self) -> bool:
        """Whether the layers' output is added to a residual, and the sum is seen."""
        return self.norm is not None or self.ends_block


def linear_groups(plan: MergePlan) -> list[LinearGroup]:
    """Return the linear layers that are refitted, in the order of a pass, and last the pooler.

    A layer has four groups, and one of a decoder beside an encoder seven. One that is a mixture of experts has one for
    its router, and two for each expert; first come those by which experts read, and then those by which they give.
    """
    family, config = required_family(plan), plan.checkpoints[0].config
    sizes = [family.size(config, stack.size("layers")) for stack in family.stacks]
    before = {stack.name: sum(sizes[:number]) for number, stack in enumerate(family.stacks)}

    def place(slot: Slot) -> int | None:
        return None if slot.layer is None else before[slot.stack] + slot.layer

    modules = {(place(t.slot), t.slot.kind): _module(t.slot) for t in plan.backbone}
    slots = [(place(t.slot), t.slot) for t in plan.backbone if t.slot.input and t.slot.kind in ORDER]
    slots.sort(key=lambda found: (math.inf if found[0] is None else found[0], *_order(found[1])))
    groups = []
    for (layer, name), sharing in groupby(slots, key=lambda found: (found[0], found[1].input)):
        members = [slot for _, slot in sharing]
        shown = next(slot for slot in members if slot.shows_input)
        reader, is_of_expert = _module(shown), shown.expert is not None
        norms = {} if is_of_expert and shown.kind is Kind.DOWN else family.residual_norms(config, shown.stack)
        norm = norms.get(shown.kind)
        groups.append(
            LinearGroup(
                input=str(name),
                layer=layer,
                modules=tuple(_module(slot) for slot in members),
                reader=reader,
                norm=modules[layer, norm] if norm else None,
                ends_block=shown.kind in norms and norm is None,
                transposed=frozenset(_module(slot) for slot in members if slot.transposed),
                reads_decoder=shown.reads_decoder,
                expert=reader.rpartition(".")[0] if is_of_expert else None,
                router=modules[layer, Kind.ROUTER] if is_of_expert else None,
            )
        )
    return groups


def _order(slot: Slot) -> tuple[int, int, int]:
    """Return a key by which the linear layers of a layer are in the order in which they run, by their inputs."""
    of_input = Kind.UP if slot.kind is Kind.GATE else slot.kind
    return ORDER.index(of_input), -1 if slot.expert is None else slot.expert, ORDER.index(slot.kind)


def stacks_of(plan: MergePlan) -> list[list[str]]:
    """Return the paths of the layers, in the order in which they run: those of each stack."""
    family, config = required_family(plan), plan.checkpoints[0].config
    numbers = {stack.name: range(family.size(config, stack.size("layers"))) for stack in family.stacks}
    return [[family.layer_path(n, stack).removesuffix(".") for n in of_stack] for stack, of_stack in numbers.items()]


def matrix_of(model: nn.Module, path: str, transposed: bool) -> Tensor:
    """Return a view of a linear layer's weight, (outputs, inputs), however it is stored."""
    weight = model.get_parameter(f"{path}.weight")
    if weight.dim() != 2:
        raise TypeError(f"{path} is no linear layer")
    return weight.T if transposed else weight


def augmented(parameters: Mapping[str, Tensor], group: LinearGroup) -> Tensor:
    """Return the weights of a group, one below the other, with a column of biases, (outputs, inputs + 1), float64.

    Args:
        parameters: of the model, by name.
    """
    parts = []
    for module in group.modules:
        weight, bias = parameters[f"{module}.weight"], parameters.get(f"{module}.bias")
        weight = weight.T if module in group.transposed else weight
        constant = weight.new_zeros(len(weight)) if bias is None else bias
        parts.append(torch.cat([weight, constant[:, None]], dim=1).double())
    return torch.cat(parts)


def bias_of(model: nn.Module, path: str) -> Tensor | None:
    return dict(model.get_submodule(path).named_parameters(recurse=False)).get("bias")


def _module(slot: Slot) -> str:
    return slot.name.rpartition(".")[0]
