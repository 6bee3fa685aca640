"""Folders for Ollama: Go templates that write the text of the jinja ones, and the Modelfile."""

from collections.abc import Callable
from pathlib import Path

import gguf_for_tests as llama_cpp
import pytest
from commands_for_tests import qlora
from go_templates_for_tests import ollama
from runs_for_tests import finished_run
from tokenizers_for_tests import byte_level, with_markers_of

from qlora.errors import ModelError
from qlora.export.go_templates import CONVERSATIONS, GO, go_template, jinja, rendered
from qlora.export.ollama import modelfile
from qlora.export.source import model_source
from qlora.recipe import Recipe

TEXTS = {"one": "What is 2+2?\nIn {{ words }}.", "two": 'It "is" 4.', "three": "Be brief."}


@pytest.mark.parametrize("name", GO)
def test_a_go_template_writes_the_text_of_the_jinja_template(name: str) -> None:
    tokenizer = with_markers_of(jinja(name))
    go = go_template(jinja(name), tokenizer)
    assert go is not None
    written = 0
    for shape in CONVERSATIONS:
        messages = [{**message, "content": TEXTS[message["content"]]} for message in shape]
        expected = rendered(jinja(name), tokenizer, messages)
        assert expected is not None
        assert ollama(go, messages) == expected
        written += all(message["content"] in expected for message in messages)
    assert written >= 4


def test_a_template_of_another_name_is_known_by_its_text_and_others_are_not() -> None:
    tokenizer = byte_level(bos=True)
    own = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    own += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert go_template(own, tokenizer) == GO["chatml"]
    assert go_template(own.replace("assistant", "bot"), tokenizer) is None


def test_the_command_writes_a_model_and_a_modelfile(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(Recipe.load(recipe_file(base={"compute_dtype": "float32"})))
    (run / "adapter" / "system_prompt.txt").write_text("Be brief.")
    monkeypatch.chdir(tmp_path)
    done = qlora("export", run, "--to", "ollama")
    assert done.returncode == 0, done.stderr
    assert "ollama create run -f run-ollama/Modelfile" in done.stdout
    assert llama_cpp.fields(tmp_path / "run-ollama" / "model.gguf")["general.name"] == "run"
    text = (tmp_path / "run-ollama" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ range $i, $m := .Messages }}')
    assert text.endswith('"""\nSYSTEM """Be brief."""\nPARAMETER stop "</s>"\nPARAMETER num_ctx 256\n')
    done = qlora("export", run, "--to", "ollama", "--adapter", "-o", "other")
    assert (done.returncode, "writes the merged model" in done.stderr) == (2, True)
    (run / "adapter" / "system_prompt.txt").write_text('"""')
    with pytest.raises(ModelError, match="which a Modelfile cannot"):
        modelfile(model_source(run))
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}[assistant]"
    )
    settings = {
        "base": {"compute_dtype": "float32"},
        "data": {"template": str(file)},
        "output": str(tmp_path / "b"),
    }
    other = finished_run(Recipe.load(recipe_file(**settings)))
    done = qlora("export", other, "--to", "ollama")
    assert (done.returncode, "`--to gguf` writes a file that holds the template" in done.stderr) == (4, True)
    assert not (tmp_path / "b-ollama").exists()
