"""The attention that a model is trained with is its own, and a model whose attention is not causal is refused."""

from typing import Any

import architectures_for_tests as small
import pytest
import torch
from transformers import AutoModelForCausalLM, BertGenerationConfig, PreTrainedModel

from qlora.data import Batch
from qlora.errors import ModelError, RecipeError
from qlora.model.varlen_attention import NAME, reads_documents
from qlora.objective.apart import check_packing, read_documents_if_apart
from qlora.objective.causal_lm import loss_sum
from qlora.objective.causality import check_causal

DTYPES = [torch.float32, torch.bfloat16]
CHUNKS = {"attention_chunk_size": 16}
WINDOWS = {"sliding_window": 12, "use_sliding_window": True}


def build(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    if architecture == "bert-generation":
        config: Any = BertGenerationConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            vocab_size=512,
            **changes,
        )
    else:
        config = small.config(architecture, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    return model.eval()  # type: ignore[no-any-return]


def losses(model: PreTrainedModel, *lengths: int) -> list[float]:
    """Return our summed loss of documents in one batch, and the sum of the model's own, one document at a time."""
    numbers = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 500, (length,), generator=numbers) for length in lengths]
    rows = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=-100)
    labels[:, 0] = -100
    supervised = sum(lengths) - len(lengths)
    batch = Batch(
        rows, labels, None, tokens=sum(lengths), supervised=supervised,
        documents=tuple((length,) for length in lengths),
    )  # fmt: skip
    with torch.no_grad():
        own = [
            model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.item() * (len(ids) - 1)
            for ids in documents
        ]
        return [loss_sum(model, batch).item(), sum(own)]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama4_text", CHUNKS), ("phimoe", WINDOWS), ("qwen2_moe", WINDOWS)],
    ids=["chunks", "window of phimoe", "window of qwen2_moe"],
)
def test_a_model_whose_mask_is_not_ours_keeps_its_own(architecture: str, changes: dict[str, Any]) -> None:
    """Llama 4 attends in chunks; PhiMoE and Qwen 2 MoE cut their window in the mask and do not name it."""
    model = build(architecture, **changes)
    before = model.config._attn_implementation
    assert not read_documents_if_apart(model, longest=64)
    assert model.config._attn_implementation == before
    ours, own = losses(model, 40, 23)
    assert ours == pytest.approx(own, rel=1e-5)


def test_windows_that_the_layers_name_are_ours() -> None:
    model = build("gemma3_text", sliding_window=24)
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
    own = losses(model, 40, 23)[1]
    assert read_documents_if_apart(model)
    assert model.config._attn_implementation == NAME
    assert [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers] == windows
    assert (model.config.sliding_window, max(filter(None, windows))) == (24, 24)
    assert losses(model, 40, 23)[0] == pytest.approx(own, rel=1e-5)


def test_documents_that_fit_into_a_chunk_have_our_attention() -> None:
    model = build("llama4_text", **CHUNKS)
    own = losses(model, 16, 9)[1]
    check_packing(model, longest=16)
    assert read_documents_if_apart(model, longest=16)
    assert losses(model, 16, 9)[0] == pytest.approx(own, rel=1e-5)


def test_longer_rows_of_a_model_with_chunks_are_not_packed() -> None:
    model = build("llama4_text", **CHUNKS)
    with pytest.raises(RecipeError, match=r"data\.packing: .*attention_chunk_size.* or data\.max_length=16"):
        check_packing(model, longest=17)
    with pytest.raises(RecipeError, match="attention_chunk_size"):
        check_packing(model)


def test_a_layer_that_chooses_its_tokens_otherwise_keeps_its_own_attention() -> None:
    model = build("llama")
    assert reads_documents(model)
    model.config.layer_types = ["full_attention", "minimax_m3_sparse"] * 2
    assert not reads_documents(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("llama", "is_causal", False),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("bert-generation", "is_decoder", False),
    ],
)
def test_a_model_that_reads_in_both_directions_is_refused(
    architecture: str, key: str, value: bool, dtype: torch.dtype
) -> None:
    model = build(architecture, dtype, **{key: value})
    with pytest.raises(ModelError, match=rf"base\.model: 'some/model' .*{type(model).__name__} .*{key}"):
        check_causal(model, "some/model")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "bloom", "falcon_h1"])
def test_a_causal_model_is_not_refused(architecture: str, dtype: torch.dtype) -> None:
    check_causal(build(architecture, dtype), "some/model")


def test_a_model_that_is_not_causal_for_another_reason_is_refused_by_its_class() -> None:
    model = build("llama")
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output + 0.01 * output.roll(-1, dims=1)  # a look ahead
    )
    with pytest.raises(ModelError, match="in LlamaForCausalLM a token sees later ones \\("):
        check_causal(model, "some/model")
