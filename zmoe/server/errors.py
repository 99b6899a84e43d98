"""What a client is told when its request cannot be served."""

from __future__ import annotations

from typing import Any

from zmoe.server.link import EngineError

_STATUS = {"input": 400, "queue_full": 429, "queue_timeout": 503, "failed": 503}
RETRY_AFTER_S = 5  # of a full queue, and of a cluster that is loading


class ApiError(Exception):
    """An answer with an error: the HTTP `status`, the message, and the field at fault."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        super().__init__(message)

    @property
    def headers(self) -> dict[str, str]:
        """Those of the answer."""
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER_S)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def invalid(param: str, problem: str) -> ApiError:
    """A field that is wrong: its name, and what is wrong with it."""
    return ApiError(400, f"{param} {problem}", param, "invalid_value")


def error_of(error: EngineError) -> ApiError:
    """What the engine has told, as an answer."""
    return ApiError(_STATUS[error.kind], str(error), code=error.kind)


def error_body(error: ApiError) -> dict[str, Any]:
    """The error object of OpenAI's API."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(
        error.status, "invalid_request_error" if error.status < 500 else "server_error"
    )
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


_ANTHROPIC_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error_body(error: ApiError) -> dict[str, Any]:
    """The error object of Anthropic's API."""
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_ERRORS.get(error.status, kind)
    return {"type": "error", "error": {"type": kind, "message": error.message}}
