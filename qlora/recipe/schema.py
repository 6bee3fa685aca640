"""What a recipe may say: every section, key, default and limit, on one page.

The models are frozen and strict (the text "3" is not the number 3) and forbid unknown keys. The string under
each field is its documentation everywhere: in error messages, in the JSON schema and in an editor. Sources:
LoRA is Hu et al. 2021 (arXiv:2106.09685), QLoRA is Dettmers et al. 2023 (arXiv:2305.14314), rsLoRA is
Kalajdzievski 2023 (arXiv:2312.03732).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from qlora.formats import FORMATS
from qlora.recipe.methods import METHODS, MethodFacts
from qlora.recipe.rules import conflicts, flatten, idle

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]
_FIELDS = ", ".join(f"{format.name} ({', '.join(format.fields)})" for format in FORMATS.values())
_FORMAT = Field(description=f"Layout of a row, and its fields: {_FIELDS}.")


class Section(BaseModel):
    """A group of keys of a recipe."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Base(Section):
    """The model that is fine-tuned: where it comes from and in which precision it stands in memory."""

    model: Text
    """A hub id, a local folder or bundled/<name>; a config.json is enough unless `init` is pretrained."""
    revision: Text | None = None
    """Branch, tag or commit of the hub id; null is the newest."""
    init: Literal["pretrained", "synthetic", "random"] = "pretrained"
    """Weights: pretrained, synthetic (made on the device, to measure), or random (to pretrain)."""
    quantization: Literal["nf4", "none"] = "nf4"
    """nf4 freezes the linears in 4 bits (QLoRA, section 3); none leaves them as they are."""
    double_quant: bool = True
    """Quantize the quantization constants too: 0.37 bits a parameter less (QLoRA, section 3)."""
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one quantization constant (QLoRA, section 3: 64)."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the products; auto: bfloat16 (QLoRA, section 3), or float32 where the device is slow at it."""
    embedding: Literal["device", "host"] = "device"
    """Where the input embedding stands; host: beside the GPU, which is sent rows of it. Not if the head shares it."""
    trust_remote_code: bool = False
    """Run the Python code that a hub model brings along; the one switch for it, off."""


class Adapter(Section):
    """What is trained: low-rank matrices or biases beside frozen linears, or the whole model."""

    method: Literal["lora", "full", "bitfit"] = "lora"
    """lora trains A and B (LoRA, section 4.1), full every weight of an unquantized base, bitfit biases."""
    rank: Count = 8
    """Rows of A and columns of B (LoRA, section 7.2: 8 is typically enough; QLoRA, appendix B.2: 64)."""
    alpha: Positive | None = None
    """Strength of the update, divided by the rank (LoRA, section 4.1); null is alpha = rank."""
    dropout: Decay = 0.0
    """Share of the input that is dropped before A (QLoRA, appendix B.2: 0.1 up to 13B, 0.05 above)."""
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)"] = "alpha/rank"
    """Factor of B·A·x: LoRA's alpha/rank, or rsLoRA's alpha/sqrt(rank), which stays stable at high ranks."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Distribution of A at the start (LoRA, section 4.1: Gaussian; its code: Kaiming uniform); B is zero."""
    targets: Literal["attention", "all-linear"] | Annotated[list[Text], Field(min_length=1)] = "attention"
    """attention (q, k, v, o), all-linear (QLoRA, section 4), or a list of name endings or expressions."""
    rank_pattern: dict[Text, Count] = {}
    """Another rank for the modules whose name matches a suffix or regular expression."""
    alpha_pattern: dict[Text, Positive] = {}
    """Another alpha for the modules whose name matches a suffix or regular expression."""

    @property
    def resolved_alpha(self) -> float:
        """alpha, or the rank where alpha is null."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def facts(self) -> MethodFacts:
        """What is known of the method."""
        return METHODS[self.method]

    @property
    def summary(self) -> str:
        """What is trained, in words."""
        targets = self.targets if isinstance(self.targets, str) else f"{len(self.targets)} targets"
        return self.facts.summary.format(rank=self.rank, targets=targets)


class Data(Section):
    """What is learned from: rows, their format, and how they become tokens."""

    source: Text
    """A JSON, JSONL, CSV, TSV or Parquet file, bundled/<name>, or the id of a data set on the hub."""
    split: Text = "train"
    """Split of a hub data set."""
    format: Annotated[FormatName, _FORMAT] = "alpaca"
    columns: dict[Text, Text] = {}
    """The format's field -> the data's own name for that column, where they differ."""
    template: Text | None = None
    """Chat template: alpaca, chatml, plain or a .jinja file; null is the tokenizer's own."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of the longest row, or of a packed row (QLoRA, appendix B.2: 512 for most runs)."""
    too_long: Literal["error", "drop", "truncate"] = "drop"
    """What happens to a row longer than `max_length`; how many there were is shown."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be read; error names it with file and line."""
    packing: bool = False
    """Put several rows into one of `max_length` tokens; no row sees another."""
    train_on: Literal["completion", "all"] = "completion"
    """Train on the answers only (QLoRA, appendix B.3: better than also on the prompts), or on every token."""
    held_out: Annotated[float, Field(gt=0, lt=1)] | CountOrZero | Text = 0.02
    """Rows kept for evaluation: a share, a number of rows, or a second source."""
    limit: Count | None = None
    """Use the first so many rows only; null is all."""


class Checkpointing(Section):
    """How many decoder layers recompute their activations in the backward pass; the others keep them."""

    full: CountOrZero = 0
    """Layers, from the first on, that are recomputed whole."""
    mlp: CountOrZero = 0
    """Layers after those of which the MLP alone is recomputed; for Llama-like layers only."""


class Training(Section):
    """How long, in which batches, and what is looked at on the way."""

    epochs: Count = 1
    """Passes over the data; counts only where `max_steps` is null."""
    max_steps: Count | None = None
    """Train for so many optimizer steps, over as many passes as they take; null: as long as the epochs last."""
    global_batch_size: Count = 16
    """Rows, packed or not, an optimizer step (QLoRA, appendix B.2: 16); a multiple of `micro_batch_size`."""
    memory: Text | None = None
    """Memory the run may take, as 24GiB, or auto: what is free. It then sets the next four keys; null: they hold."""
    micro_batch_size: Count = 4
    """Rows in one forward and backward pass: memory grows with it."""
    activation_checkpointing: Literal["none", "mlp", "full"] | Checkpointing = "full"
    """Recomputed in the backward pass (arXiv:1604.06174): none, all MLPs, all layers, or {full: N, mlp: M} layers."""
    activation_offloading: bool = False
    """Keep the inputs of recomputed layers beside the GPU, in host memory, until the backward pass needs them."""
    loss_chunk: Count | None = None
    """Trained tokens whose logits are in memory at once; null: 1024, or as many as have 256 MiB of logits."""
    max_grad_norm: Positive = 0.3
    """Gradients are scaled down to this L2 norm (QLoRA, appendix B.2: 0.3)."""
    eval_every: Count | None = 100
    """Steps between evaluations; null is before and after only."""
    save_every: Count | None = 100
    """Steps between checkpoints; null is none before the end."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that are kept: two, so that a damaged one has a predecessor."""
    samples: CountOrZero = 3
    """Held-out prompts that are answered at each evaluation."""
    sample_tokens: Count = 64
    """Tokens of the longest sample answer."""
    seed: CountOrZero = 0
    """Order, split, dropout and initialisation follow from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU where there is one."""

    def total_steps(self, steps_per_epoch: int) -> int:
        """Count the optimizer steps of a whole run: `max_steps`, or those of its epochs."""
        return self.max_steps or self.epochs * steps_per_epoch


class Optimizer(Section):
    """The update rule and its schedule."""

    name: Literal[
        "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw",
        "paged_lion_32bit", "paged_lion_8bit", "lion_8bit", "lion",
    ] = "paged_adamw_32bit"  # fmt: skip
    """paged_: the state may leave the GPU (QLoRA, section 3); 8bit: it is quantized (arXiv:2110.02861)."""
    lr: Positive = 2e-4
    """Learning rate at its highest (QLoRA, appendix B.2: 2e-4 up to 13B, 1e-4 above)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up (QLoRA, appendix B.2: constant)."""
    warmup_steps: CountOrZero = 0
    """Steps in which the learning rate rises from zero."""
    weight_decay: PositiveOrZero = 0.0
    """Decoupled weight decay of the matrices (arXiv:1711.05101)."""
    betas: Annotated[tuple[Decay, Decay], Strict(False)] = (0.9, 0.999)
    """Decay of the two moments (QLoRA, appendix B.2: 0.9 and 0.999)."""
    eps: Positive = 1e-8
    """Added to Adam's denominator (arXiv:1412.6980)."""


class Wandb(Section):
    """Weights & Biases: a copy of metrics.jsonl in the browser."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online where a key is configured, else offline."""
    project: Text = "qlora"
    """Project that the run belongs to."""
    entity: Text | None = None
    """User or team; null is the account's own."""
    name: Text | None = None
    """Name of the run; null is the name of its folder."""
    tags: list[Text] = []
    """Labels to find the run by."""


class Tracking(Section):
    """Where the numbers go besides the run's own folder."""

    wandb: Wandb = Wandb()
    """Weights & Biases."""
    tensorboard: bool = False
    """Write event files for TensorBoard into the run's folder; needs `pip install tensorboard`."""


class Recipe(Section):
    """Everything that decides a training run. Read one with `Recipe.load`.

    >>> recipe = Recipe.load("quickstart", ["training.max_steps=20"])
    >>> recipe.training.max_steps
    20
    """

    version: Literal[2] = 2
    """Version of these keys; a recipe that does not state one is of this version."""
    base: Base
    """The model that is fine-tuned; it has a `model` at least."""
    adapter: Adapter = Adapter()
    """What is trained."""
    data: Data
    """What is learned from; it has a `source` at least."""
    training: Training = Training()
    """How long, in which batches, and what is looked at on the way."""
    optimizer: Optimizer = Optimizer()
    """The update rule and its schedule."""
    tracking: Tracking = Tracking()
    """Where the numbers go besides the run's own folder."""
    output: Text = "runs/recipe"
    """The run's folder; a recipe read from NAME.yaml that says nothing gets runs/NAME."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        given = flatten(self.model_dump(exclude_unset=True))
        found = conflicts(flatten(self.model_dump()), given)
        if found:
            raise ValueError("; ".join(f"{key}: {text}" for key, text in found))
        return self

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe from a YAML file, or a shipped one by its name, and check it.

        `overrides` are `section.key=value` with the value in YAML; they get the same checks.
        A file in the folder of a run or an adapter may have keys of an earlier version. It must not set
        `base.trust_remote_code` (`ModelError`); an override may. Raises `RecipeError` with one line a problem, all
        problems at once.
        """
        from qlora.recipe.loading import load

        return load(name_or_path, overrides)

    @classmethod
    def recorded(cls, file: Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read the recipe that came with a run or an adapter, to show it or to compare it.

        Keys of an earlier version are translated to those of today.
        It says what its author allowed, not what you allow: whoever loads a base by it takes
        `qlora.inference.load.recipe_of` instead. Raises `RecipeError` as `load` does.
        """
        from qlora.recipe.loading import load_recorded

        return load_recorded(file, overrides)

    @classmethod
    def from_dict(cls, settings: dict[str, Any], name: str = "recipe") -> "Recipe":
        """Check plain nested dictionaries as `load` checks a file; raises `RecipeError`."""
        from qlora.recipe.loading import from_dict

        return from_dict(settings, name)

    @property
    def name(self) -> str:
        """Name of the run: of the recipe's file, unless `output` says otherwise."""
        return Path(self.output).name

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain nested dictionaries, lists, numbers and text."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The recipe with every default written out; loads as an equal recipe.

        Keys without effect beside the others are left out: written, they would be errors.
        """
        from qlora.recipe.writing import to_yaml

        return to_yaml(self.to_dict(), idle(flatten(self.model_dump())))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of a recipe, from which editors complete and check."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}
