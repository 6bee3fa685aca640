"""A conversation with a base and its adapters: who answers, what was said, and the commands that change it.

It writes nothing itself: pieces of answers and remarks go to a `Screen`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedTokenizerFast

from qlora.adapter.switch import Adapters
from qlora.data import Prompts
from qlora.errors import ModelError, QloraError, UsageError
from qlora.inference.generate import answer
from qlora.inference.load import find_adapter, find_trained, load_trained, recipe_of
from qlora.runtime.signals import StopRequest

BASE = "base"
"""who answers without an adapter"""


class Screen(Protocol):
    """Where a chat shows itself."""

    def begin(self, speakers: Sequence[str]) -> None:
        """Answers of these follow, one after the other."""

    def text(self, speaker: str, piece: str) -> None:
        """The next piece of an answer."""

    def end(self) -> None:
        """The answers are complete, or were stopped."""

    def note(self, text: str) -> None:
        """A remark that is no answer."""


class Chat:
    """A model that answers, with adapters to switch between.

        >>> chat = Chat(model, tokenizer, Prompts(recipe.data, tokenizer), adapters, screen)
        >>> chat.say("Hello")
        >>> chat.say("/base")

    adapters: of `model`, the active one answers first. history: a question follows the ones before it; else each
        is posed on its own. max_new_tokens: of an answer. temperature: see `answer`.
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
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.adapters, self.screen, self.history = adapters, screen, history
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.both = False
        """the base answers beside the adapter"""
        self.messages: list[Mapping[str, str]] = []
        """the conversation so far; stays empty without history"""
        self.commands: dict[str, Callable[..., None]] = {
            "adapter": self._adapter,
            "base": self._base,
            "both": self._both,
            "reset": self._reset,
            "help": self._help,
        }

    @property
    def speakers(self) -> list[str]:
        """Who answers the next question."""
        active = self.adapters.active
        if active is None:
            return [BASE]
        return [BASE, active] if self.both else [active]

    def say(self, line: str) -> int | None:
        """Answer a question, or do what a line that begins with / says.

        Returns the signal that ended the answer early, if one did. What is wrong with a line is a note.
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
            except KeyboardInterrupt:  # a second Ctrl-C does not wait for the next token
                pass
            finally:
                self.adapters.activate(active)
                self.screen.end()
        said = replies.get(speakers[-1])
        if self.history and said:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
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
        """The question after the conversation so far, of which the oldest goes if the model's positions run out."""
        config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        room = getattr(config, "max_position_embeddings", None)
        forgotten = 0
        ids = self.prompts.encode(text, self.messages)
        while room is not None and len(ids) + self.max_new_tokens > room and self.messages:
            del self.messages[:2]
            forgotten += 1
            ids = self.prompts.encode(text, self.messages)
        if forgotten:
            self.screen.note(f"(the oldest {forgotten} of the questions no longer fit and are forgotten)")
        if room is not None and len(ids) >= room:
            raise UsageError(f"the question takes {len(ids)} tokens, and the model has {room} positions")
        return ids

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        command = self.commands.get(name)
        if command is None:
            raise UsageError(f"there is no command /{name}; /help lists them")
        arguments = [rest.strip()] if rest.strip() else []
        if len(arguments) > len(inspect.signature(command).parameters):
            raise UsageError(f"/{name} takes no argument")
        command(*arguments)

    def _adapter(self, name: str = "") -> None:
        """/adapter NAME: let this adapter answer; without NAME, list the adapters."""
        if not name:
            self.screen.note(
                f"adapters: {', '.join(self.adapters.names) or 'none'}; answering: {self._who()}"
            )
            return
        self.adapters.activate(name)
        self.both = False
        self.screen.note(f"answering: {self._who()}")

    def _base(self) -> None:
        """/base: let the base answer, without an adapter."""
        self._need_adapters()
        self.adapters.deactivate()
        self.both = False
        self.screen.note(f"answering: {self._who()}")

    def _both(self) -> None:
        """/both: let the base and the adapter answer side by side; the adapter's answer is what was said."""
        self._need_adapters()
        if self.adapters.active is None:
            self.adapters.activate(self.adapters.names[0])
        self.both = True
        self.screen.note(f"answering: {self._who()}")

    def _reset(self) -> None:
        """/reset: forget the conversation."""
        self.messages = []
        self.screen.note("the conversation begins anew")

    def _help(self) -> None:
        """/help: this."""
        lines = [inspect.getdoc(command) or "" for command in self.commands.values()]
        self.screen.note("\n".join([*lines, "/quit: end (as Ctrl-D). Ctrl-C stops an answer."]))

    def _who(self) -> str:
        return " and ".join(self.speakers)

    def _need_adapters(self) -> None:
        if not self.adapters.names:
            raise UsageError(
                "all of this model's weights were trained: there is no base without an adapter to ask"
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
    """A chat with the model in a run's or an adapter's folder, and with `others`: adapters' folders by name.

    `history` None is what the rows were that the model learned from: conversations, or single questions. It and
    `settings` are those of `Chat`. `any_base` lets adapters answer that were trained on another base; of the run's
    own one, tokenizer and template count too. Raises ModelError if an adapter is missing, does not fit, or was
    trained on another base, and as `load_trained` if the base would run code of its own.
    """
    recipe = recipe_of(find_trained(Path(folder)), trust_remote_code=trust_remote_code)
    places = {recipe.name: folder} if recipe.adapter.facts.frozen_base else {}
    if not places and others:
        raise ModelError(f"{folder}: all weights were trained, so adapters of its base do not fit it")
    if BASE in others or places.keys() & others.keys():
        raise UsageError(f"--adapter: {BASE!r} and {recipe.name!r} are taken, choose other names")
    found = {name: find_adapter(Path(place)) for name, place in {**places, **others}.items()}
    trained = load_trained(
        folder, device=device, with_adapter=not places, trust_remote_code=trust_remote_code
    )
    adapters = Adapters(trained.model)
    for name, place in found.items():
        known = trained.identity if name in places else None  # the others are asked in the first one's way
        adapters.load(name, place, base=known, any_base=any_base)
    if places:
        adapters.activate(recipe.name)
    prompts = Prompts(recipe.data, trained.tokenizer)
    if history and not prompts.can_follow:
        raise UsageError(f"--history: rows of the {recipe.data.format} format are single, or the template is")
    history = prompts.learned_to_follow if history is None else history
    return Chat(trained.model, trained.tokenizer, prompts, adapters, screen, history=history, **settings)
