"""What mask gradients are made of: sums of products over tokens, and what is kept until they are taken."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from tests.score_names import named
from worker.engine.catalog.families import Site
from worker.engine.models.mask_gradients import CHUNK_VALUES, MaskGradients, TokenSums, _kept

SHAPES = [(1, 1, 1), (3, 5, 7), (9, 32, 1536), (2, 300, 3072), (1, 2, CHUNK_VALUES + 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_sums_over_tokens_are_exact_whatever_the_chunks(
    shape: tuple[int, int, int], dtype: torch.dtype, result: torch.dtype
) -> None:
    """Of bfloat16 too: products are not rounded to it."""
    generator = torch.Generator().manual_seed(shape[0])
    sums = TokenSums()
    for _ in range(2):  # buffers are used again
        a, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        found = sums(a, g)
        assert found.dtype is result
        exact = (a.double() * g.double()).sum(1)
        size = (a.double() * g.double()).abs().sum(1)
        assert float(((found.double() - exact).abs() / size).max()) < 1e-6


FIRST, SECOND = named("layers.0.neurons"), named("layers.1.neurons")
SITES = [Site("down", {FIRST: 6}), Site("last", {SECOND: 3})]


class Network(nn.Module):
    """Two layers, each of a mask site; the first depends on nothing that was differentiated before."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.activation = activation
        self.down = nn.Linear(6, 4)
        self.again = nn.Linear(4, 6)
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(self.activation(self.up(x)))
        logits: Tensor = self.last(self.activation(self.again(hidden))).sum((1, 2))
        return logits


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.SiLU()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_inserted_masks(activation: nn.Module, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = Network(activation).to(dtype).eval()
    x = torch.randn(5, 3, 4, dtype=dtype)
    with MaskGradients(network, SITES) as gradients:
        output = network(x)
        twice = [gradients.of(output, last=False), gradients.of(output, last=True)]
        network(x)  # another pass starts another graph
        twice.append(gradients.of(network(x), last=True))
    masks = torch.ones(5, 6, dtype=dtype, requires_grad=True), torch.ones(5, 3, dtype=dtype, requires_grad=True)
    hidden = network.down(network.activation(network.up(x)) * masks[0][:, None])
    wide = network.activation(network.again(hidden)) * masks[1].repeat_interleave(2, 1)[:, None]
    wanted = torch.autograd.grad(network.last(wide).sum(), masks)
    for found in twice:
        for name, exact in zip((FIRST, SECOND), wanted, strict=True):
            torch.testing.assert_close(found[name], exact.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "shares"), [(torch.float32, True), (torch.bfloat16, False)])
def test_of_gelu_in_float32_what_is_held_is_what_autograd_holds(dtype: torch.dtype, shares: bool) -> None:
    source = torch.randn(2, 3, 6, dtype=dtype, requires_grad=True)
    activation = torch.nn.functional.gelu(source)
    kept = _kept(activation)
    assert torch.equal(kept(), activation)
    [held] = [cell.cell_contents for cell in kept.__closure__ or () if isinstance(cell.cell_contents, Tensor)]
    assert held.data_ptr() == (source if shares else activation).data_ptr()


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()], ids=str)
def test_no_graph_outlives_its_pass(activation: nn.Module) -> None:
    """Without the help of Python's collector of cycles, which cannot see through autograd's nodes."""
    network = Network(activation).eval()
    alive: list[weakref.ref[Tensor]] = []
    network.last.register_forward_hook(lambda _, inputs, output: alive.extend(map(weakref.ref, (*inputs, output))))
    gc.disable()
    try:
        with MaskGradients(network, SITES) as gradients:
            for _ in range(3):
                gradients.of(network(torch.randn(5, 3, 4)), last=True)
        assert len(alive) == 6
        assert all(tensor() is None for tensor in alive)
    finally:
        gc.enable()


class Repeated(nn.Module):
    """One layer that is run three times, each time with a residual, of which the first token is read."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        for _ in range(3):
            activation = nn.functional.gelu(self.up(x))
            x = x + self.down(activation if masks is None else activation * masks[:, None])
        return x[:, 0].pow(2).sum(-1)


@pytest.mark.parametrize("narrowing", [(), ("down",)])
def test_the_gradient_of_a_layer_that_is_run_again_is_the_sum_over_its_uses(narrowing: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    network, x = Repeated().double(), torch.randn(5, 3, 4, dtype=torch.float64)
    masks = torch.ones(5, 6, dtype=torch.float64, requires_grad=True)
    [wanted] = torch.autograd.grad(network(x, masks).sum(), masks)
    tokens = []
    with MaskGradients(network, SITES[:1], narrowing, uses=3) as gradients:
        network.down.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
        with torch.no_grad():
            network(x)
        output = network(x)
        for last in (False, True):  # no sum goes on from one backward pass to the next
            torch.testing.assert_close(gradients.of(output, last=last)[FIRST], wanted)
    assert tokens == [3, 3, 3, 3, 3, 1 if narrowing else 3]  # without gradients, nothing is cut


def test_gradients_need_a_pass() -> None:
    network = Network(nn.ReLU())
    with (
        MaskGradients(network, SITES[:1]) as gradients,
        pytest.raises(RuntimeError, match="no forward"),
    ):
        gradients.of(torch.ones(1), last=True)
