"""`qlora eval --tasks`: lm-evaluation-harness with local tasks, where the extra `eval` is installed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands_for_tests import qlora
from runs_for_tests import finished_run

from qlora.inference.harness import Settings
from qlora.inference.load import load_trained
from qlora.recipe import Recipe
from qlora.training.train import train

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.slow,  # its import takes seconds
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("default"),  # the harness's and those of its libraries
]

RecipeFile = Callable[..., Path]

PAIRS = [
    {"prompt": "The bag has a hole. Team:", "completion": " repair"},
    {"prompt": "My card was charged twice. Team:", "completion": " billing"},
    {"prompt": "Send two red lamps to Anna. Team:", "completion": " orders"},
]

TASKS = {
    "likelihood": {
        "output_type": "loglikelihood", "doc_to_text": "{{prompt}}", "doc_to_target": "{{completion}}</s>",
        "target_delimiter": "", "metric_list": [{"metric": "perplexity"}],
    },
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_target": "{{label}}",
        "doc_to_choice": ["repair", "billing", "orders"], "metric_list": [{"metric": "acc"}],
    },
    "answer": {
        "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{completion}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Return a folder of tasks with three rows."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{**pair, "label": number} for number, pair in enumerate(PAIRS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, settings in TASKS.items():
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        }
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(
            json.dumps({"task": name, "test_split": "test", **data, **settings})
        )
    return folder


def evaluated(*arguments: object) -> dict[str, Any]:
    done = qlora("eval", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def scores(run: Path, tasks: Path, *more: object) -> dict[str, dict[tuple[str, str], float]]:
    found = evaluated(run, "--tasks", ",".join(TASKS), "--task-path", tasks, *more)["scores"]
    return {
        name: {(score["task"], score["metric"]): score["value"] for score in given}
        for name, given in found.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_harness_computes_the_loss_of_the_model_and_of_its_base(
    recipe_file: RecipeFile, tmp_path: Path, tasks: Path, dtype: str
) -> None:
    run = finished_run(Recipe.load(recipe_file(base={"compute_dtype": dtype})))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    ours = evaluated(run, "--data", rows, "--format", "prompt-completion", "--with-base")
    theirs = scores(run, tasks, "--with-base", "--batch-size", 2)
    assert ours["eval_loss"] != pytest.approx(ours["base"]["eval_loss"], rel=1e-3)
    for name, loss in (("adapter", ours), ("base", ours["base"])):
        total = loss["eval_loss"] * loss["eval_tokens"] / len(PAIRS)
        found = math.log(theirs[name]["likelihood", "perplexity"])
        assert found == pytest.approx(total, rel=1e-5 if dtype == "float32" else 1e-2)
        assert 0 <= theirs[name]["choice", "acc"] <= 1
        assert theirs[name]["answer", "exact_match"] == 0


def test_a_table_shows_base_beside_adapter(recipe_file: RecipeFile, tasks: Path) -> None:
    run = finished_run(Recipe.load(recipe_file()))
    done = qlora("eval", run, "--tasks", "choice", "--task-path", tasks, "--with-base", "--limit", 2)
    assert done.returncode == 0, done.stderr
    head, row = done.stdout.splitlines()
    assert head.split() == ["task", "metric", "filter", "rows", "fine-tuned", "base"]
    assert row.split()[:4] == ["choice", "acc", "none", "2"]
    assert row.count("±") == 2


def test_questions_are_written_as_in_training(recipe_file: RecipeFile, tasks: Path) -> None:
    from qlora.inference.harness import _model

    data = {"template": "chatml", "system": "Sort the message."}
    run = finished_run(Recipe.load(recipe_file(data=data)))
    trained = load_trained(run)
    model = _model(trained, Settings(("choice",), chat_template=True))
    history = [{"role": "system", "content": "Sort the message."}, {"role": "user", "content": "Hello!"}]
    prompt = model.apply_chat_template(history)
    assert "<|im_start|>" in prompt
    assert model.tok_encode(prompt) == trained.prompts.encode("Hello!")
    assert trained.tokenizer.chat_template != model.tokenizer.chat_template, (
        "the tokenizer itself is unchanged"
    )
    with_template, without = scores(run, tasks, "--chat-template"), scores(run, tasks)
    assert with_template != without


def test_rows_without_a_template_have_none_in_tasks(
    recipe_file: RecipeFile, tmp_path: Path, tasks: Path
) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    run = finished_run(
        Recipe.load(recipe_file(data={"source": str(rows), "format": "prompt-completion", "held_out": 1}))
    )
    done = qlora("eval", run, "--tasks", "choice", "--task-path", tasks, "--chat-template")
    assert done.returncode == 2
    assert "the training rows were written without a chat template" in done.stderr


@pytest.mark.usefixtures("without_forecast")
@pytest.mark.parametrize(
    "sections",
    [
        {"base": {"quantization": "none"}, "adapter": {"method": "full", "rank": None, "targets": None}},
        {"adapter": {"train_tokens": ["team"]}},
        {"adapter": {"method": "dora"}},
    ],
    ids=["full", "trained tokens", "dora"],
)
def test_other_results_are_evaluated_too(
    recipe_file: RecipeFile, tasks: Path, sections: dict[str, Any]
) -> None:
    file = recipe_file(training={"max_steps": 2}, optimizer={"lr": 1e-2}, **sections)
    settings = json.loads(file.read_text())
    settings["adapter"] = {key: value for key, value in settings["adapter"].items() if value is not None}
    file.write_text(json.dumps(settings))
    run = train(Recipe.load(file), terminal=False).run
    found = scores(run, tasks, "--with-base")
    assert found["adapter"]["likelihood", "perplexity"] != found["base"]["likelihood", "perplexity"]


def test_tasks_that_cannot_be_used_are_named(recipe_file: RecipeFile, tasks: Path, tmp_path: Path) -> None:
    run = finished_run(Recipe.load(recipe_file()))

    def message(names: str, path: Path = tasks) -> tuple[int, str]:
        done = qlora("eval", run, "--tasks", names, "--task-path", path)
        return done.returncode, done.stderr.splitlines()[-1]

    assert message("choise")[1].startswith(
        "qlora: --tasks: no task 'choise'; did you mean 'choice'? `lm-eval ls"
    )
    assert message(",")[1].startswith("qlora: --tasks: no name given")
    assert message("choice", tmp_path / "no")[1] == (
        f"qlora: --task-path: {tmp_path}/no is not a folder; give the folder of the tasks' YAML files"
    )
    (tasks / "rows.jsonl").unlink()
    code, text = message("choice")
    assert code == 3
    assert text.startswith("qlora: --tasks: the rows of a task cannot be loaded (FileNotFoundError")
    (tasks / "broken.yaml").write_text('{"task": "broken", "output_type": "guess", "dataset_path": "json"}')
    code, text = message("broken")
    assert code in (2, 3)
    assert text.startswith("qlora: --tasks: ")
