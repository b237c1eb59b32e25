"""Heads of models: the modules that a class of models has on its backbone."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Head:
    """The modules that a class of models has besides the backbone."""

    architecture: str
    """Name of the class, as config.json has it."""
    modules: tuple[str, ...]
    """Paths of the modules in the order in which they run. The last one gives the logits."""
    merges: bool = False
    """Whether the head was pre-trained with the backbone, and merges with it. Fine-tuning starts any other head from
    scratch, so that each model keeps its own."""
    reads_first_token: bool = False
    """Whether the head reads only the first token of the last layer, so that other tokens only matter for attention."""
    parameters: tuple[str, ...] = ()
    """Names of the head's tensors that are no module's weight or bias."""
    unread: tuple[str, ...] = ()
    """Tensors of the backbone that a model with this head does not have, and that older checkpoints may hold; they are
    left out. Their names lack the backbone's prefix."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """Paths that modules have in files, by the module, where transformers renames them as it loads and saves them."""

    @property
    def logits(self) -> str:
        """Path of the module that gives the logits."""
        return self.modules[-1]
