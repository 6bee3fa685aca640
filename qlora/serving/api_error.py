"""Errors of a request, in the shape of OpenAI's API."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request cannot be answered.

    Args:
        status: status code of HTTP.
        message: the problem, and what to do.
        param: name of the parameter that is wrong.
        code: short name of the problem for programs.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The response as a JSON object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
