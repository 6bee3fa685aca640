"""Responses in the shape of OpenAI's API: whole answers, and the chunks of a stream."""

import json
import time
import uuid
from typing import Any

from qlora.serving.api_error import ApiError
from qlora.serving.job import Job

DONE = "data: [DONE]\n\n"
"""end of a stream"""


def usage(job: Job) -> dict[str, int]:
    """Count the tokens of a request; the token that ends an answer counts, because the model computed it."""
    prompt, answer = len(job.prompt), len(job.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def event(value: dict[str, Any]) -> str:
    """Return an object as one server-sent event."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


def error_event(error: ApiError) -> str:
    """Return an error as one server-sent event; clients raise it."""
    return event(error.body)


class Reply:
    """Response to one request.

    Args:
        model: name of the model.
        chat: True for a chat, False for a completion.
        include_usage: end a stream with the counts of tokens.
    """

    def __init__(self, model: str, *, chat: bool, include_usage: bool = False) -> None:
        self._chat, self._include_usage = chat, include_usage
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, reason: str, job: Job) -> dict[str, Any]:
        """Return the whole answer."""
        message = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self._chat
            else {"text": text}
        )
        choice = {"index": 0, **message, "logprobs": None, "finish_reason": reason}
        return {**self._head, "choices": [choice], "usage": usage(job)}

    def opening(self) -> str:
        """Return the first event of a stream: in a chat, the role of the speaker."""
        return self._chunk({"role": "assistant", "content": ""}) if self._chat else ""

    def piece(self, text: str) -> str:
        """Return the event with the next text."""
        return self._chunk({"content": text} if self._chat else text)

    def closing(self, reason: str, job: Job) -> str:
        """Return the last events of a stream."""
        events = self._chunk({} if self._chat else "", reason)
        if self._include_usage:
            events += event({**self._stream_head, "choices": [], "usage": usage(job)})
        return events + DONE

    @property
    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head

    def _chunk(self, content: Any, reason: str | None = None) -> str:
        choice = {
            "index": 0,
            "delta" if self._chat else "text": content,
            "logprobs": None,
            "finish_reason": reason,
        }
        counts = {"usage": None} if self._include_usage else {}
        return event({**self._stream_head, "choices": [choice], **counts})
