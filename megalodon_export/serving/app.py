"""The routes, as a FastAPI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from .. import __version__
from . import models, responses
from .answers import fault, refusal
from .chat import chat
from .completions import complete
from .errors import ApiError
from .fields import ChatFields, CompletionFields, DetokenizeFields, ResponseFields, TokenizeFields
from .keys import Keys
from .metrics import Metrics
from .request_log import RequestLog
from .service import Service

# The page's own script and style, requests to this server, and nothing else.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SNAPSHOT = "application/octet-stream"


def make_app(
    service: Service, metrics: Metrics, keys: Keys | None = None, origins: Sequence[str] = (), log: bool = False
) -> FastAPI:
    """The application. `origins` may call it from a browser; `log` writes one line a request."""
    app = FastAPI(title="megalodon-export", docs_url=None, redoc_url=None)
    app.state.service, app.state.metrics, app.state.keys = service, metrics, keys or Keys()
    app.state.started = int(time.time())
    app.openapi = partial(_document, app)  # type: ignore[method-assign]
    for kind in (ApiError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _refuse)
    _add_open_routes(app)
    _add_generating_routes(app)
    _add_model_routes(app)
    _add_state_routes(app)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"], max_age=600
        )
    if log:
        app.add_middleware(RequestLog)
    return app


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


def _owner(request: Request) -> str:
    keys: Keys = request.app.state.keys
    return keys.owner(request.headers.get("authorization"))


Owner = Annotated[str, Depends(_owner)]
Served = Annotated[Service, Depends(_service)]


async def body_of(request: Request, most: int, seconds: float) -> bytes:
    """The body of a request; ApiError for one that is too large or too slow."""
    chunks, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    raise ApiError(413, f"the body has more than {most} bytes, the limit of this server")
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, f"the body has not arrived in {seconds:g} seconds", code="timeout") from None
    return b"".join(chunks)


async def _refuse(request: Request, error: Exception) -> Response:
    """Any error, in OpenAI's form."""
    if isinstance(error, HTTPException):
        what = f"there is no {request.url.path}" if error.status_code == 404 else str(error.detail)
        return refusal(ApiError(error.status_code, what, headers=dict(error.headers or {})))
    if isinstance(error, RequestValidationError):
        return refusal(ApiError(400, str(error.errors()[0].get("msg", "the request is wrong"))))
    return refusal(fault(error))


_KINDS = (CompletionFields, ChatFields, ResponseFields, TokenizeFields, DetokenizeFields)
_REFERENCE = "#/components/schemas/{name}"


def _body_of_kind(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The OpenAPI document's description of a route's body."""
    schema = {"$ref": _REFERENCE.format(name=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies' fields."""
    document = get_openapi(title=app.title, version=__version__, routes=app.routes)
    _, schemas = msgspec.json.schema_components(_KINDS, ref_template=_REFERENCE)
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
    return document


def _add_open_routes(app: FastAPI) -> None:
    """Routes that need no key."""

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        html = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/health")
    async def health(service: Served) -> Response:
        engine = service.engine
        if engine.failure is not None or engine.is_draining:
            raise ApiError(503, engine.failure or "the server is shutting down")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_generating_routes(app: FastAPI) -> None:
    Handler = Callable[[Service, bytes, str], Awaitable[Response]]

    async def answer(request: Request, service: Service, owner: str, handler: Handler) -> Response:
        limits = service.limits
        return await handler(service, await body_of(request, limits.body_bytes, limits.body_seconds), owner)

    @app.post("/v1/completions", openapi_extra=_body_of_kind(CompletionFields))
    async def completions(request: Request, service: Served, owner: Owner) -> Response:
        return await answer(request, service, owner, complete)

    @app.post("/v1/chat/completions", openapi_extra=_body_of_kind(ChatFields))
    async def chats(request: Request, service: Served, owner: Owner) -> Response:
        return await answer(request, service, owner, chat)

    @app.post("/v1/responses", openapi_extra=_body_of_kind(ResponseFields))
    async def respond(request: Request, service: Served, owner: Owner) -> Response:
        return await answer(request, service, owner, responses.respond)

    @app.post("/tokenize", openapi_extra=_body_of_kind(TokenizeFields))
    async def tokenize(request: Request, service: Served, owner: Owner) -> Response:
        return await answer(request, service, owner, models.tokenize)

    @app.post("/detokenize", openapi_extra=_body_of_kind(DetokenizeFields))
    async def detokenize(request: Request, service: Served, owner: Owner) -> Response:
        return await answer(request, service, owner, models.detokenize)


def _add_model_routes(app: FastAPI) -> None:
    @app.get("/v1/models")
    async def listed(request: Request, service: Served, owner: Owner) -> Response:
        return JSONResponse({"object": "list", "data": [models.model(service, request.app.state.started)]})

    @app.get("/v1/models/{name:path}")
    async def one(request: Request, name: str, service: Served, owner: Owner) -> Response:
        service.check_model(name)
        return JSONResponse(models.model(service, request.app.state.started))

    @app.get("/tokenizer_info")
    async def tokenizer_info(service: Served, owner: Owner) -> Response:
        return JSONResponse(models.tokenizer_info(service))


def _add_state_routes(app: FastAPI) -> None:
    @app.get("/v1/responses")
    async def listed(service: Served, owner: Owner) -> Response:
        data = [record.summary() for record in service.responses.list(owner)]
        return JSONResponse({"object": "list", "data": data})

    @app.post("/v1/responses/state")
    async def upload(request: Request, service: Served, owner: Owner) -> Response:
        most = models.largest_state(service)
        content = await body_of(request, most, service.limits.body_seconds)
        return JSONResponse(await asyncio.to_thread(models.store_state, service, content, owner))

    @app.get("/v1/responses/{name}")
    async def one(name: str, service: Served, owner: Owner) -> Response:
        return JSONResponse(models.stored(service, name, owner).body)

    @app.delete("/v1/responses/{name}")
    async def delete(name: str, service: Served, owner: Owner) -> Response:
        models.stored(service, name, owner)
        await asyncio.to_thread(service.responses.delete, name, owner)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    @app.get("/v1/responses/{name}/state")
    async def download(name: str, service: Served, owner: Owner) -> Response:
        record = models.stored(service, name, owner)
        content = await asyncio.to_thread(service.responses.content, record)
        if content is None:
            raise models.no_response(name)
        headers = {"Content-Disposition": f'attachment; filename="{record.id}.safetensors"'}
        return Response(content, media_type=_SNAPSHOT, headers=headers)
