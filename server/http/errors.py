"""An error leaves the server in one JSON shape, on every route of ours.

    {"error": {"type": "invalid_request", "message": "max_tokens: ...", "param": "max_tokens"}}

vLLM registers its own exception handlers on the app after the plugins' routes, and its answer to a wrong body echoes
the input in a Python representation. Our routes therefore turn their errors into answers themselves, before any handler
of the app is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from http import HTTPStatus
from typing import Any, get_args

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from pat_serve.server.engine.errors import (
    BaselineDead,
    BaselineMissing,
    EngineDead,
    EngineFault,
    EngineOverloaded,
    GenerationFailed,
    NotReady,
    RequestRefused,
)

logger = logging.getLogger(__name__)

_MESSAGE_CHARS = 300
# Seconds after which an overloaded server is asked again.
RETRY_AFTER_S = 1
_RETRY = {"Retry-After": str(RETRY_AFTER_S)}


class ErrorDetail(BaseModel):
    """The error in the body of an answer."""

    type: str
    message: str
    param: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorDetail


class HttpError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status code.
        kind: stable machine-readable word, `error.type` in the body.
        message: one sentence for a person: what was expected, what was found, the way out.
        param: the request's field at fault, if there is one.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        param: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        super().__init__(message)

    def body(self) -> ErrorBody:
        """The body of this error's answer."""
        return ErrorBody(error=ErrorDetail(type=self.kind, message=self.message, param=self.param))

    def response(self) -> JSONResponse:
        """The answer that tells a client of this error."""
        return JSONResponse(self.body().model_dump(), status_code=self.status, headers=self.headers)


class InvalidRequestError(HttpError):
    """400: the request can never succeed as it stands."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(400, "invalid_request", message, param)


# How each of the engine's faults leaves the server: the status and further headers of its answer.
_OF_ENGINE: Mapping[type[EngineFault], tuple[int, Mapping[str, str]]] = {
    RequestRefused: (400, {}),
    BaselineMissing: (409, {}),
    GenerationFailed: (500, {}),
    EngineOverloaded: (503, _RETRY),
    EngineDead: (503, _RETRY),
    BaselineDead: (503, {}),
    NotReady: (503, {}),
}


def answer_to(fault: EngineFault) -> HttpError:
    """The answer that tells a client of an engine's fault."""
    status, headers = _OF_ENGINE[type(fault)]
    return HttpError(status, fault.kind, fault.message, fault.param, headers=headers)


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


class ErrorShapeRoute(APIRoute):
    """A route whose errors all leave in the shape above, without traceback and without an echo of the input."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler, so that no error leaves it."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except HttpError as error:
                return error.response()
            except EngineFault as fault:
                return answer_to(fault).response()
            except RequestValidationError as error:
                return explain(error.errors(), self._body_model()).response()
            except HTTPException:
                # FastAPI's reading of the body alone raises this here, for JSON that is too deep or has absurd numbers.
                return InvalidRequestError("the body cannot be read as JSON").response()
            except ClientGoneError:
                # Nobody reads this; 499 is what access logs commonly show for a client that left.
                return Response(status_code=499)
            except Exception:
                logger.exception("%s %s failed", request.method, self.path)
                return HttpError(500, "internal_error", "the server failed; its log has the reason").response()

        return handle

    def _body_model(self) -> type[BaseModel] | None:
        model = self.body_field.field_info.annotation if self.body_field else None
        return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def shape_routing_errors(app: FastAPI) -> None:
    """Give an unknown path or method the same shape; vLLM leaves these two to Starlette, which has another one."""

    @app.exception_handler(HTTPException)
    async def answer(request: Request, error: HTTPException) -> JSONResponse:
        kind = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        told = {404: "there is no such route", 405: f"this route does not take {request.method}"}
        body = HttpError(error.status_code, kind, told.get(error.status_code, kind.replace("_", " "))).body()
        return JSONResponse(body.model_dump(), status_code=error.status_code, headers=error.headers)


def shape_vllm_errors(app: FastAPI, faults: Mapping[type[Exception], Callable[[], EngineFault]]) -> None:
    """Have vLLM's routes answer a wrong body, a failed engine and a defect as ours do.

    vLLM's own answer to a wrong body repeats parts of it, and to the others it answers 500 with the exception's text.

    Args:
        app: vLLM's, with its handlers.
        faults: the errors of the engine, and the fault that each of them is. vLLM's own handler is called as well: it
            ends the server of a dead engine.
    """

    @app.exception_handler(RequestValidationError)
    async def wrong_body(_: Request, error: RequestValidationError) -> JSONResponse:
        # Where a field may be one of several types (a text, or a list of texts), a bound says more than a wrong type.
        first = next((one for one in error.errors() if one["type"] == "too_long"), error.errors()[0])
        if isinstance(first, str):
            return InvalidRequestError("the body must be sent as Content-Type: application/json").response()
        # The first name is the field's; further parts of the place name the branches of vLLM's types.
        param = next((part for part in _place(first) if isinstance(part, str)), None)
        if first["type"] == "json_invalid":
            return explain([first], None).response()
        told = str(first["msg"]).splitlines()[0][:_MESSAGE_CHARS]
        return InvalidRequestError(f"{param}: {told}" if param else told, param).response()

    @app.exception_handler(Exception)
    async def defect(request: Request, _: Exception) -> JSONResponse:
        # Starlette raises the error again behind the answer, so that uvicorn logs it. This handler runs outside of the
        # observer, which adds the request's id to every other answer, so the id is added here.
        told, name = "the server failed; its log has the reason", "X-Request-Id"
        headers = {name: request.headers[name]} if name in request.headers else {}
        return HttpError(500, "internal_error", told, headers=headers).response()

    for kind, fault in faults.items():
        theirs = next(app.exception_handlers[base] for base in kind.__mro__ if base in app.exception_handlers)
        app.exception_handler(kind)(_after(theirs, fault))
    # vLLM has already built the stack of middlewares, with the handlers of that moment in it.
    app.middleware_stack = app.build_middleware_stack()


def _after(theirs: Any, fault: Callable[[], EngineFault]) -> Callable[[Request, Exception], Any]:
    async def answer(request: Request, error: Exception) -> JSONResponse:
        await theirs(request, error)
        return answer_to(fault()).response()

    return answer


def explain(errors: Sequence[Any], model: type[BaseModel] | None) -> InvalidRequestError:
    """One sentence about the first of pydantic's errors, and how many more there are.

    Args:
        errors: as `RequestValidationError.errors()` gives them.
        model: the body's model. Where an unknown field was sent, those of the object that it stands in are listed.
    """
    first = errors[0]
    place = _place(first)
    param = ".".join(str(part) for part in place) or None
    there = _model_at(model, place)
    known = ", ".join(there.model_fields) if there else ""
    match first["type"]:
        case "json_invalid":
            position = first["loc"][-1]
            return InvalidRequestError(f"the body is not valid JSON: {first['ctx']['error']} at character {position}")
        case "extra_forbidden":
            message = f"an unknown field; known fields are {known}"
        case "missing" if param is None:
            message = f"a JSON body is needed; its fields are {known}"
        case "model_attributes_type" | "model_type" | "dict_type" if param is not None:
            message = f"must be a JSON object; its fields are {known}"
        case "model_attributes_type" | "model_type" | "dict_type":
            message = f"the body must be a JSON object sent as Content-Type: application/json; its fields are {known}"
        case "value_error":
            message = str(first["ctx"]["error"])
        case _:
            message = first["msg"][0].lower() + first["msg"][1:]
    if param is not None:
        message = f"{param}: {message}"
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more)"
    return InvalidRequestError(message, param)


def _model_at(model: type[BaseModel] | None, place: Sequence[str | int]) -> type[BaseModel] | None:
    """The model of the object at a place in the body; None where none is known."""
    for part in place:
        if isinstance(part, str) and model is not None:
            field = model.model_fields.get(part)
            model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model that a field's type names: Message of list[Message] | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def _place(error: Any) -> tuple[str | int, ...]:
    """The place of an error in the body, as names of fields and indices of lists.

    The name of an unknown field is left out, because it is the client's own text.
    """
    inside: tuple[str | int, ...] = error["loc"][1:]
    return inside[:-1] if error["type"] == "extra_forbidden" else inside
