"""Control over HTTP: SGLang's and vLLM's endpoints for an engine, to be mounted beside its own.

    controls = Controls(hook)
    app = Starlette(routes=[*engine_routes, *control_routes(controls)])     # FastAPI: see `control_routes`
    handle_asleep(app)

Requests are validated completely here: bodies are capped, and decoded into the structs below. Calls of the
hook block, so they run on one thread of their own, one at a time, and never on the event loop, which goes on
serving; what can be answered at once is. There is no authentication: whoever reaches these endpoints may use
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Final, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from engine_hooks.hook import EngineHook
from engine_hooks.integrations.answers import (
    Answer,
    Shape,
    generation_refused,
    plain_error,
    unsuccessful,
    vllm_error,
)
from engine_hooks.integrations.controls import Controls
from engine_hooks.integrations.metrics import registry_of
from weightstore.errors import DependencyMissing, EngineAsleep, EngineBroken
from weightstore.types import MAX_NAME

try:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise DependencyMissing(
        f"control over HTTP needs Starlette: pip install 'weightstore[http]' ({error})"
    ) from error

MAX_BODY: Final = 16 << 20
"""Bytes of a request's body. The largest hold the checksums of a model's tensors: some 200 bytes each."""

Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
"""No longer than a name in the store: answers and logs repeat what nobody knows."""
Names = Annotated[list[Name], msgspec.Meta(max_length=1000)]


class Tags(msgspec.Struct):
    """Fields that SGLang's clients send besides are ignored, here and below."""

    tags: Names | None = None


class UpdateFromStore(msgspec.Struct, forbid_unknown_fields=True):
    model: Name | None = None
    tag: Name | None = None
    version: int | None = None


class ModuleNames(msgspec.Struct):
    module_names: Names | None = None


class Expected(msgspec.Struct):
    target_module: Name | None = None
    expected_named_tensors_sha256: dict[Name, Name] | None = None


Body = TypeVar("Body")


class _BadRequest(Exception):
    """The answer to a request that says nothing that could be done."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def control_routes(
    controls: Controls, *, health: bool = True, metrics: bool = True, max_body: int = MAX_BODY
) -> list[Any]:
    """The endpoints, as Starlette routes; for FastAPI ``app.router.routes.extend(control_routes(controls))``.

    Args:
        health, metrics: whether to have `/health` and `/metrics`, which the engine's server may have itself.
    """
    endpoints = _Endpoints(controls, max_body)
    both = ["GET", "POST"]
    routes = [
        Route("/release_memory_occupation", endpoints.release, methods=both),
        Route("/resume_memory_occupation", endpoints.resume, methods=both),
        Route("/update_weights_from_store", endpoints.update_from_store, methods=["POST"]),
        Route("/get_weights_checksum", endpoints.checksum, methods=["POST"]),
        Route("/update_weights_from_tensor_checker", endpoints.check, methods=["POST"]),
        Route("/weight_version", endpoints.weight_version, methods=both),
        Route("/sleep", endpoints.sleep, methods=["POST"]),
        Route("/wake_up", endpoints.wake_up, methods=["POST"]),
        Route("/is_sleeping", endpoints.is_sleeping, methods=["GET"]),
    ]
    if health:
        routes.append(Route("/health", endpoints.health, methods=["GET"]))
    if metrics:
        routes.append(Route("/metrics", endpoints.metrics, methods=["GET"]))
    for route in routes[:2]:
        (route.methods or set()).discard("HEAD")  # which Starlette adds to GET, and which must change nothing
    return routes


def control_app(engine: EngineHook | Controls) -> Any:
    """The endpoints alone, as an ASGI application to serve or to mount."""
    controls = engine if isinstance(engine, Controls) else Controls(engine)
    return handle_asleep(Starlette(routes=control_routes(controls)))


def handle_asleep(app: Any) -> Any:
    """Have a Starlette or FastAPI application answer generations while the engine sleeps with 400, as SGLang
    does, and with 503 while it is broken. Returns the application."""
    app.add_exception_handler(EngineAsleep, _refuse_generation)
    app.add_exception_handler(EngineBroken, _refuse_generation)
    return app


async def _refuse_generation(request: Request, error: Exception) -> Response:
    return _response(generation_refused(error))


class _Endpoints:
    """Requests in, responses out."""

    def __init__(self, controls: Controls, max_body: int) -> None:
        self._controls = controls
        self._max_body = max_body
        self._registry = registry_of(controls)
        # One thread, so that operations wait for each other here and not in threads that generations need.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weightstore-control")

    async def release(self, request: Request) -> Response:
        return await self._post(request, Tags, lambda body: self._controls.release(body.tags))

    async def resume(self, request: Request) -> Response:
        return await self._post(request, Tags, lambda body: self._controls.resume(body.tags))

    async def update_from_store(self, request: Request) -> Response:
        update = self._controls.update_from_store
        return await self._post(
            request, UpdateFromStore, lambda body: update(body.model, body.tag, body.version)
        )

    async def checksum(self, request: Request) -> Response:
        return await self._post(
            request, ModuleNames, lambda body: self._controls.checksum(body.module_names), plain_error
        )

    async def check(self, request: Request) -> Response:
        return await self._post(
            request,
            Expected,
            lambda body: self._controls.check(body.target_module, body.expected_named_tensors_sha256),
        )

    async def weight_version(self, request: Request) -> Response:
        return _response(self._controls.weight_version())

    async def sleep(self, request: Request) -> Response:
        level = request.query_params.get("level", "1")
        if not (level.isascii() and level.isdigit() and len(level) < 4):
            return _response(Answer(400, vllm_error(f"level is a number, not {level[:20]!r}")))
        return await self._answer(lambda: self._controls.sleep(int(level)))

    async def wake_up(self, request: Request) -> Response:
        tags = request.query_params.getlist("tags")
        return await self._answer(lambda: self._controls.wake_up(tags))

    async def is_sleeping(self, request: Request) -> Response:
        return _response(self._controls.is_sleeping())

    async def health(self, request: Request) -> Response:
        return _response(self._controls.health())

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _post(
        self,
        request: Request,
        kind: type[Body],
        verb: Callable[[Body], Answer],
        refused: Shape = unsuccessful,
    ) -> Response:
        """Decode the body, none of which means no field given, and do what it asks for."""
        try:
            body = _decode(await self._read(request), kind)
        except _BadRequest as bad:
            return _response(Answer(bad.status, refused(str(bad))))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        return await self._answer(lambda: verb(body))

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body:
                raise _BadRequest(413, f"the body has more than {self._max_body} bytes")
        return bytes(body)

    async def _answer(self, verb: Callable[[], Answer]) -> Response:
        loop = asyncio.get_running_loop()
        return _response(await loop.run_in_executor(self._thread, verb))


def _decode(body: bytes, kind: type[Body]) -> Body:
    try:
        # As text first: of fields that it skips, the decoder would not look at the bytes.
        found = msgspec.json.decode(body.decode() or "{}", type=kind | None)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _BadRequest(400, f"the body is not the JSON object that is expected: {error}") from None
    return kind() if found is None else found


def _response(answer: Answer) -> Response:
    if answer.body is None:
        return Response(status_code=answer.status)
    return JSONResponse(answer.body, status_code=answer.status)
