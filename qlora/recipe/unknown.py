"""The message about an unknown key, with the key that was probably meant."""

import re
from difflib import SequenceMatcher, get_close_matches

from qlora.recipe.fields import Schema, at, names, options
from qlora.recipe.problems import KeyPath, dotted
from qlora.recipe.versions import CHANGES

# name in another framework or an earlier version -> our name
ELSEWHERE = {
    "base_model": "base.model",
    "model_name_or_path": "base.model",
    "load_in_4bit": "base.quantization",
    "bnb_4bit_quant_type": "base.quantization",
    "bnb_4bit_compute_dtype": "base.compute_dtype",
    "dtype": "base.compute_dtype",
    "bf16": "base.compute_dtype",
    "bnb_4bit_use_double_quant": "base.double_quant",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "lora_modules": "adapter.targets",
    "use_rslora": "adapter.scaling",
    "trainable_token_indices": "adapter.train_tokens",
    "modules_to_save": "adapter.train_modules",
    "lora_modules_to_save": "adapter.train_modules",
    "init_lora_weights": "adapter.init",
    "loraplus_lr_ratio": "adapter.lr_ratio",
    "dataset": "data.source",
    "datasets": "data.sources",
    "dataset_mixer": "data.sources",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "sample_packing": "data.packing",
    "train_on_inputs": "data.train_on",
    "val_set_size": "data.held_out",
    "chat_template": "data.template",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "batch_size": "training.global_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "per_device_train_batch_size": "training.micro_batch_size",
    "eval_steps": "training.eval_every",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep_checkpoints",
    "learning_rate": "optimizer.lr",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "optim": "optimizer.name",
    "report_to": "tracking.wandb.mode",
    "wandb_project": "tracking.wandb.project",
    "output_dir": "output",
    **{key: f"{change.section}.{change.new}" for change in CHANGES for key in change.old},
}
CREDENTIAL = re.compile(r"key|.*(token|secret|password|api_?key)", re.IGNORECASE | re.DOTALL)


def unknown(path: KeyPath, schema: Schema) -> str:
    """Return the message about an unknown key: it names the key that was probably meant, or all keys of the section."""
    name = str(path[-1])
    section = dotted(path[:-1])
    siblings = [
        name for node in options(at(path[:-1], schema), schema) for name in node.get("properties", ())
    ]
    # `sample_token` is a typo of a key, not a credential
    if CREDENTIAL.fullmatch(name) and not get_close_matches(name, siblings, cutoff=0.9):
        return (
            "unknown key; a recipe is stored with its run, so keep credentials in the environment "
            "(HF_TOKEN, WANDB_API_KEY)"
        )
    if meant := _meant(name, siblings, names(schema)):
        # a key of the same section needs no section name
        choices = [repr(key.removeprefix(f"{section}.")) for key in meant]
        return f"unknown key; did you mean {' or '.join(choices)}?"
    return f"unknown key; {section or 'a recipe'} has the keys {', '.join(siblings)}"


def _meant(name: str, siblings: list[str], everywhere: list[str]) -> list[str]:
    """Return the keys that could be meant: another framework's name, another section, or a misspelling."""
    if name in ELSEWHERE:
        return [ELSEWHERE[name]]
    sections: dict[str, list[str]] = {}
    for key in everywhere:
        sections.setdefault(key.rpartition(".")[2], []).append(key)
    if name in sections:
        return sections[name]
    if near := _nearest(name, siblings, cutoff=0.6):
        return near
    return [key for near in _nearest(name, list(sections), cutoff=0.75) for key in sections[near]]


def _nearest(name: str, known: list[str], cutoff: float) -> list[str]:
    """Return the known names most similar to `name`; several if they are equally similar."""
    # difflib calls "itit" and "init" half alike, so a single mistyped letter is looked for first
    if one_letter := [other for other in known if _one_letter_apart(name, other)]:
        return one_letter

    def similarity(other: str) -> float:
        return SequenceMatcher(None, other, name).ratio()

    near = get_close_matches(name, known, cutoff=cutoff)
    return [other for other in near if similarity(other) == similarity(near[0])]


def _one_letter_apart(name: str, other: str) -> bool:
    """Say whether one letter added, left out or replaced makes `other` of `name`."""
    letters = zip(name, other, strict=False)
    same = next((place for place, (a, b) in enumerate(letters) if a != b), min(len(name), len(other)))
    rest, rest_of_other = name[same:], other[same:]
    return rest[1:] in (rest_of_other, rest_of_other[1:]) or rest == rest_of_other[1:]
