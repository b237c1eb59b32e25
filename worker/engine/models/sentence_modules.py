"""The steps by which sentence-transformers makes one vector of a text from its tokens' vectors."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from worker.engine.catalog.checkpoints.modules import Embedder, Module
from worker.engine.checkpoints.reader import TensorReader


class SentenceModules(nn.Module):
    """Pooling and the modules after it, whose parameters have the names `<folder>.<tensor>`."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        pooling, *steps = embedder.steps
        self._modes = tuple(pooling.settings["pooling_mode"])
        self._steps = [step.folder for step in steps]
        with TensorReader() as reader:
            for step in steps:
                self.add_module(step.folder, _made(step, reader))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Compute embeddings, (batch, width).

        Args:
            hidden: the transformer's last hidden states, (batch, tokens, width).
            mask: 1 for tokens and 0 for padding, which comes last, (batch, tokens).
        """
        found = torch.cat([pooled(mode, hidden, mask) for mode in self._modes], dim=-1)
        for name in self._steps:
            found = self.get_submodule(name)(found)
        return found


def pooled(mode: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """Compute one vector of each text by a mode of the library's `Pooling`, see `SentenceModules.forward`."""
    counted = mask[..., None].to(hidden.dtype)
    match mode:
        case "cls":
            return hidden[:, 0]
        case "max":
            return hidden.masked_fill(counted == 0, -torch.inf).max(1).values
        case "mean":
            return (hidden * counted).sum(1) / counted.sum(1)
        case "mean_sqrt_len_tokens":
            return (hidden * counted).sum(1) / counted.sum(1).sqrt()
        case "weightedmean":
            weights = counted * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
            return (hidden * weights).sum(1) / weights.sum(1)
        case "lasttoken":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    raise ValueError(f"there is no pooling mode {mode}")


class _Dense(nn.Module):
    """`activation(linear(x))`, plus x, projected where its width differs, if the settings say so."""

    def __init__(self, step: Module) -> None:
        super().__init__()
        settings = step.settings
        inputs, outputs = settings["in_features"], settings["out_features"]
        self.linear = nn.Linear(inputs, outputs, bias=bool(settings["bias"]))
        self.activation = getattr(nn, str(settings["activation_function"]).rpartition(".")[2])()
        self._adds_input = bool(settings["use_residual"])
        self.residual = nn.Linear(inputs, outputs, bias=False) if self._adds_input and inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.activation(self.linear(x))
        if self._adds_input:
            found = found + (x if self.residual is None else self.residual(x))
        return found


class _LayerNorm(nn.Module):
    def __init__(self, step: Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(step.settings["dimension"])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(x)
        return found


class _Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, dim=-1)


def _made(step: Module, reader: TensorReader) -> nn.Module:
    match step.kind:
        case "Dense":
            made: nn.Module = _Dense(step)
        case "LayerNorm":
            made = _LayerNorm(step)
        case "Normalize":
            return _Normalize()
        case _:  # dropout computes nothing in eval mode
            return nn.Identity()
    made.load_state_dict({name: reader.read(tensor) for name, tensor in step.tensors.items()})
    return made
