"""The schema of a recipe: every section, key, default and limit.

The models are frozen and strict (the text "3" is not the number 3) and forbid unknown keys. The string under
each field is its documentation in error messages, in the JSON schema and in editors. Sources:
LoRA is Hu et al. 2021 (arXiv:2106.09685), QLoRA is Dettmers et al. 2023 (arXiv:2305.14314), rsLoRA is
Kalajdzievski 2023 (arXiv:2312.03732), DoRA is Liu et al. 2024 (arXiv:2402.09353), AdaLoRA is Zhang et al. 2023
(arXiv:2303.10512), VeRA is Kopiczko et al. 2023 (arXiv:2310.11454).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, Strict, model_validator

from qlora.formats import FORMATS
from qlora.recipe.adapter import Adapter
from qlora.recipe.following import FollowedNumber, Following
from qlora.recipe.rules import conflicts, flatten, keys_without_effect
from qlora.recipe.section import (
    Count,
    CountOrZero,
    Decay,
    Device,
    Factor,
    FactorOrZero,
    Norm,
    Section,
    Text,
)
from qlora.recipe.tracking import Tracking

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]
_FIELDS = ", ".join(f"{format.name} ({', '.join(format.fields)})" for format in FORMATS.values())
_FORMAT = Field(description=f"Layout of the rows. Each layout and its fields: {_FIELDS}.")


class Base(Section):
    """The base model: its source, its weights and its precision in memory."""

    model: Text
    """A hub id, a local folder or bundled/<name>. A config.json is enough unless `init` is pretrained."""
    revision: Text | None = None
    """Branch, tag or commit of the hub model; null: the default branch."""
    init: Literal["pretrained", "synthetic", "random"] = "pretrained"
    """Weights: pretrained, synthetic (made on the device, for measurements) or random (for pretraining)."""
    quantization: Literal["nf4", "none"] = "nf4"
    """nf4: the linear layers are frozen and stored in 4 bits (QLoRA, section 3); none: not quantized."""
    double_quant: bool = True
    """Also quantize the quantization constants; saves 0.37 bits per parameter (QLoRA, section 3)."""
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights per quantization constant (QLoRA, section 3: 64)."""
    allow_unquantized: bool = False
    """Train an NF4 base although less than half of its linear weights can be quantized, as in some mixtures."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the computation; auto: bfloat16 (QLoRA, section 3), but float32 on CPUs and GPUs that emulate it."""
    embedding: Literal["device", "host"] = "device"
    """Placement of the input embedding; host: in host memory. Impossible if the output head shares its weights."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. Nothing else in a recipe allows it."""


class Source(Section):
    """One of several sources of rows. The keys that it leaves out are those of `data`."""

    source: Text
    """A file, a folder, a pattern, bundled/<name> or the id of a hub set, as in `data.source`."""
    split: Text | None = None
    """Split of a hub data set."""
    format: FormatName | None = None
    """As `data.format`."""
    columns: dict[Text, Text] | None = None
    """As `data.columns`."""
    template: Text | None = None
    """As `data.template`."""
    weight: Factor | None = None
    """Share of an epoch relative to the other weights. An epoch has as many rows as all sources together."""
    rows: Count | None = None
    """Number of rows of this source in an epoch; more than it has: rows repeat. null: all."""


class Data(Section):
    """The data set: its rows, their format, and their conversion to tokens."""

    source: Text | None = None
    """A data file, a folder, a pattern such as rows/*.jsonl, - for a pipe, bundled/<name>, or the id of a hub set."""
    sources: list[Source] = []
    """Several sources instead of `source`, each with a weight or a number of rows, or with all its rows."""
    split: Text = "train"
    """Split of a hub data set; a local file has none."""
    format: Annotated[FormatName, _FORMAT] = "alpaca"
    columns: dict[Text, Text] = {}
    """Column names that differ from the format's fields, each as field: column."""
    template: Text | None = None
    """Chat template: a name such as llama-3, a .jinja file, or tokenizer: its own; null: its own or the format's."""
    template_options: dict[Text, bool | int | float | str] = {}
    """Variables of the template, in training and generation, such as {enable_thinking: false}."""
    system: Text | None = None
    """System message of rows and questions that have none."""
    system_as: Literal["system", "user"] = "system"
    """Place of system messages: their own, or user: before the first question, for templates that refuse them."""
    control_tokens: Literal["text", "parse"] = "text"
    """Control tokens spelled in rows, such as </s>: ordinary text, or parse: they take effect (rendered data)."""
    examples: Literal["conversation", "answer"] = "conversation"
    """One example a conversation, or one an answer: each answer is then trained after its own prompt."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Maximum length of a row, packed or not, in tokens (QLoRA, appendix B.2: 512 for most runs)."""
    too_long: Literal["error", "drop", "truncate", "split"] = "drop"
    """Rows longer than `max_length`: stop with an error, drop, truncate, or split (plain text). They are counted."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Handling of unusable rows: stop with an error that gives file and line, or skip them."""
    packing: bool = False
    """Put several rows into one of up to `max_length` tokens. Attention does not cross from one to another."""
    train_on: Literal["completion", "all"] = "completion"
    """Trained tokens: the completions only (QLoRA, appendix B.3: better than with the prompts), or all."""
    held_out: Annotated[float, Field(gt=0, lt=1)] | CountOrZero | Text = 0.02
    """Rows for evaluation: a fraction such as 0.02, a number of rows such as 100, or another source."""
    limit: Count | None = None
    """Number of rows to read, from the first; null: all."""

    @property
    def parts(self) -> list["Data"]:
        """The section with the keys of each of its sources in place; one for each source."""
        return [self._with(source) for source in self.sources] or [self]

    @property
    def evaluation(self) -> "Data | None":
        """The section with the source of the held-out rows; None if they are training rows."""
        if not isinstance(self.held_out, str):
            return None
        return self.parts[0].model_copy(update={"source": self.held_out, "limit": None})

    @property
    def source_name(self) -> str:
        """`source` of one of `parts`, which always has one."""
        assert self.source is not None, "a section with several sources"
        return self.source

    @property
    def names(self) -> str:
        """The sources of the training rows, for messages and reports."""
        return ", ".join(part.source_name for part in self.parts)

    def _with(self, source: Source) -> "Data":
        given = {key: value for key, value in source if value is not None and key in type(self).model_fields}
        if "format" in given:  # the columns of `data` are fields of another format
            given.setdefault("columns", {})
        return self.model_copy(update={**given, "sources": []})


class Checkpointing(Section):
    """Numbers of decoder layers that recompute activations in the backward pass; the other layers keep them."""

    full: CountOrZero = 0
    """Number of layers, from the first, that are recomputed completely."""
    mlp: CountOrZero = 0
    """Number of layers, after the `full` ones, that recompute only their MLP; for Llama-like layers."""


class Training(Section):
    """The training loop: its length, batches, memory, evaluations and checkpoints."""

    epochs: Count = 1
    """Passes over the training data; used only if `max_steps` is null."""
    max_steps: Count | None = None
    """Number of optimizer steps, repeating the data as needed; null: until `epochs` are done."""
    global_batch_size: Count = 16
    """Rows per optimizer step, packed or not (QLoRA, appendix B.2: 16); a multiple of `micro_batch_size`."""
    memory: Text | None = None
    """Memory limit, as 24GiB, or auto: 95% of the free memory. A plan sets the next four keys; null: they apply."""
    micro_batch_size: Count = 4
    """Rows per forward and backward pass. Memory use grows with it."""
    activation_checkpointing: Literal["none", "mlp", "full"] | Checkpointing = "full"
    """Recompute in the backward pass (arXiv:1604.06174): nothing, all MLPs, all layers, or {full: N, mlp: M} layers."""
    activation_offloading: bool = False
    """Keep the inputs of fully recomputed layers in host memory until the backward pass."""
    loss_chunk: Count | None = None
    """Trained tokens whose logits are in memory at once; null: up to 1024, with at most 256 MiB of logits."""
    router_loss: Literal["auto", "off"] | Factor = "auto"
    """Coefficient of a mixture's load-balancing loss (arXiv:2101.03961): auto as config.json asks, off, or a number."""
    max_grad_norm: Norm = 0.3
    """Maximum L2 norm of the gradient, which is scaled down to it (QLoRA, appendix B.2: 0.3)."""
    eval_every: Count | None = 100
    """Steps between evaluations; null: only before and after training."""
    patience: Count | None = None
    """Evaluations in a row without a better `best_by` that end the run early; null: it takes all steps."""
    result: Literal["last", "best"] = "last"
    """Weights that become the result: those after the last step, or those with the best `best_by`."""
    best_by: FollowedNumber = "lowest loss"
    """Number that `patience` and `result` follow: lowest loss (held out), or lowest or highest NAME of a metric."""
    save_every: Count | None = 100
    """Steps between checkpoints; null: only at the end, or when the run is interrupted."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Number of newest checkpoints to keep; at least two, in case the newest is damaged."""
    samples: CountOrZero = 3
    """Number of held-out prompts answered at each evaluation."""
    sample_tokens: Count = 64
    """Maximum length of a sample answer, in tokens."""
    seed: CountOrZero = 0
    """Seed of the row order, the held-out split, dropout and initialisation."""
    device: Device = "auto"
    """Device to train on: auto (the GPU if there is one, else the CPU), cpu, cuda, or cuda:1 for the second GPU."""

    @property
    def follows(self) -> Following:
        """The number that `patience` and `result: best` follow."""
        return Following.of(self.best_by)

    @property
    def accumulates(self) -> bool:
        """True if an optimizer step sums the gradients of several micro-batches."""
        return self.global_batch_size > self.micro_batch_size

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of a run: `max_steps`, or else `epochs` times `steps_per_epoch`."""
        return self.max_steps or self.epochs * steps_per_epoch


class Optimizer(Section):
    """The optimizer and its learning rate schedule."""

    name: Literal[
        "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw",
        "paged_lion_32bit", "paged_lion_8bit", "lion_8bit", "lion",
    ] = "paged_adamw_32bit"  # fmt: skip
    """Update rule. paged_: its state can move to host memory (QLoRA, section 3); 8bit: quantized (arXiv:2110.02861)."""
    lr: Factor = 2e-4
    """Peak learning rate (QLoRA, appendix B.2: 2e-4 up to 13B, 1e-4 above)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant (QLoRA, appendix B.2), or a linear or cosine decay to zero."""
    warmup_steps: CountOrZero = 0
    """Number of first steps in which the learning rate rises linearly from zero to `lr`."""
    weight_decay: FactorOrZero = 0.0
    """Decoupled weight decay (arXiv:1711.05101); applies to matrices, not to norms and biases."""
    betas: Annotated[tuple[Decay, Decay], Strict(False)] = (0.9, 0.999)
    """Decay rates of the first and second moment (QLoRA, appendix B.2: 0.9 and 0.999)."""
    eps: Factor = 1e-8
    """Term added to Adam's denominator for numerical stability (arXiv:1412.6980)."""


class Recipe(Section):
    """All settings of a training run; `Recipe.load` reads one.

    Examples:
        >>> recipe = Recipe.load("quickstart", ["training.max_steps=100"])
        >>> recipe.training.max_steps
        100
    """

    version: Literal[2] = 2
    """Version of the recipe keys; a recipe that states none has this version."""
    base: Base
    """The base model; `model` is required."""
    adapter: Adapter = Adapter()
    """The trained parameters."""
    data: Data
    """The data set; `source` is required."""
    training: Training = Training()
    """The training loop: its length, batches, memory, evaluations and checkpoints."""
    optimizer: Optimizer = Optimizer()
    """The optimizer and its learning rate schedule."""
    tracking: Tracking = Tracking()
    """Experiment trackers, in addition to the metrics in the run's folder."""
    output: Text = "runs/recipe"
    """Folder of the run. If this key is not set, a recipe file NAME.yaml gets runs/NAME."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        given = flatten(self.model_dump(exclude_unset=True))
        problems = conflicts(flatten(self.model_dump()), given)
        if problems:
            raise ValueError("; ".join(f"{key}: {text}" for key, text in problems))
        return self

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe and check it.

        Args:
            name_or_path: a YAML file, or the name of a shipped recipe. A file in the folder of a run or an adapter
                can have keys of an earlier version.
            overrides: settings as `section.key=value`, with the value in YAML. They replace those of the file.

        Raises:
            RecipeError: the recipe is wrong; the message has one line per problem, for all problems at once.
            ModelError: a file in the folder of a run or an adapter sets `base.trust_remote_code`; only an override
                can do so there.
        """
        from qlora.recipe.loading import load

        return load(name_or_path, overrides)

    @classmethod
    def recorded(cls, file: Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read the recipe of a run or an adapter, to show it or to compare it.

        Keys of an earlier version are translated. The result can have `base.trust_remote_code` set by a stranger:
        to load the base, use `qlora.inference.load.recipe_of` instead.

        Raises:
            RecipeError: as in `load`.
        """
        from qlora.recipe.loading import load_recorded

        return load_recorded(file, overrides)

    @classmethod
    def from_dict(cls, settings: dict[str, Any], name: str = "recipe") -> "Recipe":
        """Make a recipe of nested dictionaries, with the checks of `load`; `name` is used in messages.

        Raises:
            RecipeError: as in `load`.
        """
        from qlora.recipe.loading import from_dict

        return from_dict(settings, name)

    @property
    def name(self) -> str:
        """Name of the run: the last part of `output`."""
        return Path(self.output).name

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as nested dictionaries, lists, numbers and text."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the recipe as YAML with every default written out; it loads as an equal recipe.

        Keys without effect are left out, because `load` rejects them.
        """
        from qlora.recipe.writing import to_yaml

        return to_yaml(self.to_dict(), keys_without_effect(flatten(self.model_dump())))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON schema of a recipe, with which editors complete and check keys."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}
