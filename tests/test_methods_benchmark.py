"""The experiments: plan, ledger, statistics, simulated 4-bit weights, rivals of LoRA, and cells end to end."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.methods import claims, e2e, experiments, ledger, pictures, report, rows, simulated
from benchmarks.methods.__main__ import main
from benchmarks.methods.adapter_layers import WIDTH, AdapterLayers
from benchmarks.methods.cell import Cell, Setting
from benchmarks.methods.generation import CACHE, greedy
from benchmarks.methods.prefix_tuning import LENGTH, PrefixLM, PrefixTuning, keys_and_values, prefix_cache
from benchmarks.methods.results import Result
from benchmarks.methods.statistics import Interval, Paired, holm, t_quantile, t_tail
from qlora.adapter.adapted_linear import trainable_parameters
from qlora.data import IGNORE_INDEX, Batch
from qlora.objective.causal_lm import loss_sum
from qlora.recipe import Adapter
from qlora.recipe.methods import METHODS

BASE = Path(__file__).parents[1] / "qlora/bundled/base"


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# plan


def record(cell: Cell, loss: float | None) -> dict[str, object]:
    return {**cell.as_json(), "loss_after": loss, "seconds": 1.0, "base": "b"}


def screened(experiment: experiments.Experiment, loss_of: dict[Setting, float | None]) -> ledger.Records:
    cells = [Cell(setting, 0) for settings in experiment.settings.values() for setting in settings]
    return {cell.key: record(cell, loss_of.get(cell.setting, 9.0)) for cell in cells}


def test_the_plan_is_the_same_each_time_and_has_no_cell_twice() -> None:
    keys = [cell.key for _, cell in experiments.plan({})]
    assert keys == [cell.key for _, cell in experiments.plan({})]
    assert len(keys) == len(set(keys)) == experiments.upper_count()[0]


def test_every_method_of_the_registry_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {row.setting.method for row in rows.rows()} >= METHODS.keys()
    planned = {cell.setting.method for name, cell in experiments.plan({}) if name == "methods"}
    assert planned >= {*METHODS, "adapter_layers", "prefix_tuning", "none"}
    monkeypatch.setitem(METHODS, "unheard_of", METHODS["bitfit"])
    (row,) = rows.unnamed()
    assert row.setting == Setting.of("unheard_of", adapter__targets="all-linear")  # bitfit has no rank


def test_only_the_best_rate_goes_on_and_finished_cells_do_not_run_again() -> None:
    grid = [Setting.of("lora", optimizer__lr=lr) for lr in (1e-3, 2e-3, 4e-3)]
    experiment = experiments.Experiment("one", "?", {"LoRA": grid})
    assert [cell.setting for _, cell in experiments.plan({}, [experiment])] == grid
    records = screened(experiment, {grid[0]: 2.0, grid[1]: 1.0, grid[2]: None})
    more = [cell for _, cell in experiments.plan(records, [experiment])]
    assert more == [Cell(grid[1], seed) for seed in experiments.SEEDS]
    records[more[0].key] = record(more[0], 1.0)
    assert [cell for _, cell in experiments.plan(records, [experiment])] == more[1:]


def test_a_grid_grows_while_its_best_rate_is_at_an_end() -> None:
    grid = [Setting.of("lora", optimizer__lr=lr) for lr in (1.0, 2.0, 4.0)]
    experiment = experiments.Experiment("one", "?", {"LoRA": grid})
    records = screened(experiment, {grid[2]: 1.0})
    for lr in (8.0, 16.0, 32.0):
        (wider,) = [cell for _, cell in experiments.plan(records, [experiment])]
        assert (wider.setting, wider.seed) == (grid[0].but(optimizer__lr=lr), 0)
        records[wider.key] = record(wider, 1 / lr)
    assert {cell.seed for _, cell in experiments.plan(records, [experiment])} == set(experiments.SEEDS)
    lower = screened(experiment, {grid[0]: 1.0})
    assert experiments.extended(grid, lower) == [grid[0].but(optimizer__lr=0.5), *grid]


def test_a_grid_goes_on_with_the_best_value_and_its_neighbours() -> None:
    settings = {str(lr): [Setting.of("full", optimizer__lr=lr)] for lr in (1.0, 2.0, 4.0, 8.0)}
    experiment = experiments.Experiment("rates", "?", settings, neighbours=True)
    best = settings["2.0"][0]
    assert experiment.replicated({}) == []
    assert experiment.replicated(screened(experiment, {best: 0.5})) == [
        settings[lr][0] for lr in ("1.0", "2.0", "4.0")
    ]


def test_targets_are_compared_at_equal_numbers_of_parameters() -> None:
    hidden, inner, layers = 256, 704, 4
    sizes = {"all linears": 4 * 2 * hidden + 3 * (hidden + inner), "attention": 4 * 2 * hidden}
    sizes |= {"q and v": 2 * 2 * hidden, "MLP": 3 * (hidden + inner)}
    counts = [layers * size * experiments.matched_rank(label) for label, size in sizes.items()]
    assert counts[0] == 157_696
    assert max(counts) / min(counts) < 1.04


# ledger


def test_a_torn_last_line_costs_one_cell(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    ledger.append(file, {"key": "a", "base": "x"})
    with file.open("a") as torn:
        torn.write('{"key": "b", "ba')
    assert ledger.read(file).keys() == {"a"}
    ledger.append(file, {"key": "c", "base": "y"})
    assert ledger.read(file).keys() == {"a", "c"}
    assert ledger.of_base(ledger.read(file), "y").keys() == {"c"}
    assert file.read_text().count("\n") == 2


def test_a_damaged_line_inside_is_not_guessed(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    file.write_text('{"key": "a"}\n{"key": \n{"key": "b"}\n')
    with pytest.raises(SystemExit, match=r"cells\.jsonl:2: not a record"):
        ledger.read(file)


def test_a_run_continues_after_a_broken_cell_and_tries_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [Setting.of("lora", optimizer__lr=lr) for lr in (1.0, 2.0, 4.0)]
    one = experiments.Experiment("one", "?", {"LoRA": grid})
    monkeypatch.setattr(experiments, "experiments", lambda: [one])
    monkeypatch.setattr("benchmarks.methods.__main__._threads", lambda _: None)
    monkeypatch.setattr("benchmarks.methods.base.make", lambda *_: None)
    monkeypatch.setattr("benchmarks.methods.base.digest", lambda _: "b")
    monkeypatch.setattr("benchmarks.methods.machine.where", lambda _: {})
    ran: list[Cell] = []

    def train(cell: Cell, *_: object) -> dict[str, object]:
        ran.append(cell)
        if cell.setting == grid[0] and len(ran) == 1:
            raise ValueError("broken")
        return record(cell, 2.0 - (cell.setting == grid[1]))

    monkeypatch.setattr("benchmarks.methods.training.run", train)
    file, data = tmp_path / "cells.jsonl", write_data(tmp_path / "e2e")
    command = ["methods", "run", "--data", str(data), "--ledger", str(file), "--cache", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 1
    assert "FAILED one" in capsys.readouterr().err
    assert [cell.setting for cell in ran] == grid
    monkeypatch.setattr("sys.argv", [*command, "--part", "1/1"])
    assert main() == 0
    assert ran[3:] == [Cell(grid[0], 0), *(Cell(grid[1], seed) for seed in experiments.SEEDS)]
    assert main() == 0
    assert len(ran) == len(ledger.read(file)) + 1 == 9


# statistics


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227)],
)
def test_students_t_against_tables(freedom: int, t: float) -> None:
    assert t_tail(t, freedom) == pytest.approx(0.05, abs=1e-6)
    assert t_quantile(freedom) == pytest.approx(t, rel=1e-5)
    assert t_tail(0.0, freedom) == 1.0


def test_paired_differences() -> None:
    """Values of Student 1908: the gains in sleep of ten patients, t = 4.0621, p = 0.002833."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = Paired.of(dict(enumerate(second)), dict(enumerate(first)))
    assert found.difference.mean == pytest.approx(1.58)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert found.difference.half == pytest.approx(0.87989, abs=1e-4)
    assert Paired.of({1: 2.0, 2: 3.0, 7: 1.0}, {1: 1.0, 2: 1.0}).difference == Interval.of([1.0, 2.0])
    with pytest.raises(ValueError, match="no seed in common"):
        Paired.of({1: 2.0}, {2: 1.0})


def test_holms_correction() -> None:
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


# claims


def result(label: str, losses: list[float], before: float = 2.0) -> Result:
    records = {seed: {"loss_after": loss, "loss_before": before} for seed, loss in enumerate(losses, 1)}
    return Result(label, Setting.of("lora"), records, records[1])


def test_a_claimed_difference_needs_the_right_sign() -> None:
    low, high = result("low", [0.50, 0.52, 0.51, 0.49]), result("high", [0.61, 0.62, 0.60, 0.60])
    assert claims.differs("c", low, high, claims.negative).verdict == claims.HOLDS
    assert claims.differs("c", high, low, claims.negative).verdict == claims.FAILS
    assert claims.differs("c", low, result("two", [0.6, 0.6]), claims.negative).verdict == claims.WAITS
    assert claims.differs("c", low, None, claims.negative).verdict == claims.WAITS
    assert "low minus high: -0.1025 ± " in claims.differs("c", low, high, claims.negative).evidence


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([0.01, 0.02, 0.01, 0.02], claims.HOLDS),  # worse, but within 5% of the fall of 1.5 nats
        ([-0.3, -0.2, -0.3, -0.2], claims.HOLDS),
        ([0.20, 0.21, 0.20, 0.21], claims.FAILS),
        ([0.20, -0.20, 0.20, -0.20], claims.OPEN),
    ],
)
def test_a_claimed_equality_needs_the_whole_interval(gaps: list[float], verdict: str) -> None:
    base = [0.50, 0.51, 0.49, 0.50]
    first = result("first", [loss + gap for loss, gap in zip(base, gaps, strict=True)])
    assert claims.equals("c", first, result("second", base)).verdict == verdict


def test_a_table_without_cells_judges_nothing() -> None:
    tables = {experiment.name: {} for experiment in experiments.experiments()}
    judged = claims.verdicts(tables, None)
    assert {one.verdict for one in judged} == {claims.WAITS, claims.SIZE}
    page = "\n".join(report.markdown(experiments.experiments(), tables, {}, None, judged, []))
    assert "**No cell has run yet.**" in page
    assert page.count("Not run yet.") == len(tables) - 1


def test_the_page_is_made_of_a_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss falls with the rank here, and a learning rate of 4e-3 is best."""
    place = {"machine": "CPU", "cpu_flags": [], "versions": {}, "date": "2026-01-01", "base": "b"}
    records: ledger.Records = {}
    while pending := [cell for _, cell in experiments.plan(records)]:
        for cell in pending:
            rank, lr = cell.setting.get("adapter.rank", 8), cell.setting.get("optimizer.lr", 4e-3)
            loss = 1 / rank + abs(lr - 4e-3) + 1e-3 * cell.seed**2
            records[cell.key] = {
                **cell.as_json(), **place, "loss_after": loss, "loss_before": 3.0, "bleu": 50.0, "trainable": rank,
                "base_parameters": 100, "seconds": 1.0, "dtype": "float32",
            }  # fmt: skip
    file = tmp_path / "cells.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in records.values()))
    (tmp_path / "docs/benchmarks").mkdir(parents=True)
    drawn: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        "benchmarks.methods.pictures.write", lambda *arguments: drawn.append(arguments) or ["a.png"]
    )
    report.main(SimpleNamespace(ledger=file, docs=tmp_path / "docs"))
    ((tables, folder),) = drawn
    assert folder == tmp_path / "docs/pictures"
    page = (tmp_path / "docs/benchmarks/methods.md").read_text()
    assert "| r = 64 | 64 | 4e-3 | 0.0266 ± 0.0120 | -0.1094 ± 0.0000 | < 0.001 | 50.0 ± 0.0 | — |" in page
    assert "| r = 1 often works [D3]: as good as r = 8 | **does not hold here** |" in page
    assert pictures.rank(tables["rank"]).startswith(b"\x89PNG")
    assert json.loads((tmp_path / "methods.json").read_text())["experiments"]["rank"]["r = 1"]["bleu"] == {
        str(seed): 50.0 for seed in experiments.SEEDS
    }


# simulated 4-bit weights


@pytest.mark.parametrize("code", simulated.CODES)
@pytest.mark.parametrize("block_size", [16, 64])
def test_rounding_finds_the_nearest_code(code: str, block_size: int) -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    weight[0, :16] = 0.0  # a block of zeros has no scale
    rounded, flat = simulated.rounded(weight, simulated.CODES[code], block_size), weight.flatten()
    for start in range(0, flat.numel(), block_size):
        block = flat[start : start + block_size].tolist()
        absmax = max(map(abs, block))
        codes = [value * absmax for value in simulated.CODES[code]]
        nearest = [min(abs(value - candidate) for candidate in codes) for value in block]
        errors = (rounded.flatten()[start : start + block_size] - flat[start : start + block_size]).abs()
        assert errors.tolist() == pytest.approx(nearest, abs=1e-6)


def test_a_simulated_base_changes_only_its_linears(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    simulated.write(BASE, "int4-64", tmp_path / "int4-64")
    before, after = (load_file(folder / "model.safetensors") for folder in (BASE, tmp_path / "int4-64"))
    changed = {name for name, weight in before.items() if not torch.equal(weight.float(), after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    assert len(changed) == 28


# rivals


def test_adapter_layers_start_at_the_base(model: LlamaForCausalLM) -> None:
    ids = torch.arange(10)[None]
    before = model(ids).logits
    AdapterLayers().apply(model, Adapter(), seed=0)
    assert torch.equal(model(ids).logits, before)
    count = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    assert count == 2 * 2 * (2 * 64 * WIDTH + WIDTH + 64)
    model(ids).logits.sum().backward()
    assert all(layer.up.grad.any() for layer in model.modules() if hasattr(layer, "up"))


def test_a_prefix_of_real_tokens_is_the_text_before(model: LlamaForCausalLM) -> None:
    """The prefix starts as what the cache holds after real tokens, so the model then answers as after this text."""
    PrefixTuning().apply(model, Adapter(), seed=3)
    text = torch.randint(64, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[5, 9, 20, 31, 7]])
    whole = model(torch.cat([text, ids], 1)).logits[:, LENGTH:]
    with torch.no_grad():
        model.prefix.data = keys_and_values(model, text)  # without the rounding to bf16
    positions = LENGTH + torch.arange(5)[None]
    after = model(ids, position_ids=positions, use_cache=True, **{CACHE: prefix_cache(model, 1)}).logits
    assert torch.allclose(after, whole, atol=1e-5)

    labels = ids.clone()
    labels[:, :2] = IGNORE_INDEX
    batch = Batch(ids, labels, None, tokens=5, supervised=3)
    expected = torch.nn.functional.cross_entropy(whole[0, 1:4], ids[0, 2:], reduction="sum")
    loss = PrefixLM().loss(model, batch).sum
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() != pytest.approx(loss_sum(model, batch).item(), rel=1e-3)
    loss.backward()
    assert trainable_parameters(model).keys() == {"prefix"}
    assert model.prefix.shape == (2, 2, 2, LENGTH, 16)
    assert model.prefix.grad[:, 1].any()


# generation and data


def test_answers_do_not_depend_on_the_other_prompts(model: LlamaForCausalLM) -> None:
    prompts = [[3, 8], [40, 41, 42, 43, 44, 45], [7]]
    together = greedy(model, prompts, {1}, 6)
    assert together == [greedy(model, [prompt], {1}, 6)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, together, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        assert answer == [token for token in expected if token != 1]
    stopped = greedy(model, prompts, {together[1][2]}, 6)
    assert stopped[1] == together[1][: together[1].index(together[1][2])]


def write_data(folder: Path) -> Path:
    folder.mkdir()
    for name in e2e.FILES.values():
        lines = [
            f'"name[{place} {n}], area[riverside]","{place} {n} is  by the river."'
            for place in ("Eagle", "Mill") for n in range(40)
        ]  # fmt: skip
        (folder / name).write_text("\n".join(["mr,ref", *lines, lines[0]]) + "\n")
    return folder


def test_the_halves_of_the_training_set_share_no_facts(tmp_path: Path) -> None:
    data = e2e.E2E.read(write_data(tmp_path / "e2e"))
    assert {pair.mr for pair in data.base} & {pair.mr for pair in data.tune} == set()
    assert len(data.base) + len(data.tune) == 81
    assert data.base
    assert data.training_rows(1, 9) == data.training_rows(1, 9) != data.training_rows(2, 9)
    assert data.test["name[Eagle 0], area[riverside]"] == ["Eagle 0 is by the river."] * 2
    assert {row["prompt"] for row in e2e.base_rows(data.base)} & {pair.mr for pair in data.tune} == set()
    with pytest.raises(SystemExit, match=r"trainset\.csv: missing"):
        e2e.E2E.read(tmp_path)


def test_the_base_reads_the_facts_in_two_other_forms() -> None:
    mr = "name[Zizzi], eatType[pub], customer rating[5 out of 5], familyFriendly[no], near[Café Rouge]"
    reverse, listed = e2e.base_rows([e2e.Pair(mr, "Zizzi is a pub.")])
    assert reverse == {"prompt": "Zizzi is a pub.", "completion": mr}
    assert listed["completion"] == "Zizzi is a pub."
    assert sorted(listed["prompt"].split("; ")) == [
        "children welcome: no", "kind: pub", "name: Zizzi", "near: Café Rouge", "rating: 5 out of 5",
    ]  # fmt: skip


@pytest.mark.slow
def test_cells_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    from benchmarks.methods import training

    cache = tmp_path / "cache"
    shutil.copytree(BASE, cache / "16-bit")
    data = e2e.E2E.read(write_data(tmp_path / "e2e"))
    lora = rows.LORA.but(optimizer__lr=4e-3)
    cells = {
        "lora": Cell(lora, 1, "tiny"),
        "int4": Cell(Setting(lora.method, lora.keys, "int4-64"), 1, "tiny"),
        "prefix": Cell(Setting.of("prefix_tuning", optimizer__lr=1e-2), 1, "tiny"),
    }
    found = {name: training.run(cell, data, cache) for name, cell in cells.items()}
    assert training.run(cells["lora"], data, cache)["loss_after"] == found["lora"]["loss_after"]
    for name, result in found.items():
        assert result["key"] == cells[name].key
        assert result["steps"] == 2
        assert result["loss_after"] < result["loss_before"]
        assert math.isfinite(result["bleu"])
        json.dumps(result)
    assert found["lora"]["loss_before"] != found["int4"]["loss_before"]
    assert 1 < found["lora"]["effective_rank"] <= 8
    assert found["lora"]["trainable"] == 157_696
    assert found["prefix"]["trainable"] == 4 * 2 * 4 * LENGTH * 64
