"""Chat with a base and its adapters: the active adapter, the conversation so far, and the commands.

The chat prints nothing itself: it passes pieces of answers and notes to a `Screen`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedTokenizerFast

from qlora.adapter.switch import Adapters
from qlora.data import Prompts
from qlora.errors import QloraError, UsageError
from qlora.inference.generate import answer
from qlora.inference.named_adapters import BASE, open_adapters
from qlora.runtime.signals import StopRequest


class Screen(Protocol):
    """Output of a chat."""

    def begin(self, speakers: Sequence[str]) -> None:
        """Start the answers of these speakers; they follow one after the other."""

    def text(self, speaker: str, piece: str) -> None:
        """Show the next piece of an answer."""

    def end(self) -> None:
        """End the answers: they are complete, or were stopped."""

    def note(self, text: str) -> None:
        """Show a message of the program, in contrast to an answer of the model."""


class Chat:
    """Chat with a model, with adapters to switch between.

        >>> chat = Chat(model, tokenizer, Prompts(recipe.data, tokenizer), adapters, screen)
        >>> chat.say("Hello")
        >>> chat.say("/base")

    Args:
        adapters: the adapters of `model`; the active one answers first.
        history: True asks each question after the conversation so far, False asks it on its own.
        system: system message of the conversation; None: the one of `prompts`, empty: none.
        max_new_tokens: maximum length of an answer in tokens.
        temperature: see `answer`.

    Raises:
        DataError: the template of the training rows does not write `system`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        prompts: Prompts,
        adapters: Adapters,
        screen: Screen,
        *,
        history: bool = False,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.adapters, self.screen, self.history = adapters, screen, history
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self._check(system)
        self.system = system
        """system message that was given for this chat; None: that of the training rows, empty: none"""
        self.both = False
        """True if the base and the adapter both answer"""
        self.messages: list[Mapping[str, str]] = []
        """the conversation so far; always empty without history"""
        self.commands: dict[str, Callable[..., None]] = {
            "adapter": self._adapter,
            "base": self._base,
            "both": self._both,
            "system": self._system,
            "reset": self._reset,
            "help": self._help,
        }

    @property
    def speakers(self) -> list[str]:
        """Names of the models that answer the next question."""
        active = self.adapters.active
        if active is None:
            return [BASE]
        return [BASE, active] if self.both else [active]

    def say(self, line: str) -> int | None:
        """Answer a question, or run the command in a line that starts with /. Errors are shown as notes.

        Returns the signal that ended the answer early, or None.
        """
        line = line.strip()
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                return self._ask(line)
        except QloraError as error:
            self.screen.note(str(error))
        return None

    def _ask(self, text: str) -> int | None:
        prompt = self._prompt(text)
        speakers, active = self.speakers, self.adapters.active
        replies: dict[str, str] = {}
        self.screen.begin(speakers)
        with StopRequest() as stop:
            try:
                for speaker in speakers:
                    self.adapters.activate(active if speaker == active else None)
                    replies[speaker] = self._answer(speaker, prompt, stop)
            except KeyboardInterrupt:  # a second Ctrl-C, before the next token
                pass
            finally:
                self.adapters.activate(active)
                self.screen.end()
        reply = replies.get(speakers[-1])
        if self.history and reply:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        return stop.signal_number

    def _answer(self, speaker: str, prompt: list[int], stop: StopRequest) -> str:
        if stop.signal_number is not None:
            return ""
        return answer(
            self.model,
            self.tokenizer,
            prompt,
            self.max_new_tokens,
            stop_ids=self.prompts.stop_ids,
            temperature=self.temperature,
            on_text=lambda piece: self.screen.text(speaker, piece),
            stopped=lambda: stop.signal_number is not None,
        )

    def _prompt(self, text: str) -> list[int]:
        """Encode the question after the conversation so far; drop the oldest questions if it is too long."""
        config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        room = getattr(config, "max_position_embeddings", None)
        dropped = 0
        ids = self.prompts.encode(text, self.messages, system=self.system)
        while room is not None and len(ids) + self.max_new_tokens > room and self.messages:
            del self.messages[:2]
            dropped += 1
            ids = self.prompts.encode(text, self.messages, system=self.system)
        if dropped:
            self.screen.note(f"(the conversation is too long; its oldest questions were dropped: {dropped})")
        if room is not None and len(ids) >= room:
            raise UsageError(
                f"the question has {len(ids)} tokens, but the model has {room} positions; shorten it"
            )
        return ids

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        command = self.commands.get(name)
        if command is None:
            raise UsageError(f"there is no command /{name}; /help lists the commands")
        arguments = [rest.strip()] if rest.strip() else []
        if len(arguments) > len(inspect.signature(command).parameters):
            raise UsageError(f"/{name} takes no argument")
        command(*arguments)

    def _adapter(self, name: str = "") -> None:
        """/adapter NAME: switch to this adapter; without NAME, list the adapters."""
        if not name:
            self.screen.note(
                f"adapters: {', '.join(self.adapters.names) or 'none'}; answering: {self._who()}"
            )
            return
        self.adapters.activate(name)
        self.both = False
        self.screen.note(f"answering: {self._who()}")

    def _base(self) -> None:
        """/base: switch to the base, without an adapter."""
        self._need_adapters()
        self.adapters.deactivate()
        self.both = False
        self.screen.note(f"answering: {self._who()}")

    def _both(self) -> None:
        """/both: show answers of base and adapter side by side; the conversation keeps the adapter's."""
        self._need_adapters()
        if self.adapters.active is None:
            self.adapters.activate(self.adapters.names[0])
        self.both = True
        self.screen.note(f"answering: {self._who()}")

    def _system(self, text: str = "") -> None:
        """/system TEXT: set the system prompt; none: ask without; trained: as in the training rows; alone: show it."""
        if text:
            system = {"none": "", "trained": None}.get(text, text)
            self._check(system)
            self.system = system
        self.screen.note(self.system_prompt)

    def _check(self, system: str | None) -> None:
        """Raise DataError if the template does not write a system prompt."""
        if system:
            self.prompts.encode("?", system=system)

    @property
    def system_prompt(self) -> str:
        """Description of the system prompt in use."""
        return self.prompts.describe_system(self.system)

    def _reset(self) -> None:
        """/reset: forget the conversation."""
        self.messages = []
        self.screen.note("the conversation is forgotten")

    def _help(self) -> None:
        """/help: list the commands."""
        lines = [inspect.getdoc(command) or "" for command in self.commands.values()]
        self.screen.note("\n".join([*lines, "/quit: end the chat, as does Ctrl-D. Ctrl-C stops an answer."]))

    def _who(self) -> str:
        return " and ".join(self.speakers)

    def _need_adapters(self) -> None:
        if not self.adapters.names:
            raise UsageError(
                "this model has no adapter: all of its weights were trained, so the base cannot be asked"
            )


def open_chat(
    folder: str,
    others: Mapping[str, str],
    screen: Screen,
    *,
    history: bool | None = None,
    device: str = "auto",
    any_base: bool = False,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Chat:
    """Load the model of a run or adapter, and other adapters, into a new chat.

    Args:
        folder: folder of a run or of an adapter.
        others: folders of other adapters of the same base, by name.
        screen: output of the chat.
        history: see `Chat`; None follows the training rows (conversations, or single questions).
        device: auto, cpu, cuda or cuda:N.
        any_base: accept adapters that were trained on another base. For the run's own adapter this also covers its
            tokenizer and template.
        trust_remote_code: see `load_trained`.
        settings: further arguments of `Chat`.

    Raises:
        ModelError: an adapter is missing, does not fit, was trained on another base, or trained tokens that the
            tokenizer of the first lacks; or as `load_trained`.
        DataError: as `Chat`.
        UsageError: a name is taken; or `history` is True, but the rows or the template have single questions only.
    """
    trained, adapters, _ = open_adapters(
        folder, others, device=device, any_base=any_base, trust_remote_code=trust_remote_code
    )
    prompts = trained.prompts
    if history and not prompts.accepts_history:
        raise UsageError(
            f"--history: format {trained.recipe.data.format} or its template has single questions only. Leave "
            "--history out"
        )
    history = prompts.trained_on_history if history is None else history
    return Chat(trained.model, trained.tokenizer, prompts, adapters, screen, history=history, **settings)
