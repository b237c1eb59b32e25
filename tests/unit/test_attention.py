"""Attention on a CPU computes what transformers' does, in whichever way is the fastest."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.models.bert.modeling_bert import eager_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as attention_of_gemma

from worker.engine.models.attention import FUSED_FROM_TOKENS, attention, cpu_attention
from worker.engine.runtime.device import computing_in, rounded_weights

HEADS, WIDTH = 3, 8
LENGTHS = [1, 7, FUSED_FROM_TOKENS - 1, FUSED_FROM_TOKENS]


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    drawn = torch.randn(3, 2, HEADS, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
    return [part.to(dtype).requires_grad_() for part in drawn]


def padding(tokens: int, dtype: torch.dtype) -> Tensor:
    """The second row ends in the middle."""
    mask = torch.zeros(2, 1, tokens, tokens, dtype=dtype)
    mask[1, ..., tokens // 2 + 1 :] = torch.finfo(dtype).min
    return mask


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_it_gives_what_transformers_gives_in_float64_and_its_gradients(
    tokens: int, masked: bool, dtype: torch.dtype, tolerance: float
) -> None:
    ours = query, key, value = inputs(tokens, dtype)
    exact = [part.detach().double().requires_grad_() for part in ours]
    mask = padding(tokens, dtype) if masked else None
    found, _ = attention(nn.Module(), query, key, value, mask)
    wanted, _ = eager_attention_forward(nn.Module().eval(), *exact, None if mask is None else mask.double())
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    by_ours = torch.autograd.grad((found * weights.to(dtype)).sum(), ours)
    by_exact = torch.autograd.grad((wanted * weights.double()).sum(), exact)
    for one, other in zip(by_ours, by_exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_keys_and_values_that_heads_share_are_those_of_each(tokens: int) -> None:
    drawn = torch.randn(6, 2, 2, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
    query, key, value = drawn[:2].flatten(0, 1).view(2, 4, tokens, WIDTH), drawn[2], drawn[3]
    found, _ = attention(nn.Module(), query, key, value, padding(tokens, torch.float32), position_ids=torch.ones(1, 2))
    keys, values = (torch.stack([of[:, head // 2] for head in range(4)], dim=1) for of in (key, value))
    wanted, _ = attention(nn.Module(), query, keys, values, padding(tokens, torch.float32))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_bounded_scores_are_those_of_transformers(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    ours = query, key, value = inputs(tokens, dtype)
    exact = queries, keys, values = [part.detach().double().requires_grad_() for part in ours]
    mask, module = padding(tokens, dtype), nn.Module().eval()
    setattr(module, "num_key_value_groups", 1)  # noqa: B010  # a module's attributes are tensors to mypy
    found, _ = attention(module, query, key, value, mask, scaling=0.9, softcap=1.5, sliding_window=3)
    wanted, _ = attention_of_gemma(module, queries, keys, values, mask.double(), scaling=0.9, softcap=1.5)
    unbounded, _ = attention(module, query, key, value, mask, scaling=0.9)
    assert tokens == 1 or not torch.allclose(found, unbounded, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    by_ours, by_exact = (torch.autograd.grad(of.sum(), parts) for of, parts in ((found, ours), (wanted, exact)))
    for one, other in zip(by_ours, by_exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=10 * tolerance, atol=10 * tolerance)


def bert(kind: str) -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model: BertForSequenceClassification = BertForSequenceClassification(
        BertConfig(vocab_size=50, max_position_embeddings=300, attn_implementation=kind, **sizes)
    )
    return model.eval()


@pytest.mark.parametrize("tokens", [9, FUSED_FROM_TOKENS + 3])
def test_padding_changes_nothing(tokens: int) -> None:
    """A whole model, the mask as transformers has it made."""
    ids = torch.arange(tokens)[None] % 50
    padded = torch.nn.functional.pad(ids, (0, 20))
    both = torch.cat([padded, torch.arange(tokens + 20)[None] % 50])
    mask = torch.ones_like(both)
    mask[0, tokens:] = 0
    with torch.no_grad():
        alone = bert("eager")(ids).logits[0]
        found = bert(cpu_attention())(input_ids=both, attention_mask=mask).logits[0]
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_scores_and_mask_stay_bfloat16() -> None:
    """A float32 mask would make all that comes after it float32, and twice as slow."""
    model = bert(cpu_attention())
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    noting = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with noting, computing_in("bfloat16", torch.device("cpu")):
        model(input_ids=ids, attention_mask=mask)
    probabilities = [tensor for tensor in saved if tensor.shape[-2:] == (6, 6)]
    assert probabilities
    assert all(tensor.dtype is torch.bfloat16 for tensor in probabilities)


def test_rounded_weights_compute_what_autocast_does_and_leave_no_trace() -> None:
    model = bert(cpu_attention()).requires_grad_(False)
    ids = torch.arange(12).view(2, 6)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}

    def logits() -> Tensor:
        with computing_in("bfloat16", torch.device("cpu")):
            found: Tensor = model(input_ids=ids).logits
        return found

    plain = logits()
    with rounded_weights(model, "bfloat16"):
        assert model.bert.encoder.layer[0].output.dense.weight.dtype is torch.bfloat16
        assert torch.equal(logits(), plain)
    with pytest.raises(KeyError), rounded_weights(model, "bfloat16"):
        raise KeyError
    with rounded_weights(model, "float32"):
        assert model.bert.encoder.layer[0].output.dense.weight.dtype is torch.float32
    for name, parameter in model.named_parameters():
        kept, value = before[name]
        assert parameter is kept
        assert torch.equal(parameter, value)
