"""Rows of tokens trained beside an adapter: exact, stored as in PEFT, and known to every command that reads a run."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures_for_tests import config, recipe
from commands_for_tests import qlora
from test_memory_forecast import assert_right, foreseen, measured
from tokenizers_for_tests import byte_level
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora.adapter import (
    Adapters,
    LoraSpec,
    adapt,
    load_adapter,
    lora_layers,
    save_adapter,
    trainable_parameters,
)
from qlora.adapter.algebra import tensors
from qlora.adapter.merge import merge_adapter
from qlora.adapter.methods import ADAPTERS, METHODS
from qlora.adapter.trained_parts import describe_parts, train_modules, trained_parts
from qlora.adapter.trained_rows import EmbeddingRows, HeadRows, TrainedRows, train_rows
from qlora.data import IGNORE_INDEX, Batch, load_dataset
from qlora.errors import ModelError, RecipeError, UsageError
from qlora.inference.load import held_out_loss, load_trained
from qlora.memory.workload import assumed
from qlora.model.decoder_layer import use_fused_layers
from qlora.model.head import head_of
from qlora.model.load import load_base, load_tokenizer
from qlora.model.offload import HostEmbedding
from qlora.model.tokens import TrainedTokens
from qlora.objective.causal_lm import loss_sum
from qlora.objective.checks import check_head
from qlora.recipe import Adapter, Recipe
from qlora.training import train as loop
from qlora.training.check import check
from qlora.training.train import train

RecipeFile = Callable[..., Path]
VOCABULARY = 60
IDS = torch.arange(24).view(2, 12) % VOCABULARY


def tiny(tied: bool = True, dtype: torch.dtype = torch.float32, **settings: Any) -> LlamaForCausalLM:
    """Return a random Llama of 60 tokens, with the same weights at every call."""
    torch.manual_seed(1)
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": tied} | settings
    made = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, **settings)
    return LlamaForCausalLM(made).to(dtype)


def with_rows(model: nn.Module, ids: list[int], size: float = 0.5, **settings: Any) -> nn.Module:
    """Adapt a model and train the rows `ids`; rows and B have random values of this size."""
    train_rows(adapt(model, LoraSpec(**{"rank": 2, "dtype": torch.float32, **settings})), ids)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_b.normal_(0, 0.1)
        for rows in TrainedRows.of(model).values():
            rows.values.normal_(0, size)
    return model


def as_batch(ids: Tensor) -> Batch:
    labels = ids.clone()
    labels[:, ::5] = IGNORE_INDEX
    supervised = int((labels[:, 1:] != IGNORE_INDEX).sum())
    return Batch(ids, labels, None, tokens=ids.numel(), supervised=supervised)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_tokens_start_as_the_base_and_get_the_gradient_of_their_rows(
    tied: bool, dtype: torch.dtype
) -> None:
    ids = [7, 3, 59]
    base = tiny(tied, dtype)
    before = base(input_ids=IDS).logits
    model = train_rows(adapt(tiny(tied, dtype)), ids)
    rounding = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(
        model(input_ids=IDS).logits, before, **rounding
    )  # a product of its own may round apart
    rows = TrainedRows.of(model)
    assert {name: type(module) for name, module in rows.items()} == {
        "model.embed_tokens": EmbeddingRows, "lm_head": HeadRows,
    }  # fmt: skip
    assert len({module.values for module in rows.values()}) == 1 if tied else 2
    base.requires_grad_(False)
    for weight in {base.model.embed_tokens.weight, base.lm_head.weight}:
        weight.requires_grad_(True)
    use_fused_layers(model)
    for network in (base, model):
        loss_sum(network, as_batch(IDS)).backward()
    for name, module in rows.items():
        wanted = base.get_submodule(name).weight.grad[ids].double()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert module.values.grad is not None
        assert module.values.dtype == dtype
        assert (module.values.grad.double() - wanted).norm() <= tolerance * wanted.norm(), name


def test_the_loss_with_a_cap_a_scale_and_more_tokens_is_that_of_the_logits() -> None:
    """Gemma 2 caps its logits, and scales its embeddings."""
    model = AutoModelForCausalLM.from_config(config("gemma2", num_hidden_layers=2))
    rows = model.get_input_embeddings().weight.shape[0]
    known = torch.tensor([[5, 1, 2, 3]])
    before = model.eval()(input_ids=known).logits
    train_rows(adapt(model), [5, rows, rows + 1], {rows: [1, 2], rows + 1: []})
    torch.testing.assert_close(model(input_ids=known).logits[..., :rows], before, rtol=1e-4, atol=1e-5)
    check_head(model)  # raises unless our loss is that of the model's own logits
    ids = torch.tensor([[5, 1, rows, 2, rows + 1, 3]])
    output = model(input_ids=ids).logits
    assert output.shape[-1] == rows + 2 == head_of(model).vocabulary
    loss = loss_sum(model, Batch(ids, ids.clone(), None, tokens=6, supervised=5))
    wanted = F.cross_entropy(output[0, :-1].float(), ids[0, 1:], reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)


def test_a_new_token_starts_as_the_mean_of_its_pieces() -> None:
    for tied in (True, False):
        base = tiny(tied)
        model = train_rows(adapt(tiny(tied)), [60, 61], {60: [4, 5, 5], 61: []})
        for name, module in TrainedRows.of(model).items():
            weight = base.get_submodule(name).weight
            torch.testing.assert_close(module.values[0], weight[[4, 5, 5]].mean(0))
            torch.testing.assert_close(module.values[1], weight.mean(0))


def test_rows_work_in_front_of_an_embedding_on_the_host() -> None:
    model, plain = tiny(tied=False), with_rows(tiny(tied=False), [2, 60])
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings().weight, torch.device("cpu")))
    hosted = with_rows(model, [2, 60])
    source = trainable_parameters(plain)
    with torch.no_grad():
        for name, parameter in trainable_parameters(hosted).items():
            parameter.copy_(source[name])
    ids = torch.tensor([[1, 2, 60, 2, 5]])
    assert torch.equal(hosted(input_ids=ids).logits, plain(input_ids=ids).logits)
    for network in (hosted, plain):
        loss_sum(network, as_batch(ids)).backward()
    for name, parameter in trainable_parameters(hosted).items():
        assert torch.equal(parameter.grad, source[name].grad), name


def test_what_cannot_have_trained_rows_is_refused() -> None:
    with pytest.raises(UsageError, match=r"has 60 rows, and the tokens 60, 61 behind them are not trained"):
        train_rows(adapt(tiny()), [3, 62])
    targets_head = adapt(tiny(tied=False), LoraSpec(targets=["lm_head"]))
    with pytest.raises(ModelError, match="lm_head is a target of the adapter too"):
        train_rows(targets_head, [3])
    with pytest.raises(UsageError, match="Linear has no input embedding"):
        train_rows(nn.Linear(3, 3), [1])


def test_reading_the_weight_behind_trained_rows_is_an_error() -> None:
    with pytest.raises(AttributeError, match="reads `weight` instead of calling"):
        _ = with_rows(tiny(), [3]).model.embed_tokens.weight


@pytest.mark.parametrize("ids", [[3, 59], [3, 60, 61]])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_saved_loaded_and_switched(tmp_path: Path, tied: bool, ids: list[int]) -> None:
    model = with_rows(tiny(tied), ids).eval()
    save_adapter(model, tmp_path / "rows")
    tokens = torch.tensor([[1, 3, ids[-1], 2]])
    wanted = model(input_ids=tokens).logits
    loaded = load_adapter(tiny(tied).eval(), tmp_path / "rows")
    assert torch.equal(loaded(input_ids=tokens).logits, wanted)
    save_adapter(loaded, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "rows" / name).read_bytes()
    save_adapter(adapt(tiny(tied)), tmp_path / "plain")
    adapters = Adapters(tiny(tied).eval())
    known = tokens.clamp(max=VOCABULARY - 1)
    base = adapters.model(input_ids=known).logits
    for name in ("rows", "plain"):
        adapters.load(name, tmp_path / name)
        assert torch.equal(adapters.model(input_ids=known).logits, base)
    adapters.activate("rows")
    assert torch.equal(adapters.model(input_ids=tokens).logits, wanted)
    adapters.activate("plain")
    assert torch.equal(adapters.model(input_ids=known).logits, base), "B is zero"
    adapters.deactivate()
    assert not TrainedRows.of(adapters.model)
    assert torch.equal(adapters.model(input_ids=known).logits, base)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_merged_in_memory(tied: bool) -> None:
    model = with_rows(tiny(tied), [3, 60]).eval()
    tokens = torch.tensor([[1, 3, 60, 2]])
    wanted = model(input_ids=tokens).logits
    merged = merge_adapter(model)
    assert not TrainedRows.of(merged)
    assert not trainable_parameters(merged)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert merged.config.vocab_size == merged.lm_head.out_features == 61
    torch.testing.assert_close(merged(input_ids=tokens).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [method.name for method in ADAPTERS])
def test_every_method_can_have_tokens_and_modules_beside_it(tmp_path: Path, method: str) -> None:
    settings = Adapter(method=method, rank=2, targets="attention")
    model = train_rows(METHODS[method].apply(tiny(), settings, seed=0), [3, 60])
    train_modules(model, ["norm"])
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_adapter(model.eval(), tmp_path)
    tokens = torch.tensor([[1, 3, 60, 2]])
    wanted = model(input_ids=tokens).logits
    loaded = load_adapter(tiny().eval(), tmp_path)
    assert torch.equal(loaded(input_ids=tokens).logits, wanted)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trainable_parameters(model).keys()
    if METHODS[method].why_no_sum is None:  # the algebra of low-rank products keeps them
        read = tensors.read(tmp_path)
        assert read.parts.keys() == trained_parts(model).keys()
        assert len(describe_parts(read.config)) == 2


def test_an_adapter_with_other_rows_does_not_replace_those_of_a_model(tmp_path: Path) -> None:
    save_adapter(with_rows(tiny(), [3, 4]), tmp_path / "a")
    model = with_rows(tiny(), [3, 5])
    before = {name: parameter.clone() for name, parameter in trainable_parameters(model).items()}
    with pytest.raises(ModelError, match="other tokens or modules trained beside it than the model"):
        load_adapter(model, tmp_path / "a")
    for name, parameter in trainable_parameters(model).items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("field", [[1, "2"], {"embed_tokens": 3}, "new"])
def test_damaged_token_ids_are_refused_with_the_file(tmp_path: Path, field: Any) -> None:
    save_adapter(with_rows(tiny(), [3, 4]), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": field}))
    with pytest.raises(ModelError, match=r"adapter_config\.json: trainable_token_indices must be a list"):
        load_adapter(tiny(), tmp_path)


THEIRS = [
    (True, [3, 59]),
    (True, {"embed_tokens": [3, 7], "lm_head": [3, 7]}),
    (True, {"embed_tokens": [3], "lm_head": [7, 8]}),
    (False, [3, 7]),
    (False, {"embed_tokens": [3, 7], "lm_head": [7, 3]}),
    (False, {"lm_head": [7]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("tied", "field"), THEIRS)
def test_an_adapter_of_peft_gives_the_same_logits_here(tmp_path: Path, tied: bool, field: Any) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=field)
    theirs = peft.get_peft_model(tiny(tied), settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    wanted = theirs.eval()(input_ids=IDS).logits
    assert (wanted - tiny(tied)(input_ids=IDS).logits).abs().max() > 0.1
    found = load_adapter(tiny(tied).eval(), tmp_path)(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ids", [[59, 3], [3, 60, 61]])
@pytest.mark.parametrize("tied", [True, False])
def test_peft_computes_the_same_from_our_adapter(tmp_path: Path, tied: bool, ids: list[int]) -> None:
    peft = pytest.importorskip("peft")
    model = with_rows(tiny(tied), ids).eval()
    save_adapter(model, tmp_path)
    base = tiny(tied)
    base.resize_token_embeddings(max(VOCABULARY, ids[-1] + 1))  # PEFT needs a base that has the rows
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    tokens = torch.tensor([[1, 3, ids[-1], 2]])
    wanted = model(input_ids=tokens).logits
    torch.testing.assert_close(loaded(input_ids=tokens).logits, wanted, rtol=1e-4, atol=1e-5)


# Runs


NEW = {"train_tokens": "new", "rank": 4, "targets": "all-linear"}
MARKERS = ["<|im_start|>", "<|im_end|>"]


def chatml(recipe_file: RecipeFile, tmp_path: Path, **changes: Any) -> Recipe:
    """Return a recipe that trains ChatML's markers, which are no tokens of the tiny base, in every run's folder."""
    file = recipe_file(optimizer={"lr": 2e-2}, training={"max_steps": 4, "save_every": 2}, **changes)
    settings = json.loads(file.read_text())
    settings["adapter"] = {**NEW, **changes.get("adapter", {})}
    settings["data"]["template"] = "chatml"
    file.write_text(json.dumps(settings))
    return Recipe.load(file, [f"output={tmp_path / 'run'}"])


def test_new_tokens_are_those_that_the_template_writes(recipe_file: RecipeFile, tmp_path: Path) -> None:
    made = chatml(recipe_file, tmp_path)
    tokens = TrainedTokens.of(made)
    assert [tokens.tokenizer.convert_ids_to_tokens(number) for number in tokens.ids] == MARKERS
    assert tokens.ids == [2048, 2049]
    text = tokens.tokenizer.decode(tokens.spelled[2048])
    assert text == MARKERS[0]
    assert len(load_tokenizer(made.base)) == 2048, "the base's own tokenizer is unchanged"
    named = made.model_copy(
        update={"adapter": made.adapter.model_copy(update={"train_tokens": ["a", "<hi>"]})}
    )
    ids = TrainedTokens.of(named).ids
    assert ids[0] < 2048 == ids[1]
    raw = made.model_copy(update={"data": made.data.model_copy(update={"template": "plain"})})
    with pytest.raises(RecipeError, match="new finds nothing to train"):
        TrainedTokens.of(raw).train(adapt(load_base(made.base)))


def noted(recipe_file: RecipeFile, tmp_path: Path, **adapter: Any) -> Recipe:
    """Return a recipe whose answers spell <note>, which is no token of the base."""
    row = {"prompt": "Tell.", "completion": "So <note>aside</note> it is."}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    data = {
        "source": str(tmp_path / "rows.jsonl"),
        "format": "prompt-completion",
        "template": "chatml",
        "limit": None,
        "held_out": 1,
    }
    return Recipe.load(recipe_file(adapter=adapter, data=data))


def test_a_listed_token_of_the_rows_is_trained_and_shown(recipe_file: RecipeFile, tmp_path: Path) -> None:
    names = ["<note>", "</note>", *MARKERS]
    made = noted(recipe_file, tmp_path, train_tokens=names)
    tokens = TrainedTokens.of(made)
    data = load_dataset(made.data, tokens.tokenizer, 0)
    labels = data.train[0].labels
    assert [int((labels == number).sum()) for number in tokens.ids] == [1, 1, 0, 1]
    assert not [tally for tally in data.counts.tallies if "controls" in tally]
    text = tokens.tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=True)
    assert text == "So <note>aside</note> it is.", "generation shows it, and not the markers of the template"
    tokens.check_rows(data.train)


def test_a_listed_token_that_no_row_has_is_refused(recipe_file: RecipeFile, tmp_path: Path) -> None:
    made = noted(recipe_file, tmp_path, train_tokens=["<note>", "<remark>", "<|pad|>"])
    wanted = (
        r"adapter\.train_tokens: no training row has <\|pad\|>, <remark>, .*; <\|pad\|>: text cannot spell a"
    )
    for command in (check, train):
        with pytest.raises(RecipeError, match=wanted):
            command(made)


@pytest.mark.usefixtures("without_forecast")
def test_a_run_learns_tokens_and_norms_resumes_bit_for_bit_and_is_merged(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"targets": "attention", "train_modules": ["norm", "input_layernorm"]}
    made = chatml(recipe_file, tmp_path, adapter=adapter)
    whole = train(made.model_copy(update={"output": str(tmp_path / "whole")}), terminal=False)
    assert whole.loss_before is not None
    assert whole.loss_after is not None
    assert whole.loss_after < whole.loss_before - 0.3
    notes = whole.facts["notes"]
    assert notes[0].startswith(
        "train_tokens: rows of <|im_start|> (2048), <|im_end|> (2049) in model.embed_tokens and"
    )
    assert any(
        "2 decoder layers with modules trained as a whole run transformers' own" in note for note in notes
    )
    update = loop.update

    def interrupted(session: Any, batches: Any, step: int, lr: float) -> dict[str, float]:
        if step == 3:
            raise InterruptedError
        return update(session, batches, step, lr)

    monkeypatch.setattr(loop, "update", interrupted)
    with pytest.raises(InterruptedError):
        train(made, terminal=False)
    monkeypatch.undo()
    resumed = train(made, resume=True, terminal=False)
    name = "adapter/adapter_model.safetensors"
    assert (resumed.run / name).read_bytes() == (whole.run / name).read_bytes()

    live, start = load_trained(whole.run), load_trained(whole.run, with_adapter=False)
    assert held_out_loss(live)[0] == pytest.approx(whole.loss_after, rel=1e-5)
    assert held_out_loss(start)[0] == pytest.approx(whole.loss_before, rel=1e-5), (
        "with the tokens as they started"
    )
    tokenizer = AutoTokenizer.from_pretrained(whole.run / "adapter")
    assert tokenizer.convert_tokens_to_ids(MARKERS) == [2048, 2049]
    assert tokenizer.eos_token == "<|im_end|>", "it ends an answer"
    done = qlora("merge", whole.run, "--to", tmp_path / "merged", "--onto", "dequantized", "--tokens", 0)
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 2050
    ids = torch.tensor([live.prompts.encode("Hi")])
    assert 2048 in ids
    wanted, base = live.model(input_ids=ids).logits, start.model(input_ids=ids).logits
    assert (merged(input_ids=ids).logits - wanted).norm() < 0.01 * (wanted - base).norm()


@pytest.mark.slow
def test_commands_know_the_tokens_of_a_run(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(chatml(recipe_file, tmp_path), terminal=False).run
    shown = qlora("adapter", "inspect", run)
    assert "rows of tokens, trained beside the adapter: 2 of" in " ".join(shown.stdout.split())
    summed = qlora("adapter", "compose", f"{run}:0.5", f"{run}:0.5", "--to", tmp_path / "sum")
    assert summed.returncode == 4
    assert "a weighted sum has no meaning" in " ".join(summed.stderr.split())
    small = qlora("adapter", "compress", run, "--rank", "2", "--to", tmp_path / "small")
    assert small.returncode == 0, small.stderr
    assert held_out_loss(load_trained(tmp_path / "small"))[0] < held_out_loss(load_trained(run))[0] + 0.5
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/base\nHi\n"))
    answered = qlora("chat", run)
    assert answered.returncode == 0, answered.stderr
    plain = train(
        Recipe.load(recipe_file(output=str(tmp_path / "plain"), training={"max_steps": 1})), terminal=False
    )
    refused = qlora("chat", plain.run, "--adapter", f"tokens={run}")
    assert refused.returncode == 4
    assert "trained with another tokenizer than the one of" in " ".join(refused.stderr.split())
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/adapter plain\nHi\n"))
    both = qlora("chat", run, "--adapter", f"plain={plain.run}")
    assert both.returncode == 0, both.stderr


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("qwen2", "bfloat16"),
        pytest.param("llama", "float32", marks=pytest.mark.slow),
        pytest.param("gemma2", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_memory_is_forecast(tmp_path: Path, architecture: str, dtype: str) -> None:
    byte_level().save_pretrained(tmp_path)
    adapter = {"train_tokens": ["<one>", "<two>", "a"]}
    made = recipe(tmp_path, architecture, layers=7, adapter=adapter, base={"compute_dtype": dtype})
    assert_right(foreseen(made, assumed(made)), measured(made, assumed(made)))


def test_full_training_trains_all_rows_anyway() -> None:
    settings = {"base": {"model": "bundled/base", "quantization": "none"}, "data": {"source": "a.jsonl"}}
    with pytest.raises(RecipeError, match=r"adapter\.train_tokens: has no effect with adapter\.method: full"):
        Recipe.from_dict({**settings, "adapter": {"method": "full", "train_tokens": "new"}})
