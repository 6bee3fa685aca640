"""Recipes with mistakes: every error names the place and the correction, and none is a traceback.

Each mutation is made here, so its place and the expected message are known.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qlora.errors import RecipeError
from qlora.recipe import Recipe
from qlora.recipe.fields import at, names, options
from qlora.recipe.problems import SECRET
from qlora.recipe.reading import MAX_PROBLEMS, read
from qlora.recipe.unknown import unknown

SCHEMA = Recipe.json_schema()
FULL = Recipe.from_dict(
    {
        "base": {"model": "some/model"},
        "adapter": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4.0}},
        "data": {"source": "some/data", "columns": {"output": "answer"}},
    }
).to_yaml()
LINE = re.compile(r"( *)(\w+):(?: (.+))?")


def located(text: str) -> Iterator[tuple[int, int, str, str | None]]:
    """Yield (line, column, dotted key, value) of every key of a block-style YAML text with two spaces a level."""
    above: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if found := LINE.fullmatch(line):
            indent, name, value = found.groups()
            above = [*above[: len(indent) // 2], name]
            yield number, len(indent) + 1, ".".join(above), value


KEYS = list(located(FULL))
SCALARS = [entry for entry in KEYS if entry[3] not in (None, "{}", "[]")]
everywhere = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def with_line(number: int, line: str) -> str:
    lines = FULL.splitlines()
    lines[number - 1] = line
    return "\n".join(lines) + "\n"


def failure(folder: Path, text: str | bytes, overrides: tuple[str, ...] = ()) -> list[str]:
    """Return the lines of the error for a recipe with this text."""
    path = folder / "r.yaml"
    path.write_bytes(text.encode(errors="surrogatepass") if isinstance(text, str) else text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, overrides)
    assert caught.value.exit_code == 2
    assert [file.name for file in folder.iterdir()] == ["r.yaml"]
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_the_corpus_has_every_setting() -> None:
    others = {
        key for key in names(SCHEMA) if key.startswith("adapter.budget")
    }  # keys of AdaLoRA, not of LoRA
    assert {key for _, _, key, _ in KEYS} >= set(names(SCHEMA)) - others


@everywhere
@given(st.sampled_from(KEYS), st.data())
def test_an_unknown_key_is_named_with_the_intended_one(
    tmp_path: Path, entry: tuple[int, int, str, str | None], data: st.DataObject
) -> None:
    number, column, key, value = entry
    name = key.rpartition(".")[2]
    assume("pattern." not in key and "columns." not in key and len(name) > 3)
    spot = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from("aehinorstxz_"))
    typo = data.draw(
        st.sampled_from(
            [
                name[:spot] + name[spot + 1 :],
                name[:spot] + letter + name[spot:],
                name[:spot] + letter + name[spot + 1 :],
            ]
        )
    )
    assume(typo and typo not in {known.rpartition(".")[2] for known in names(SCHEMA)})
    line = FULL.splitlines()[number - 1].replace(name, typo, 1)
    lines = failure(tmp_path, with_line(number, line))
    wrong = key.removesuffix(name) + typo
    [said] = [line for line in lines if line.startswith(f"r.yaml:{number}:{column}: {wrong}: ")]
    assert re.search(rf"unknown key; did you mean .*'{name}'.*\?", said)  # with others, if ambiguous
    assert all("is required" in line for line in lines if line != said)  # base and data are required
    assert value is None or len(lines) <= 2


@pytest.mark.parametrize("typo", ["itit", "inin", "iit", "inits"])
def test_a_repeated_letter_does_not_hide_the_intended_key(typo: str) -> None:
    # difflib calls `itit` and `init` half alike, the same as two unrelated words
    assert unknown(("base", typo), SCHEMA) == "unknown key; did you mean 'init'?"


NOT = {
    "integer": ["x", "'3'", "2.5", "true", "[1]", "{a: 1}", "-1", "010", "1_000", "1:30", ".nan", "3.0"],
    "number": ["x", "'1e-4'", "true", "-1", ".nan", ".inf", "1e400", "1_0.0", "[1]", "no", "{a: 1}", "1e-4x"],
    "boolean": ["on", "yes", "off", "1", "'true'", "null", "[true]", "tRUE"],
    "word or mapping": ["nonsense", "true", "3", "[full]", "null", "''", "2.5"],
    "word or number": ["nonsense", "true", "0", "-1", "'1e-4'", "[auto]", "null", "''", ".inf", "on"],
    "enum": ["nonsense", "true", "3", "[nf4]", "null", "''", "{a: 1}"],
    "string": ["3", "true", "1e5", "[x]", "{b: c}", "''"],
    "list": ["3", "x", "{a: 1}", "null", "[[1]]"],
}  # fmt: skip
LISTS = ["optimizer.betas", "tracking.wandb.tags", "adapter.targets"]
ANYTHING = ["data.held_out"]  # a share, a number or a path: almost every value fits


def kind(key: str) -> str:
    node = at(tuple(key.split(".")), SCHEMA)
    if {option.get("type") for option in options(node, SCHEMA)} == {"string", "object"}:
        return "word or mapping"
    if {option.get("type") for option in options(node, SCHEMA)} == {"string", "number"}:
        return "word or number"
    node = next((option for option in node.get("anyOf", []) if option.get("type") != "null"), node)
    return "enum" if "enum" in node else str(node.get("type"))


CHECKED = [entry for entry in SCALARS if entry[2] not in [*LISTS, *ANYTHING]]


def wrongly(number: int, value: str, wrong: str) -> str:
    return FULL.splitlines()[number - 1].removesuffix(value) + wrong


@everywhere
@given(st.sampled_from(CHECKED), st.data())
def test_a_wrong_value_is_named_with_what_is_allowed(
    tmp_path: Path, entry: tuple[int, int, str, str], data: st.DataObject
) -> None:
    number, column, key, value = entry
    wrong = data.draw(st.sampled_from(NOT[kind(key)]))
    [said] = failure(tmp_path, with_line(number, wrongly(number, value, wrong)))
    assert re.match(rf"r\.yaml:{number}:{column}: {re.escape(key)}: must be .+ \(you wrote .+\)", said), said


@pytest.mark.parametrize("turn", range(max(map(len, NOT.values()))))
def test_every_value_can_be_wrong_at_once(tmp_path: Path, turn: int) -> None:
    lines = FULL.splitlines()
    for number, _, key, value in CHECKED:
        choices = NOT[kind(key)]
        lines[number - 1] = wrongly(number, str(value), choices[turn % len(choices)])
    said = failure(tmp_path, "\n".join(lines))
    assert [line.split(": ")[:2] for line in said] == [[f"r.yaml:{n}:{c}", key] for n, c, key, _ in CHECKED]
    assert all(" must be " in line and "(you wrote " in line for line in said)


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize("wrong", NOT["list"])
def test_a_wrong_list_is_named_with_what_is_allowed(tmp_path: Path, key: str, wrong: str) -> None:
    [said] = failure(tmp_path, FULL.replace("\n  betas:\n  - 0.9\n  - 0.999", ""), (f"{key}={wrong}",))
    assert re.match(rf"command line: {re.escape(key)}(\[0\])?: must be ", said)


@everywhere
@given(st.sampled_from(KEYS))
def test_a_key_that_is_written_twice_is_named_with_both_lines(
    tmp_path: Path, entry: tuple[int, int, str, str | None]
) -> None:
    number, column, key, value = entry
    lines = FULL.splitlines()
    again = f"{' ' * (column - 1)}{key.rpartition('.')[2]}: {value or '{}'}"
    end = next((i for i in range(number, len(lines)) if not lines[i].startswith(" " * column)), len(lines))
    # after the whole value; a list in YAML can be indented as little as its key
    end = next((i for i in range(end, len(lines)) if not lines[i].lstrip().startswith("- ")), len(lines))
    said = failure(tmp_path, "\n".join([*lines[:end], again, *lines[end:]]))
    assert said == [f"r.yaml:{end + 1}:{column}: {key}: is set twice, first on line {number}; keep one"]


def test_an_empty_key_that_is_written_twice_is_named_with_both_lines() -> None:
    [problem] = read("a:\n  '': 1\n  '': 2\n", "r.yaml").problems
    assert str(problem) == "r.yaml:3:3: a: is set twice, first on line 2; keep one"


@pytest.mark.parametrize(("section", "key"), [("base", "base.model"), ("data", "data.source")])
def test_a_missing_required_key_is_named_with_its_meaning(tmp_path: Path, section: str, key: str) -> None:
    [(number, column)] = [(n, c) for n, c, name, _ in KEYS if name == section]
    lines = [
        line for n, line in enumerate(FULL.splitlines(), 1) if n not in [e[0] for e in KEYS if e[2] == key]
    ]
    [said] = failure(tmp_path, "\n".join(lines))
    assert said.startswith(f"r.yaml:{number}:{column}: {key}: is required: A ")


REQUIRED = {"base": "base: {model: some/model}", "data": "data: {source: some/data}"}
# text for a recipe, inserted from line 3 on unless it has base or data -> part of the single line of the error
CASES = {
    # wrong nesting
    "rank: 8": "3:1: rank: unknown key; did you mean 'adapter.rank'?",
    "training: {lr: 1}": "3:12: training.lr: unknown key; did you mean 'optimizer.lr'?",
    "adapter: {name: x}": "3:11: adapter.name: unknown key; did you mean 'optimizer.name' or",
    "adapter:": "3:1: adapter: is empty; indent its keys below it, or leave it out",
    "adapter: lora": "3:1: adapter: is a section, not a value (you wrote lora); set its keys",
    # other frameworks' names
    "optimizer: {learning_rate: 1}": "3:13: optimizer.learning_rate: unknown key; did you mean 'lr'?",
    "gradient_accumulation_steps: 4": "did you mean 'training.global_batch_size'?",
    "zzz: 4": "3:1: zzz: unknown key; a recipe has the keys version, base, adapter, data, training, optimizer,",
    # values that YAML invites
    "base: {model: m, double_quant: on}": "must be true or false (you wrote on); write true",
    "training: {seed: 007}": "must be an integer of at least 0 (you wrote 007); write 7",
    "training: {seed: 1_000}": "must be an integer of at least 0 (you wrote 1_000); write 1000",
    "training: {seed: '7'}": "must be an integer of at least 0 (you wrote '7'); leave the quotes out",
    "training: {max_steps: 1e3}": "must be an integer of at least 1 or null (you wrote 1e3); write 1000",
    "adapter: {targets: q_proj}": "each item text (you wrote q_proj); write [q_proj]",
    "adapter: {targets: all_linear}": "(you wrote all_linear); did you mean all-linear?",
    "adapter: {targets: []}": "must be attention, experts, all-linear or a list of one or more, each item text",
    "base: {model: m, revision: 1234567}": "must be text or null (you wrote 1234567); put it in quotes",
    "training: {memory: 12}": "3:12: training.memory: must be auto, null or a size with a unit, such as 12GiB",
    "training: {memory: '12'}": "training.memory: '12' is not a memory size; write it with a unit, such as 12GiB",
    "optimizer: {name: paged_adam_32bit}": "did you mean paged_adamw_32bit?",
    "data: {source: s, held_out: '0.1'}": "data.held_out: '0.1' is text; write a share as 0.02",
    "data: {source: s, held_out: 1.5}": "must be a number above 0 and below 1, an integer of at least 0 or",
    "optimizer: {betas: [0.9]}": "3:13: optimizer.betas: must be a list of two, each item a number of at",
    "optimizer: {betas: [0.9, 1]}": "3:26: optimizer.betas[1]: must be a number of at least 0 and below 1",
    # numbers that float32 cannot compute with
    "adapter: {alpha: 1e300}": "adapter.alpha: must be a number of at least 1e-30 and of at most 1e+06 or null",
    "adapter: {alpha_pattern: {q: 1e300}}": "adapter.alpha_pattern.q: must be a number of at least 1e-30 and of",
    "adapter: {lr_ratio: 1e7}": "adapter.lr_ratio: must be a number of at least 1e-30 and of at most 1e+06",
    "optimizer: {lr: 1e30}": "optimizer.lr: must be a number of at least 1e-30 and of at most 1e+06",
    "optimizer: {weight_decay: 1e30}": "optimizer.weight_decay: must be a number of at least 0 and of at most 1e+06",
    "optimizer: {eps: 1e-320}": "optimizer.eps: must be a number of at least 1e-30 and of at most 1e+06",
    "training: {max_grad_norm: 1e-320}": "training.max_grad_norm: must be a number of at least 1e-09 and of at most",
    "adapter: {rank_pattern: {q: 0}}": "3:26: adapter.rank_pattern.q: must be an integer of at least 1",
    "adapter: {rank_pattern: 3}": "must be a mapping from names to values, each an integer of at least 1",
    # settings that exclude each other
    "adapter: {method: full}": "3:11: adapter.method: full needs base.quantization: none",
    "base: {model: m, quantization: none}\nadapter: {method: full, rank: 8}": "adapter.rank: has no effect",
    "adapter: {scaling: alpha}": "3:11: adapter.scaling: alpha needs the factor itself in adapter.alpha, such as 1",
    "base: {model: m, quantization: none, block_size: 64}": "base.block_size: has no effect with",
    "base: {model: ./m, revision: x}": "base.revision: has no effect with base.model: ./m",
    "data: {source: x.jsonl.gz, split: train}": "data.split: has no effect with data.source: x.jsonl.gz",
    "data: {source: s, format: completion, train_on: all}": "data.train_on: has no effect with data.format:",
    "data: {source: s, format: text, template: plain}": "data.template: has no effect with data.format: text",
    "data: {source: s, held_out: 0}\ntraining: {samples: 3}": "training.samples: has no effect with",
    "training: {samples: 0, sample_tokens: 9}": "training.sample_tokens: has no effect with",
    "training: {save_every: null, keep_checkpoints: 3}": "has no effect with training.save_every: null",
    "optimizer: {name: lion, eps: 1e-6}": "optimizer.eps: has no effect with optimizer.name: lion",
    "tracking: {wandb: {mode: disabled, tags: [a]}}": "has no effect with tracking.wandb.mode: disabled",
    "training: {activation_checkpointing: mpl}": "full or a mapping with the keys full and mlp (you wrote mpl); did",
    "training: {activation_checkpointing: 3}": "none, mlp, full or a mapping with the keys full and mlp (you wrote 3)",
    "training: {activation_checkpointing: null}": "full or a mapping with the keys full and mlp (you wrote null)",
    "training: {activation_checkpointing: {full: -1}}": "3:39: training.activation_checkpointing.full: must be an int",
    "training: {activation_checkpointing: {mlps: 1}}": "checkpointing.mlps: unknown key; did you mean 'mlp'?",
    "training: {activation_checkpointing: {layers: 1}}": "training.activation_checkpointing has the keys full, mlp",
    "training: {activation_offloading: true, activation_checkpointing: none}": "3:12: training.activation_offloading:",
    "training: {activation_offloading: true, activation_checkpointing: mlp}": "needs layers that are fully",
    "training: {activation_offloading: true, activation_checkpointing: {mlp: 2}}": "layers that are fully recomputed",
    "base: {model: m, quantization: none}\nadapter: {method: full}\ntraining: {activation_checkpointing: mlp}": "mlp",
    "adapter: {method: dora}\ntraining: {activation_checkpointing: {mlp: 2}}": "with adapter.method: dora, write full",
    "base: {model: m, quantization: none, embedding: host}\nadapter: {method: full}": "embedding: host needs a frozen",
    "training: {micro_batch_size: 3}": "global_batch_size (16) must be a multiple of micro_batch_size (3),",
    "training: {global_batch_size: 6}": "3:12: training.global_batch_size: global_batch_size (6) must be a",
    "optimizer: {warmup_steps: 9}\ntraining: {max_steps: 9}": "warmup_steps (9) must be below max_steps (9)",
    "data: {source: s, held_out: 10, limit: 10}": "data.held_out: must be below data.limit (10)",
    "data: {source: a.csv, held_out: a.csv}": "data.held_out: is the same as data.source",
    "data: {source: s, columns: {outptu: x}}": "the alpaca format has no field 'outptu'; did you mean",
    "adapter: {targets: ['q(']}": "adapter.targets: 'q(' is not a valid regular expression: missing )",
    # YAML features that a recipe does not allow
    "training: {seed: !!int 3}": "3:12: training.seed: tags are not allowed in a recipe; leave !!int out",
    "output: !!python/object/apply:os.system [x]": "leave !!python/object/apply:os.system out",
    "output: &a x": "3:1: output: anchors and aliases (& and *) are not allowed",
    "output: *a": "3:1: output: anchors and aliases (& and *) are not allowed",
    "1: x": "3:1: 1: a key must be text; put it in quotes",
    "? [a]\n: x": "3:3: a key must be text, not a list or mapping",
    ": x": "3:1: the key before this ':' is missing",
    'output: "a\\0b"': "output: contains the character U+0000",
    'output: "\\ud800"': "output: contains the character U+D800",
    'output: "\\U7fffffff"': "is not valid YAML",
    "---\nbase: {}": "a second YAML document begins here; write only one",
    # broken syntax
    "\tadapter: {}": "is not valid YAML: a tab is not allowed here; indent with spaces",
    "adapter: {rank: 8": "3:10: is not valid YAML: a bracket is opened here but not closed",
    "output: 'x": "3:9: is not valid YAML: a quote is opened here but not closed",
    "output: a: b": "3:10: is not valid YAML: unexpected ':'",
    "output": "3:1: is not valid YAML: this key has no ':' after it",
    "adapter:\n   rank: 8\n  alpha: 8": "5:3: is not valid YAML: the indentation does not match the lines",
    # secrets
    "tracking: {wandb: {api_key: x}}": "tracking.wandb.api_key: unknown key; a recipe is stored",
    "output: hf_abcdefghijklmnop": "output: looks like an access token or password",
    "output: https://me:secret@host/x": "output: looks like an access token or password",
    f"output: {'0a1b2c3d' * 5}": "output: looks like an access token or password",
    f"tracking: {{wandb: {{entity: {'0a1b2c3d' * 5}}}}}": "tracking.wandb.entity: looks like an access token",
    f"training: {{memory: {'9' * 400}GiB}}": "is too large for a memory size; write one such as 12GiB or 512MiB",
    "output: !hf_abcdefghijklmnop!x y": "3:9: is not valid YAML: found undefined tag handle '!…!'",
}


@pytest.mark.parametrize("text", CASES)
def test_each_mistake_has_its_message(tmp_path: Path, text: str) -> None:
    lines = ["" if f"{section}: {{model" in text or f"{section}: {{source" in text else line
             for section, line in REQUIRED.items()]  # fmt: skip
    [said] = failure(tmp_path, "\n".join([*lines, text]) + "\n")
    assert CASES[text] in said


def test_a_commit_is_no_secret(tmp_path: Path) -> None:
    commit = "0a1b2c3d" * 5
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"base: {{model: hub/models--a--b/snapshots/{commit}/x, revision: {commit}}}\n" + REQUIRED["data"]
    )
    for overrides in ([], [f"base.revision={commit}"]):
        assert Recipe.load(file, overrides).base.revision == commit


def test_all_problems_are_shown_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "adapter: {rnak: 8, dropout: 2}\ndata: {split: 3}\n"
        "training: {micro_batch_size: 3}\nseed: *x\nseed: 1\n"
    )
    said = failure(tmp_path, text, ("optimizer.lr=fast", "nonsense"))
    assert [line.partition(": ")[2].partition(":")[0] for line in said] == [
        "base", "adapter.rnak", "adapter.dropout", "data.source", "data.split",
        "training.micro_batch_size", "seed", "seed",
        "'nonsense' is not key=value; write it like training.max_steps=100", "optimizer.lr",
    ]  # fmt: skip


def test_an_override_is_named_as_such(tmp_path: Path) -> None:
    assert failure(tmp_path, FULL, ("training.max_step=3",)) == [
        "command line: training.max_step: unknown key; did you mean 'max_steps'?"
    ]
    [said] = failure(tmp_path, FULL, ("training.seed=[1",))
    assert said.startswith("command line: training.seed: is not valid YAML: a bracket is opened")
    [said] = failure(tmp_path, FULL, ("training.seed=3\n---\n4",))
    assert said == "command line: training.seed: a second YAML document begins here; write only one"
    [said] = failure(tmp_path, FULL, ("base.model.x=3",))
    assert said.startswith("command line: base.model.x: cannot be set: base.model is a value, not a section")
    [said] = failure(tmp_path, FULL, ("a." * 5000 + "b=3",))
    assert said.startswith("command line: 'a.a.a.")
    assert said.endswith("is nested more than 8 levels deep; no setting needs that")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "1:1: base: is required"),
        (b"just text", "1:1: a recipe is a mapping of sections"),
        (FULL.encode("utf-16"), "1:1: is UTF-16; save it as UTF-8"),
        (FULL.encode("utf-16-be"), "1:1: the character U+0000 is not allowed in YAML"),
        (b"base:\n  model: \xff", "2:10: byte 0xFF is not UTF-8"),
        ("base:\n  modèle: ".encode() + b"\xe9\n", "2:11: byte 0xE9 is not UTF-8"),
        (b"base:\n  model: a\0b", "2:11: the character U+0000 is not allowed in YAML"),
        (b"base:\n  model: \x1b[31m", "2:10: the character U+001B is not allowed in YAML"),
        (b"%YAML 1.1\n---\nbase: {}\n", "a recipe is YAML 1.2; delete the %YAML line"),
        (b"a: " + b"x" * 50_000_000, "is longer than 64 KiB; a recipe must be shorter"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    assert expected in failure(tmp_path, content)[0]


def test_missing_paths_are_reported(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for path, expected in {
        str(tmp_path / "none.yaml"): "no such file or shipped recipe",
        "recipes/lama-7b.yaml": "did you mean 'llama-7b'?",
        "quikstart": "did you mean 'quickstart'?",
        "": "'': is a folder; a recipe is a YAML file",
        "a\0b": "no such file or shipped recipe",
        "x" * 5000: "no such file or shipped recipe",
        "~no-such-user/x.yaml": "no such file or shipped recipe",
        str(tmp_path / "loop.yaml"): "no such file or shipped recipe",
        str(tmp_path / "folder.yaml"): "is a folder; a recipe is a YAML file",
        "/dev/zero": "is not a regular file; a recipe is a YAML file",
    }.items():
        with pytest.raises(RecipeError) as caught:
            Recipe.load(path)
        assert expected in str(caught.value), path
        assert len(str(caught.value)) < 400


BOMBS = {
    "aliases": "a: &a [x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 400)),
    "brackets": "a: " + "[" * 60_000,
    "braces": "{a: " * 15_000,
    "dashes": "- " * 30_000,
    "keys": "".join(f"k{i}: 1\n" for i in range(6_000)),
    "list": "adapter: {targets: [" + "1, " * 20_000 + "]}",
    "twice": "a: 1\n" * 12_000,
    "colons": ": " * 30_000,
    "documents": "---\n" * 15_000,
    "tags": "a: !!x\n" * 9_000,
    "tag handle": "a: !" + "x" * 60_000 + "!y z",
    "digits": "training: {seed: " + "9" * 60_000 + "}",
    "number-like text": "data: {held_out: '" + "1" * 60_000 + "x'}",
    "parentheses": "adapter: {targets: ['" + "(" * 60_000 + "']}",
    "repeats": "adapter: {targets: ['((((a{1,999}){1,999}){1,999}){1,999}b']}",
    "long key": "k" * 60_000 + ": 1",
    "long text": "base: {double_quant: " + "x" * 60_000 + "}",
    "credentials": "output: " + "://a" * 15_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_are_refused_in_bounded_time_and_length(tmp_path: Path, name: str) -> None:
    start = time.process_time()
    said = failure(tmp_path, BOMBS[name])
    assert time.process_time() - start < 3  # 0.01 to 0.3 s on an idle core; hours if a bomb is expanded
    assert len(said) <= 2 * MAX_PROBLEMS + 3
    assert max(map(len, said)) < 400


@everywhere
@given(st.binary(max_size=200) | st.text("{}[]:,-?&*!|>'\"%@`#\n\t ~a1.", max_size=60).map(str.encode))
def test_noise_is_refused_with_a_message(tmp_path: Path, content: bytes) -> None:
    assert all(re.match(r"r\.yaml(:\d+:\d+)?: ", line) for line in failure(tmp_path, content))


@everywhere
@given(st.data())
def test_a_damaged_recipe_is_read_or_refused_with_a_message(tmp_path: Path, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(FULL) - 1))
    length = data.draw(st.integers(0, 20))
    text = FULL[:cut] + data.draw(st.text("{}[]:,-?&*!|>'\"%@`#\n\t ~a1.", max_size=6)) + FULL[cut + length :]
    path = tmp_path / "r.yaml"
    path.write_text(text)
    try:
        said = str(Recipe.load(path) and "")
    except RecipeError as error:
        said = str(error)
    assert all(re.match(r".*r\.yaml(:\d+:\d+)?: ", line) for line in said.splitlines())


@everywhere
@given(
    st.sampled_from(["hf_", "sk-", "ghp_", "github_pat_", "wandb_v1_", "AKIA"]),
    st.sampled_from(SCALARS),
    st.data(),
)
def test_no_secret_is_repeated(
    tmp_path: Path, prefix: str, entry: tuple[int, int, str, str], data: st.DataObject
) -> None:
    number, _, key, value = entry
    secret = prefix + data.draw(st.text("abcXYZ0189", min_size=16, max_size=40))
    assert SECRET.search(secret)
    line = FULL.splitlines()[number - 1]
    form: Any = data.draw(st.sampled_from(["{}", "'{}'", "[{}]", "{{a: {}}}", "{{{}: a}}", "see {} there"]))
    said = "\n".join(failure(tmp_path, with_line(number, line.removesuffix(value) + form.format(secret))))
    assert "looks like an access token" in said
    assert key.partition("[")[0] in said
    assert secret[-8:] not in said
