"""Packed documents without padding: each document attends only to itself, and padding is never computed."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    OPTConfig,
    masking_utils,
)
from transformers.pytorch_utils import Conv1D

from qlora.data import IGNORE_INDEX, Batch, Example
from qlora.data.batches import collate
from qlora.errors import ModelError
from qlora.model.varlen_attention import NAME, arguments, attend, reads_documents
from qlora.objective.apart import read_documents_if_apart
from qlora.objective.causal_lm import loss_sum, supervised_states
from qlora.runtime.device import token_multiple
from qlora.runtime.fake import representing_cuda

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2),
    "mistral": MistralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, sliding_window=3),
    "gemma3": Gemma3TextConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=1, head_dim=8, sliding_window=4
    ),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=60, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0),
}


def definition(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """Compute attention [1, heads, T, d] by its definition, as a softmax over the visible positions."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(document))
    behind = place[:, None] - place[None]
    seen = (document[:, None] == document[None]) & (behind >= 0) & (behind < (window or len(place) + 1))
    scores = (q @ k.transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 4, 100]),
    groups=st.sampled_from([1, 2]),
)
def test_every_document_sees_only_itself(lengths: list[int], window: int | None, groups: int) -> None:
    torch.manual_seed(1)
    query = torch.randn(1, 4, sum(lengths), 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 4 // groups, sum(lengths), 8, dtype=torch.float64)
    found, _ = attend(
        nn.Module(), query, key, value, None,
        scaling=0.3, sliding_window=window, document_lengths=tuple(lengths),
    )  # fmt: skip
    wide = [x.repeat_interleave(groups, dim=1) for x in (key, value)]
    torch.testing.assert_close(found, definition(query, *wide, lengths, window))


def rows_of(*rows: list[int]) -> Batch:
    """Return a batch of documents of these lengths in rows; the first third of each document is not trained."""
    documents = []
    for row in rows:
        examples = []
        for length in row:
            ids = (torch.arange(length) * 13 + 5 * length) % 60
            labels = ids.clone()
            labels[: max(1, length // 3)] = IGNORE_INDEX
            examples.append(Example(ids.int().numpy(), labels.int().numpy(), ""))
        documents.append(examples)
    return collate(documents, pad_id=0, packed=any(len(row) > 1 for row in rows))


def model_of(config: Any) -> nn.Module:
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).double()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_packed_or_padded_batch_has_the_loss_of_its_documents(config: Any) -> None:
    model = model_of(config)
    alone = sum(loss_sum(model, rows_of([length])) for length in (9, 4, 12, 2))
    read_documents_if_apart(model)
    assert model.config._attn_implementation == NAME
    for rows in ([[9, 4], [12, 2]], [[9], [4], [12], [2]], [[9, 4, 12, 2]]):
        loss = loss_sum(model, rows_of(*rows))
        torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    loss.backward()
    assert model.get_input_embeddings().weight.grad.any()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_full_rows_have_the_same_loss_and_need_no_mask(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers builds its masks from values on the device, so every forward pass would wait for the GPU."""
    model, batch = model_of(config), rows_of([9], [9])
    expected = loss_sum(model, batch)
    read_documents_if_apart(model)

    def forbidden(*_: Any) -> Tensor:
        raise AssertionError("a mask is built")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", forbidden)
    torch.testing.assert_close(loss_sum(model, batch), expected, rtol=1e-6, atol=0)


def test_padding_is_never_computed() -> None:
    model = model_of(CONFIGS["llama"])
    read_documents_if_apart(model)
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel() // 32))
    batch = rows_of([20], [3], [2])
    loss_sum(model, batch)
    hidden, targets = supervised_states(model, batch)
    assert seen == [25, 25]
    assert batch.input_ids.numel() == 60
    assert len(hidden) == len(targets) == batch.supervised


@pytest.mark.parametrize("rows", [([20], [3], [2]), ([9], [9]), ([16],), ([7, 4], [5])], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tokens_that_pad_a_pass_change_nothing(
    config: Any, rows: tuple[list[int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model_of(config), rows_of(*rows)
    read_documents_if_apart(model)
    computed: list[int] = []
    model.get_output_embeddings().weight.requires_grad_(False)
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear | Conv1D))
    layer.register_forward_pre_hook(lambda _, args: computed.append(args[0].numel() // 32))

    def learned() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = loss_sum(model, batch)
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]

    expected, gradients = learned()
    monkeypatch.setattr("qlora.objective.causal_lm.token_multiple", lambda device, dtype: 8)
    loss, filled = learned()
    assert computed == [batch.tokens, -(-batch.tokens // 8) * 8]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for gradient, without in zip(filled, gradients, strict=True):  # Gemma's norms are fp32
        torch.testing.assert_close(gradient, without, rtol=1e-6, atol=1e-8)
    _, targets = supervised_states(model, batch)
    assert len(targets) == batch.supervised


def test_passes_are_padded_if_products_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for compiles, together in ((True, 128), (False, 1)):
        monkeypatch.setattr("qlora.runtime.device.multiplies_bfloat16", lambda compiles=compiles: compiles)
        assert token_multiple(cpu, torch.bfloat16) == together
        assert token_multiple(cpu, torch.float32) == token_multiple(gpu, torch.bfloat16) == 1
        with representing_cuda():
            assert token_multiple(cpu, torch.bfloat16) == 1


def test_rows_without_padding_are_not_changed() -> None:
    assert rows_of([7], [7]).plain
    assert not rows_of([7], [6]).plain
    assert not rows_of([3, 4], [4, 3]).plain


def test_generation_equals_that_with_sdpa() -> None:
    model = model_of(CONFIGS["mistral"]).eval()
    ids = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    before = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    read_documents_if_apart(model)
    after = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(before, after)


def test_a_model_that_does_not_keep_documents_apart_keeps_its_own_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LlamaConfig(**SIZES, intermediate_size=48, initializer_range=0.5)  # large enough to be visible
    model = model_of(config)
    assert reads_documents(model)

    def leaking(batch: Batch, multiple: int) -> tuple[Batch, tuple[int, ...]]:
        one, lengths = original(batch, multiple)
        return one, (sum(lengths),)

    original = Batch.end_to_end
    monkeypatch.setattr(Batch, "end_to_end", leaking)
    read_documents_if_apart(model)
    assert model.config._attn_implementation == "sdpa"


def test_no_argument_of_a_models_attention_is_ignored() -> None:
    query = torch.randn(1, 4, 8, 8)
    for asked in (
        {"s_aux": torch.ones(4)},
        {"is_causal": False},
        {"position_bias": query},
    ):
        with pytest.raises(ModelError, match=next(iter(asked))):
            attend(nn.Module(), query, query, query, None, document_lengths=(5, 3), **asked)
    nothing = {"position_ids": torch.arange(8)[None], "use_cache": False, "softcap": None, "is_causal": True}
    found, _ = attend(nn.Module(), query, query, query, None, document_lengths=(5, 3), **nothing)
    assert torch.equal(found, attend(nn.Module(), query, query, query, None, document_lengths=(5, 3))[0])


def test_a_model_whose_attention_needs_more_arguments_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(CONFIGS["llama"])
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "forward", partial(layer.self_attn.forward, s_aux=torch.ones(4)))
    read_documents_if_apart(model)
    assert model.config._attn_implementation == "sdpa"
    assert loss_sum(model, rows_of([7], [5])).isfinite()


def test_a_model_that_needs_a_mask_keeps_its_own_attention() -> None:
    """Nemotron's layers drop the arguments that describe documents, and add the empty mask to their scores."""
    model = model_of(NemotronConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8))
    assert reads_documents(model)
    read_documents_if_apart(model)
    assert model.config._attn_implementation == "sdpa"
    assert loss_sum(model, rows_of([7], [5])).isfinite()


def test_on_a_gpu_all_documents_are_one_kernel() -> None:
    with FakeTensorMode(), representing_cuda():
        query = torch.empty(1, 4, 10, 8, dtype=torch.bfloat16, requires_grad=True)
        key, value = (torch.empty(1, 2, 10, 8, dtype=torch.bfloat16) for _ in range(2))
        more = arguments((7, 3), torch.device("cpu"))
        found, _ = attend(nn.Module(), query, key, value, more.pop("attention_mask"), scaling=0.3, **more)
        assert found.shape == (1, 10, 4, 8)
        found.sum().backward()
        assert query.grad.shape == query.shape
        names = {type(node[0]).__name__ for node in found.grad_fn.next_functions}
        assert any("varlen" in name.lower() for name in names)
