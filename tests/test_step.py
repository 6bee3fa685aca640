"""The training step's results, against references that share no code with it."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
)

from qlora.adapter.adapted_linear import trainable_parameters
from qlora.adapter.lora_spec import LoraSpec
from qlora.adapter.methods.lora import adapt
from qlora.data import Batch
from qlora.errors import ModelError, RecipeError
from qlora.model.checkpointing import checkpoint_layers
from qlora.model.head import head_of
from qlora.objective.apart import check_packing
from qlora.objective.causal_lm import CausalLM, loss_sum
from qlora.objective.checks import check_head
from qlora.objective.step import accumulate, evaluate
from qlora.optim import Optimizer
from qlora.runtime.seeds import fold_seed

SIZES = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=1),
    "qwen3-tied": Qwen3Config(
        **SIZES, intermediate_size=128, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True
    ),
    "gemma2": Gemma2Config(
        **SIZES, intermediate_size=128, num_key_value_heads=1, head_dim=32, sliding_window=64
    ),
    "gpt2": GPT2Config(
        vocab_size=160, n_embd=64, n_layer=2, n_head=2, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    ),
    "opt": OPTConfig(**SIZES, ffn_dim=128, max_position_embeddings=64, word_embed_proj_dim=64, dropout=0.0),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype)
    return model.train()  # type: ignore[no-any-return]


def adapted(name: str, **kwargs: object) -> PreTrainedModel:
    model = build(name)
    adapt(model, LoraSpec(rank=4, targets="all-linear", dtype=torch.float32, **kwargs))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():  # B is zero at first: A would get no gradient
        parameter.data.normal_(0, 0.05, generator=generator)
    return model


def rows(lengths: Sequence[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return (ids [T], labels [T]) of each row; the first third is the prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, 160, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        made.append((ids, labels))
    return made


def padded(chosen: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    width = max(len(ids) for ids, _ in chosen)
    ids = torch.zeros(len(chosen), width, dtype=torch.long)
    labels = torch.full((len(chosen), width), -100)
    for i, (row_ids, row_labels) in enumerate(chosen):
        ids[i, : len(row_ids)], labels[i, : len(row_ids)] = row_ids, row_labels
    supervised = int((labels[:, 1:] != -100).sum())
    return Batch(input_ids=ids, labels=labels, position_ids=None, tokens=ids.numel(), supervised=supervised)


def packed(chosen: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    labels = []
    for _, row_labels in chosen:
        row_labels = row_labels.clone()
        row_labels[0] = -100
        labels.append(row_labels)
    ids = torch.cat([row_ids for row_ids, _ in chosen])[None]
    positions = torch.cat([torch.arange(len(row_ids)) for row_ids, _ in chosen])[None]
    joined = torch.cat(labels)[None]
    supervised = int((joined[:, 1:] != -100).sum())
    return Batch(
        input_ids=ids, labels=joined, position_ids=positions, tokens=ids.numel(), supervised=supervised
    )


def gradients(
    model: PreTrainedModel, batches: list[Batch], loss_chunk: int | None = None, **kwargs: int
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = accumulate(model, batches, CausalLM(loss_chunk), seed=0, step=0, **kwargs).sum
    found = {}
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return loss.item(), found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name in one:
        scale = other[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_loss_equals_that_of_the_models_own_logits(name: str) -> None:
    model = build(name).eval()
    batch = padded(rows([9, 14, 5]))
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.double()
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    torch.testing.assert_close(loss_sum(model, batch).double(), expected, rtol=1e-5, atol=1e-4)
    check_head(model)


def test_a_head_with_unknown_operations_is_refused() -> None:
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(ModelError, match="LlamaForCausalLM changes its logits"):
        check_head(model)


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gemma2"])
def test_packed_rows_give_the_loss_and_gradients_of_separate_rows(name: str) -> None:
    model = adapted(name)
    chosen = rows([11, 6, 17, 9])
    loss, grads = gradients(model, [packed(chosen)])
    separate_loss, separate = gradients(model, [padded([row]) for row in chosen])
    assert loss == pytest.approx(separate_loss, rel=1e-5)
    assert_same(grads, separate)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_packing_is_refused_if_documents_would_see_each_other(name: str) -> None:
    model = build(name)
    if name == "opt":  # computes its positions from the attention mask only
        with pytest.raises(
            RecipeError, match=r"documents that OPTForCausalLM gets .* Set data\.packing=false"
        ):
            check_packing(model)
    else:
        check_packing(model)


@pytest.mark.parametrize("sizes", [(4, 4), (1, 1, 1, 5), (7, 1), (2, 3, 3)])
def test_micro_batches_equal_one_batch_with_uneven_lengths(sizes: tuple[int, ...]) -> None:
    model = adapted("llama")
    chosen = rows([11, 3, 17, 9, 25, 6, 4, 13])
    whole_loss, whole = gradients(model, [padded(chosen)])
    micro, start = [], 0
    for size in sizes:
        micro.append(padded(chosen[start : start + size]))
        start += size
    loss, grads = gradients(model, micro)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert_same(grads, whole)


def test_the_shares_of_two_processes_add_up_to_the_step() -> None:
    model = adapted("llama", dropout=0.1)
    micro = [padded([row]) for row in rows([11, 6, 17])]
    loss, whole = gradients(model, micro)
    first_loss, first = gradients(model, micro, rank=0, processes=2)
    second_loss, second = gradients(model, micro, rank=1, processes=2)
    assert first_loss + second_loss == pytest.approx(loss, rel=1e-6)
    assert_same({name: first[name] + second[name] for name in first}, whole)


def test_checkpointing_changes_no_bit_of_the_gradients_even_with_dropout() -> None:
    model = adapted("llama", dropout=0.2)
    batch = padded(rows([11, 6]))
    loss, plain = gradients(model, [batch])
    checkpoint_layers(model)
    checkpointed_loss, checkpointed = gradients(model, [batch])
    checkpoint_layers(model, layers=1)
    _, partly = gradients(model, [batch])
    assert loss == checkpointed_loss
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name
        assert torch.equal(plain[name], partly[name]), name


def test_dropout_is_a_function_of_seed_step_and_micro_batch() -> None:
    model = adapted("llama", dropout=0.3)
    batches = [padded(rows([11, 6]))]
    first = accumulate(model, batches, seed=0, step=3).sum
    torch.rand(100)  # other code may draw from the global generator
    assert torch.equal(first, accumulate(model, batches, seed=0, step=3).sum)
    assert not torch.equal(first, accumulate(model, batches, seed=0, step=4).sum)
    assert not torch.equal(first, accumulate(model, batches, seed=1, step=3).sum)
    assert len({fold_seed(a, b, c) for a in range(9) for b in range(9) for c in range(9)}) == 729


def test_evaluation_changes_no_gradients_mode_or_weights() -> None:
    model = adapted("llama", dropout=0.3)
    batches = [padded(rows([11, 6])), padded(rows([8], seed=1))]
    gradients(model, batches)
    before = {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}
    total, tokens = evaluate(model, batches)
    assert model.training
    assert tokens == sum(batch.supervised for batch in batches)
    assert torch.equal(total.sum, evaluate(model, batches)[0].sum)  # the same twice, so without dropout
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None
        assert torch.equal(before[name], parameter.grad)


def test_gemma_caps_and_scales_are_read_from_the_configuration() -> None:
    assert head_of(build("gemma2")).softcap == 30.0
    assert head_of(build("llama")).softcap is None


def test_a_model_without_layers_to_checkpoint_is_an_error() -> None:
    with pytest.raises(RecipeError, match="activation_checkpointing=none"):
        checkpoint_layers(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_512_micro_batches_are_as_close_to_float64_as_one_batch() -> None:
    model = adapted("llama")
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.bfloat16()
    reference = copy.deepcopy(model).double()
    chosen = rows([3 + number % 9 for number in range(512)])
    _, expected = gradients(reference, [padded(chosen)])
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()

    def error(batches: list[Batch], exact_sums: bool) -> float:
        optimizer = Optimizer(trainable_parameters(model), name="adamw", exact_sums=exact_sums)
        optimizer.zero_grad()
        accumulate(model, batches, seed=0, step=0)
        differences = [
            (parameter.grad.double() - expected[name]).norm()  # type: ignore[union-attr]
            for name, parameter in trainable_parameters(model).items()
        ]
        return (torch.stack(differences).norm() / norm).item()

    whole, micro = [padded(chosen)], [padded([row]) for row in chosen]
    once = error(whole, exact_sums=False)
    assert error(micro, exact_sums=True) < 1.1 * once
    assert error(micro, exact_sums=False) > 2 * once
