"""The load-balancing loss of a mixture's routers equals transformers', in every way that a step can compute it."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import architectures_for_tests as small
import pytest
import torch
from processes_for_tests import two_ranks
from runs_for_tests import stop_after
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora import bundled
from qlora.adapter import LoraSpec, adapt, lora_layers
from qlora.data import Batch, Example
from qlora.data.batches import collate
from qlora.errors import ModelError, RecipeError
from qlora.model.checkpointing import checkpoint_layers
from qlora.model.load import load_tokenizer
from qlora.model.router_loss import RouterLoss, add_router_loss, is_computed, router_loss_of
from qlora.objective.apart import read_documents_if_apart
from qlora.objective.causal_lm import CausalLM, hidden_states
from qlora.objective.checks import check_model, check_router_loss
from qlora.objective.step import accumulate, evaluate
from qlora.recipe import Recipe
from qlora.training.recipe_changes import effect_of
from qlora.training.run_folder import check_output, claim
from qlora.training.train import train

MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "granitemoe")
COEFFICIENT = 0.5
"""large, so that a gradient without the loss is far from the right one"""


def mixture(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    asked = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT, **changes}
    if kind in small.ARCHITECTURES:
        asked["num_hidden_layers"] = 2  # as the others have
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small.config(kind, **asked), dtype=dtype).train()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    add_router_loss(model, "auto")
    return model


def rows(*documents: Sequence[int], packed: bool = False, seed: int = 0) -> Batch:
    """Return a batch of rows, each with documents of these lengths."""
    draw = torch.Generator().manual_seed(seed)

    def document(length: int) -> Example:
        ids = torch.randint(3, 512, (length,), generator=draw).tolist()
        return Example(ids, ids, "test:1")

    return collate([[document(length) for length in row] for row in documents], pad_id=0, packed=packed)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def step(model: Any, *batches: Batch, **settings: Any) -> tuple[float, float, dict[str, Tensor]]:
    """Return the loss, the auxiliary loss and the gradients of a step."""
    total = accumulate(model, batches, CausalLM(), seed=0, step=0, **settings)
    assert total.aux is not None
    return total.sum.item(), total.aux.item(), gradients(model)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    for name, right in expected.items():
        torch.testing.assert_close(
            found[name],
            right,
            rtol=rtol,
            atol=rtol * right.abs().max().item(),
            msg=lambda text: f"{name}: {text}",  # noqa: B023
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_padded_micro_batch_has_the_loss_and_the_gradients_of_transformers(
    kind: str, dtype: torch.dtype
) -> None:
    model, batch = mixture(kind, dtype), rows([9], [6])
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    output = model(input_ids=batch.input_ids, attention_mask=mask.long(), labels=batch.labels)
    output.loss.backward()
    expected = gradients(model)
    loss, aux, found = step(model, batch)
    assert aux == pytest.approx(output.aux_loss.item(), rel=1e-6)
    assert loss == pytest.approx(output.loss.item(), rel=1e-6)
    assert_equal(found, expected)


def reference(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return transformers' two losses of a batch, with its own attention and without padding."""
    tokens = torch.zeros(batch.input_ids.shape)
    for row, length in enumerate(batch.row_lengths):
        tokens[row, :length] = 1
    output = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, output_router_logits=True, use_cache=False
    )
    logits = model.lm_head(output.last_hidden_state)
    entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    module = __import__(type(model).__module__, fromlist=["load_balancing_loss_func"])
    return entropy, module.load_balancing_loss_func(output.router_logits, 4, 2, tokens)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", pytest.param("olmoe", marks=pytest.mark.slow)])
def test_packed_documents_have_it_too_in_rows_and_end_to_end(kind: str, documents: bool) -> None:
    model, batch = mixture(kind), rows([5, 4], [6], packed=True)
    entropy, balance = reference(model, batch)
    (entropy + COEFFICIENT * balance).backward()
    expected = gradients(model)
    assert not documents or read_documents_if_apart(model)
    loss, aux, found = step(model, batch)
    assert aux == pytest.approx(balance.item(), rel=1e-5)
    assert loss == pytest.approx(entropy.item() + COEFFICIENT * balance.item(), rel=1e-5)
    assert_equal(found, expected, rtol=1e-4)


def test_micro_batches_count_by_their_tokens_in_one_process_and_in_two() -> None:
    model, batches = mixture("mixtral"), [rows([9], [6]), rows([5], [3], seed=1)]
    parts = [reference(model, batch) for batch in batches]
    supervised, tokens = [8 + 5, 4 + 2], [15, 8]
    balance = sum(part[1] * count for part, count in zip(parts, tokens, strict=True)) / 23
    entropy = sum(part[0] * count for part, count in zip(parts, supervised, strict=True)) / 19
    (entropy + COEFFICIENT * balance).backward()
    expected = gradients(model)
    loss, aux, found = step(model, *batches)
    assert aux == pytest.approx(balance.item(), rel=1e-5)
    assert loss == pytest.approx((entropy + COEFFICIENT * balance).item(), rel=1e-5)
    assert_equal(found, expected)
    shares = [step(model, *batches, rank=rank, processes=2) for rank in (0, 1)]
    assert sum(share[0] for share in shares) == pytest.approx(loss, rel=1e-6)
    assert sum(share[1] for share in shares) == pytest.approx(aux, rel=1e-6)
    assert_equal({name: shares[0][2][name] + shares[1][2][name] for name in found}, found)
    idle = accumulate(model, batches, CausalLM(), seed=0, step=0, rank=2, processes=3)
    assert idle.aux == 0, "otherwise the processes would wait for each other"


@pytest.mark.parametrize("offload", [False, True])
def test_recomputed_layers_give_the_same_gradients_and_are_counted_once(offload: bool) -> None:
    model, batch = mixture("mixtral"), rows([9], [6])
    kept = step(model, batch)
    checkpoint_layers(model, offload=offload)
    again = step(model, batch)
    assert again[:2] == kept[:2]
    assert_equal(again[2], kept[2], rtol=1e-6)
    with router_loss_of(model).collected() as routed:  # type: ignore[union-attr]
        hidden, _ = hidden_states(model, batch)
    (hidden.sum() + routed.loss()).backward()
    assert routed._sums is not None
    assert routed._sums[2].item() == 2 * 15, "each layer's tokens once, without padding"


def test_held_out_losses_are_the_cross_entropy_alone_and_change_nothing() -> None:
    model, batch = mixture("mixtral"), rows([9], [6])
    entropy, balance = reference(model, batch)
    found, weight = evaluate(model, [batch])
    assert found.aux is None
    assert CausalLM().loss(model.eval(), batch).aux is None
    model.train()
    assert found.sum.item() / weight == pytest.approx(entropy.item(), rel=1e-6)
    assert step(model, batch)[0] == pytest.approx((entropy + COEFFICIENT * balance).item(), rel=1e-6)
    assert model.config.output_router_logits is True


def test_a_coefficient_of_the_recipe_overrules_the_configuration() -> None:
    batch, asking = rows([9], [6]), mixture("mixtral")
    entropy, balance = reference(asking, batch)
    silent = mixture("mixtral", output_router_logits=False)
    assert router_loss_of(silent) is None
    total = accumulate(silent, [batch], CausalLM(), seed=0, step=0)
    assert total.aux is None
    assert total.sum.item() == pytest.approx(entropy.item(), rel=1e-6)
    add_router_loss(silent, 0.25)
    assert step(silent, batch)[0] == pytest.approx((entropy + 0.25 * balance).item(), rel=1e-6)
    add_router_loss(silent, 0.75)
    with router_loss_of(silent).collected() as routed:  # type: ignore[union-attr]
        hidden_states(silent, batch)
    assert routed._sums is not None
    assert routed._sums[2].item() == 2 * 15, "a router counts once, also if the coefficient is set again"
    add_router_loss(asking, "off")
    assert accumulate(asking, [batch], CausalLM(), seed=0, step=0).aux is None


def test_routers_are_frozen_unless_they_are_targets_or_trained_as_a_whole() -> None:
    batch = rows([9], [6])
    mixtral = adapt(
        mixture("mixtral"), LoraSpec(rank=2, targets=["q_proj"]), train_modules=["layers.0.mlp.gate"]
    )
    accumulate(mixtral, [batch], CausalLM(), seed=0, step=0)
    trained, frozen = (mixtral.get_submodule(f"model.layers.{number}.mlp.gate").weight for number in (0, 1))
    assert trained.grad.abs().max() > 0
    assert not frozen.requires_grad
    settings = {"ffn_config": {**small.APART["dbrx"]["ffn_config"], "moe_loss_weight": COEFFICIENT}}
    dbrx = adapt(mixture("dbrx", **settings), LoraSpec(rank=2, targets=["router.layer"]))
    for layer in lora_layers(dbrx).values():
        torch.nn.init.normal_(layer.lora_b)
    check_router_loss(dbrx)
    accumulate(dbrx, [batch], CausalLM(), seed=0, step=0)
    assert all(layer.lora_b.grad.abs().max() > 0 for layer in lora_layers(dbrx).values())


def test_a_model_without_the_loss_or_with_another_one_is_refused(recipe_file: Callable[..., Path]) -> None:
    with pytest.raises(
        RecipeError, match=r"^training\.router_loss: transformers computes no .* for llama\. Leave"
    ):
        add_router_loss(mixture("llama"), 0.1)
    with pytest.raises(RecipeError, match=r"the code of doge has no load-balancing loss .*router_loss=off$"):
        mixture("doge")
    made = Recipe.load(recipe_file())
    model, tokenizer = mixture("mixtral", vocab_size=2048), load_tokenizer(made.base)
    check_model(model, tokenizer, made)
    router_loss_of(model).chosen = 1  # type: ignore[union-attr]
    with pytest.raises(
        ModelError,
        match=r"MixtralForCausalLM computes its load-balancing loss in a way .* \(1\.0.* pass 2\.0",
    ):
        check_model(model, tokenizer, made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*small.ARCHITECTURES, *small.LEAKY, *small.APART])
def test_every_mixture_has_transformers_loss_and_no_other_model_has_one(kind: str) -> None:
    if not is_computed(small.config(kind)):
        model = mixture(kind, aux_loss_coef=COEFFICIENT)
        assert router_loss_of(model) is None
    elif kind != "doge":
        changes = (
            {"ffn_config": {**small.APART["dbrx"]["ffn_config"], "moe_loss_weight": 0.5}}
            if kind == "dbrx"
            else {}
        )
        model = mixture(kind, aux_loss_coef=COEFFICIENT, **changes)
        assert isinstance(router_loss_of(model), RouterLoss)
        check_router_loss(model)


@pytest.fixture
def mixture_base(tmp_path: Path) -> Path:
    """Return a folder with a small Mixtral that asks for the loss, and a tokenizer."""
    base = tmp_path / "base"
    mixture("mixtral", vocab_size=2048).save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path("bundled/base") / file, base)
    return base


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = ("tokens_per_second", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


@pytest.mark.usefixtures("without_forecast")
def test_a_run_records_the_loss_and_resumes_bit_for_bit(
    recipe_file: Callable[..., Path], mixture_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(
        base={"model": str(mixture_base), "quantization": "none"},
        adapter={"targets": "attention", "dropout": 0.1},
        training={"max_steps": 2},
    )

    def run(name: str, **options: Any) -> Any:
        return train(Recipe.load(file, [f"output={tmp_path / name}"]), terminal=False, **options)

    whole = run("whole")
    with monkeypatch.context() as patched:
        stop_after(1, patched)
        assert run("parts").steps == 1
    parts = run("parts", resume=True)
    assert records(parts.run) == records(whole.run)
    weights = "adapter/adapter_model.safetensors"
    assert (parts.run / weights).read_bytes() == (whole.run / weights).read_bytes()
    first = next(line for line in records(whole.run) if "loss" in line)
    assert first["aux_loss"] == pytest.approx(2, rel=0.1)
    assert first["loss"] == pytest.approx(whole.loss_before + COEFFICIENT * first["aux_loss"], rel=0.02)
    assert whole.facts is not None
    assert any("plus 0.5 times the load-balancing loss" in note for note in whole.facts["notes"])
    assert "Auxiliary loss" in (whole.run / "report.html").read_text()


def test_another_micro_batch_size_is_said_to_change_the_loss(tmp_path: Path) -> None:
    record, key = tmp_path / "metrics.jsonl", "training.micro_batch_size"
    assert "rounds differently" in effect_of(key, record)
    record.write_text('{"step": 1, "loss": 2.5, "aux_loss": 2.0}\n')
    assert "trains with another one" in effect_of(key, record)
    assert "rounds differently" in effect_of("training.loss_chunk", record)


@pytest.mark.slow
def test_two_processes_record_the_loss_of_one(
    recipe_file: Callable[..., Path], mixture_base: Path, tmp_path: Path
) -> None:
    file = recipe_file(
        base={"model": str(mixture_base), "quantization": "none"},
        adapter={"targets": "attention"},
        training={"global_batch_size": 6, "max_steps": 2},
    )
    alone = train(Recipe.load(file, [f"output={tmp_path / 'alone'}"]), terminal=False)
    assert [process.wait() for process in two_ranks(file, tmp_path)] == [0, 0]
    for left, right in zip(records(alone.run), records(tmp_path / "run"), strict=True):
        assert left == pytest.approx(right, rel=2e-3)  # bf16 gradients are summed in another order
        assert ("aux_loss" in left) is ("loss" in left)


def test_a_run_of_an_earlier_version_can_resume_without_the_loss(recipe_file: Callable[..., Path]) -> None:
    began = Recipe.load(recipe_file())
    folder = claim(began, Path(began.output), resume=False, fresh=False).path
    now = Recipe.load(recipe_file(training={"router_loss": "off"}))
    with pytest.raises(RecipeError, match=r"training\.router_loss: 'auto' then, 'off' now"):
        check_output(now, folder, resume=True, fresh=False)
    recorded = folder / "recipe.yaml"
    recorded.write_text(recorded.read_text().replace("  router_loss: auto\n", ""))
    assert check_output(now, folder, resume=True, fresh=False)
