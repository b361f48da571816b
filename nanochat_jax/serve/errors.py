"""Errors in OpenAI's shape, {"error": {"message", "type", "param", "code"}}: no stack traces."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

# The names that clients know, by status; the rest are the request's fault or ours.
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What was wrong, and with which parameter."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail


class ApiError(Exception):
    """An error response; `param` names the parameter at fault, as in messages[0].content."""

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
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        detail = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()

    def response(self) -> Response:
        # ASCII: a message may quote text that is not valid Unicode.
        content = json.dumps(self.body())
        return Response(content, self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, retry_after: int) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after)})


def internal_error() -> ApiError:
    return ApiError(500, "something went wrong in the server; its log says what", code="internal")


GONE = 499  # nginx's number for a client that did not wait; only our log and metrics see it


def install_handlers(app: FastAPI) -> None:
    """What a route or the framework refuses leaves in the same shape (see middleware.py)."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return describe(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = _PLAIN.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()


_PLAIN = {
    400: "the body cannot be read as JSON",
    404: "there is nothing at this address; the API is below /v1",
    405: "this address does not take that method",
}


def describe(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's findings as one sentence about one parameter."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {first['ctx']['error']}")
    if first["type"] == UNSUPPORTED:
        return bad_request(first["msg"], first["ctx"]["name"], UNSUPPORTED)
    param = ""  # as in messages[0].content
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif not part.startswith(UNION_MEMBER) and part not in ("body", "query", "path"):
            param += f".{part}" if param else part
    if not param:
        need = "the body must be a JSON object, sent with the header Content-Type: application/json"
        return bad_request(need)
    match first["type"]:
        case "missing":
            problem = "is required"
        case "too_short" | "string_too_short":
            problem = f"must not be shorter than {first['ctx']['min_length']}"
        case "too_long" | "string_too_long":
            problem = f"must not be longer than {first['ctx']['max_length']}"
        case _:
            problem = first["msg"].replace("Input should be", "must be")
    return bad_request(f"{param}: {problem}", param)


UNSUPPORTED = "unsupported_parameter"  # one that would change the answer and is not implemented
UNION_MEMBER = "as "  # begins the names of the members of unions, which no user need see
