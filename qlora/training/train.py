"""Fine-tuning, top to bottom: recipe, data, base, adapter, optimizer, steps, save.

The order of the rows is a function of (seed, epoch) and the dropout of a micro-batch one of (seed, step,
micro-batch), so a checkpoint holds tensors and counters only, and a run that was killed and resumed takes the
very steps of one that was not.
"""

import math
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from qlora.adapter.identity import BaseIdentity
from qlora.adapter.store import load_adapter, save_adapter
from qlora.data import Batch, Batches, Dataset, held_out_batches, load_dataset, prompting, training_batches
from qlora.errors import DivergedError, ModelError, SaveError
from qlora.inference.generate import answer
from qlora.memory import measure
from qlora.memory.oom import out_of_memory_explained
from qlora.memory.plan import changed
from qlora.memory.run_memory import RunMemory, budgeted
from qlora.model.load import load_tokenizer
from qlora.model.prepare import build
from qlora.objective.checks import check_head, check_packing, read_documents_if_apart
from qlora.objective.step import accumulate, evaluate
from qlora.optim import Optimizer, learning_rate
from qlora.recipe import Recipe
from qlora.report import memory_files
from qlora.report.page import write_page
from qlora.runtime.allocators import keep_freed_memory
from qlora.runtime.distributed import accelerator_for, broadcast_from_main
from qlora.runtime.phases import Phase, announce
from qlora.runtime.signals import StopRequest
from qlora.storage import folders
from qlora.tracking import Sample, Tracker
from qlora.training import checkpoint
from qlora.training.result import TrainResult
from qlora.training.run_folder import RunFolder, check_output, claim, earlier_plan, finished


def train(recipe: Recipe, *, resume: bool = False, fresh: bool = False, terminal: bool = True) -> TrainResult:
    """Run a recipe to its end and return what came of it.

    Args:
        recipe: what to do; `Recipe.load("quickstart")`.
        resume: go on from the newest checkpoint of an existing run (or start, if there is none yet).
        fresh: remove an existing run first.
        terminal: show progress.

    Raises:
        QloraError: with the exit code and a message for the user; see `qlora.errors`.

    Example:
        >>> outcome = train(Recipe.load("quickstart", ["training.max_steps=20"]))
        >>> outcome.loss_before, outcome.loss_after
    """
    accelerator = accelerator_for(recipe)
    path = Path(recipe.output)
    check_output(recipe, path, resume=resume, fresh=fresh)
    with folders.lock(path) if accelerator.is_main_process else nullcontext():
        if resume and (summary := finished(path)) is not None:
            return TrainResult.from_json(summary, path / "result.json")
        with out_of_memory_explained(recipe):
            session = Session.prepare(recipe, accelerator, earlier_plan(path) if resume else None)
            # Only now, when all input has proved good, is an older run replaced.
            session.begin(_claim_together(recipe, path, session, resume=resume, fresh=fresh))
            return session.fit(terminal=terminal)


@dataclass
class Session:
    """Everything a run works with, ready for its first step."""

    recipe: Recipe
    accelerator: Accelerator
    tokenizer: Any
    dataset: Dataset
    batches: Batches
    model: nn.Module
    optimizer: Optimizer
    memory: RunMemory
    plan: dict[str, Any] | None = None
    """what a memory budget came to: settings of `training`"""
    notes: list[str] = field(default_factory=list)
    run: RunFolder = field(init=False)
    first_step: int = 0
    loss_before: float | None = None

    @classmethod
    def prepare(
        cls, recipe: Recipe, accelerator: Accelerator, plan: dict[str, Any] | None = None
    ) -> "Session":
        """Data, memory, base, adapter, optimizer. Writes nothing. `plan` is that of the run which is resumed."""
        tokenizer = load_tokenizer(recipe.base)
        dataset = load_dataset(recipe.data, tokenizer, recipe.training.seed)
        notes = []
        if recipe.training.memory is not None:
            if plan is None:
                found = broadcast_from_main(
                    accelerator, lambda: budgeted(recipe, dataset, accelerator.device)
                )
                notes, plan = [found.why], found.settings
            recipe = changed(recipe, memory=None, **plan)
        training = recipe.training
        batches = training_batches(dataset, recipe)
        steps = training.total_steps(batches.steps_per_epoch)
        memory = RunMemory.of(recipe, dataset, batches, steps, accelerator.device)

        if accelerator.device.type == "cpu":
            keep_freed_memory()
        model, optimizer = build(recipe, accelerator.device)
        _check_vocabulary(model, tokenizer, recipe)
        check_head(model)
        read_documents_if_apart(model)
        if recipe.data.packing:
            check_packing(model)
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()  # what making the model left over, in pieces that a step cannot use
        return cls(
            recipe, accelerator, tokenizer, dataset, batches, model, optimizer,
            memory.watched(model, optimizer), plan, [*notes, memory.note],
        )  # fmt: skip

    def begin(self, run: RunFolder) -> None:
        """Work in `run` from here on, going on from its newest whole checkpoint if it has one."""
        self.run = run
        self.restore()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.recipe.training.total_steps(self.batches.steps_per_epoch)

    def fit(self, *, terminal: bool = True) -> TrainResult:
        """The loop: steps, evaluations, checkpoints, until the end or a signal."""
        training = self.recipe.training
        began = time.monotonic()
        with StopRequest() as stop, self._tracker(terminal) as tracker:
            for note in self.notes if terminal else ():
                tracker.note(note)
            loss = self.loss_before
            if self.first_step == 0:
                loss = self.loss_before = self.evaluate(tracker, step=0)
            step = self.first_step
            while step < self.total_steps and stop.signal_number is None:
                step = self.take_step(step, tracker)
                last = step == self.total_steps
                if last or (training.eval_every and step % training.eval_every == 0):
                    loss = self.evaluate(tracker, step)
                if not last and training.save_every and step % training.save_every == 0:
                    self.save(step, tracker)
            if step < self.total_steps:
                self.save(step, tracker)

            result = self.finish() if step == self.total_steps else None
            self.write_memory(tracker)
            outcome = TrainResult(
                run=self.run.path,
                result=result,
                steps=step,
                total_steps=self.total_steps,
                loss_before=self.loss_before,
                loss_after=loss,
                memory=measure.peak(self.accelerator.device),
                seconds=time.monotonic() - began,
                stopped_by=stop.signal_number if result is None else None,  # a finished run was not stopped
            )
            if result is not None and self.accelerator.is_main_process:
                self.run.write_result(outcome.as_json())
            tracker.finish(outcome.as_json())
        if self.accelerator.is_main_process:
            with suppress(SaveError):  # the run is whole without its page, and `qlora report` makes it again
                write_page(self.run.path)
        return outcome

    def take_step(self, step: int, tracker: Tracker) -> int:
        """Optimizer step `step` (0-based): its rows, its learning rate, the update, its record. Returns step + 1."""
        settings = self.recipe.optimizer
        started = time.perf_counter()
        micro_batches = self.batches.step(step)
        lr = learning_rate(settings.schedule, settings.lr, step, self.total_steps, settings.warmup_steps)
        with self.memory.over(step):
            loss, grad_norm = self.update(micro_batches, step, lr)
        seconds = time.perf_counter() - started
        tracker.step(_record(step + 1, loss, grad_norm, lr, micro_batches, seconds))
        return step + 1

    def update(self, micro_batches: list[Batch], step: int, lr: float) -> tuple[float, float]:
        """One optimizer step. Returns the loss (nats per supervised token) and the gradient's norm before clipping.

        Raises:
            DivergedError: either is not finite; nothing has been updated then.
        """
        self.optimizer.zero_grad()
        loss = accumulate(
            self.model,
            micro_batches,
            seed=self.recipe.training.seed,
            step=step,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            loss_chunk=self.recipe.training.loss_chunk,
        )
        if self.accelerator.num_processes > 1:
            # Each process holds a share of the sum, so adding is all there is to do.
            for gradient in self.optimizer.gradients():
                torch.distributed.all_reduce(gradient)
            torch.distributed.all_reduce(loss)
        with announce(Phase.UPDATE):
            norm = self.optimizer.clip(self.recipe.training.max_grad_norm)
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()  # one wait for the device a step
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise DivergedError(
                f"step {step + 1}: the loss is {loss_value}, the gradient norm {norm_value}. Nothing was updated; "
                f"the newest checkpoint in {self.run.path / 'checkpoints'} is intact. Try a lower optimizer.lr, "
                "or look at the rows of this step with `qlora data`"
            )
        with announce(Phase.UPDATE):
            self.optimizer.step(lr)
        return loss_value, norm_value

    def evaluate(self, tracker: Tracker, step: int) -> float | None:
        """Held-out loss and sample answers. None without held-out rows."""
        if not self.dataset.held_out:
            return None
        with self.memory.over(step, evaluation=True):
            total, tokens = evaluate(
                self.model,
                held_out_batches(self.dataset, self.recipe),
                rank=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
                loss_chunk=self.recipe.training.loss_chunk,
            )
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(total)
        loss = total.item() / tokens
        if self.accelerator.is_main_process:
            memory = measure.peak(self.accelerator.device)
            peak_bytes = memory.resident_bytes if memory.allocated_bytes is None else memory.allocated_bytes
            tracker.evaluation(
                {"step": step, "eval_loss": loss, "eval_tokens": tokens, "peak_memory_bytes": peak_bytes}
            )
            tracker.samples(self.answers(), step)
        return loss

    def answers(self) -> list[Sample]:
        """The first few held-out prompts, answered by the model as it is now."""
        training = self.recipe.training
        return [
            Sample(
                prompt=prompt.text,
                reference=prompt.reference,
                answer=answer(
                    self.model,
                    self.tokenizer,
                    prompt.input_ids,
                    training.sample_tokens,
                    stop_ids=self.dataset.stop_ids,
                ),
            )
            for prompt in self.dataset.prompts[: training.samples]
        ]

    def save(self, step: int, tracker: Tracker) -> None:
        """Commit a checkpoint of the state after `step` steps. A full disk is noted, not fatal: the next may fit."""
        if not self.accelerator.is_main_process:
            return
        training = self.recipe.training
        try:
            with checkpoint.writing(self.run.path, step, self.run.run_id) as folder:
                self.write_weights(folder / self.result_name)
                checkpoint.save_tensors(folder / "optimizer.safetensors", self.optimizer.state())
                checkpoint.write_state(
                    folder,
                    {
                        "step": step,
                        "loss_before": self.loss_before,
                        "data": self.dataset.fingerprint,
                        "plan": self.plan,  # the run goes on by it even if run.json is lost
                    },
                )
            checkpoint.rotate(self.run.path, training.keep_checkpoints, self.run.run_id)
        except SaveError as error:
            tracker.note(f"checkpoint of step {step} not saved: {error}")

    def write_weights(self, folder: Path) -> None:
        """Write the adapter (or the whole model, if all of it trains) into `folder`."""
        if self.recipe.adapter.method == "lora":
            save_adapter(self.model, folder, base=self.base_identity)
        else:
            self.model.save_pretrained(folder, max_shard_size="4GB")  # type: ignore[operator]
            self.tokenizer.save_pretrained(folder)
        (folder / "recipe.yaml").write_text(self.recipe.to_yaml())  # what it was trained on travels with it

    @cached_property
    def base_identity(self) -> BaseIdentity:
        """What the adapter is trained on, for it to remember."""
        return replace(BaseIdentity.of(self.model), **prompting(self.recipe.data, self.tokenizer))

    @property
    def result_name(self) -> str:
        """`adapter` or `model`: the folder's name in a run and in a checkpoint."""
        return "adapter" if self.recipe.adapter.method == "lora" else "model"

    def restore(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        folder = checkpoint.newest(self.run.path, run_id=self.run.run_id)
        if folder is None:
            return
        state = checkpoint.read_state(folder)
        if state["data"] != self.dataset.fingerprint:
            raise ModelError(
                f"{folder}: the data set has changed since this checkpoint (its rows, tokenizer or template), so the "
                "run cannot go on exactly. Put it back, or start again with --fresh"
            )
        if self.recipe.adapter.method == "lora":
            recorded = BaseIdentity.read(folder / "adapter") or self.base_identity
            if (difference := recorded.difference(self.base_identity)) is not None:
                raise ModelError(
                    f"{folder}: the base has changed since this checkpoint ({difference}), so the run cannot go on "
                    "exactly. Put it back, or start again with --fresh"
                )
            load_adapter(self.model, folder / "adapter", any_base=True)
        else:
            for file in (folder / "model").glob("*.safetensors"):  # tied weights are saved once
                self.model.load_state_dict(checkpoint.load_tensors(file), strict=False)
        self.optimizer.load_state(checkpoint.load_tensors(folder / "optimizer.safetensors"))
        self.first_step, self.loss_before = state["step"], state["loss_before"]

    def finish(self) -> Path:
        """Write the result where users look for it: <run>/adapter or <run>/model."""
        if self.accelerator.is_main_process:
            with folders.replacing(self.run.path, self.result_name) as folder:
                self.write_weights(folder)
        return self.run.path / self.result_name

    def write_memory(self, tracker: Tracker) -> None:
        """Leave forecast, measurement and the documents' estimate in the run's folder."""
        if not self.accelerator.is_main_process:
            return
        content = self.memory.content(self.run.path)
        if content is None:
            return
        try:
            memory_files.write(self.run.path, content)
        except SaveError as error:
            tracker.note(f"no memory report: {error}")
        else:
            tracker.memory(content, self.run.path / "memory.png")

    def _tracker(self, terminal: bool) -> Tracker:
        return Tracker(
            self.run.path,
            config=self.recipe.to_dict(),
            wandb=self.recipe.tracking.wandb,
            total_steps=self.total_steps,
            resume_step=self.first_step,
            terminal=terminal,
            main=self.accelerator.is_main_process,
        )


def _record(
    step: int, loss: float, grad_norm: float, lr: float, batches: list[Batch], seconds: float
) -> dict[str, float | int]:
    tokens = sum(batch.tokens for batch in batches)
    return {
        "step": step,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "supervised_tokens": sum(batch.supervised for batch in batches),
    }


def _claim_together(recipe: Recipe, path: Path, session: Session, *, resume: bool, fresh: bool) -> RunFolder:
    """The main process claims the folder; the others learn of it."""
    return broadcast_from_main(
        session.accelerator, lambda: claim(recipe, path, resume=resume, fresh=fresh, plan=session.plan)
    )


def _check_vocabulary(model: nn.Module, tokenizer: Any, recipe: Recipe) -> None:
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise ModelError(
            f"base.model: the tokenizer of {recipe.base.model!r} has {len(tokenizer)} tokens, its embedding only "
            f"{rows} rows. The tokenizer belongs to another model"
        )
