"""The control endpoints over real HTTP, each in every situation, and a server as its clients see it."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import serving_process
import tiny_pipelines
import torch
from fastapi import FastAPI
from hooked import Faulty, fresh_model, publish
from http_serving import PATIENCE, Client, Serving
from processes import Service
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from test_docs import DOCS
from test_docs import run as run_page
from torch import nn

import weightstore
from engine_hooks import EngineHook, State
from engine_hooks.integrations.checksums import module_checksum, tensor_checksums
from engine_hooks.integrations.controls import Controls
from engine_hooks.integrations.http import control_app, control_routes, handle_asleep
from weightstore.client import Store
from weightstore.errors import DependencyMissing

RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"
UPDATE, VERSION = "/update_weights_from_store", "/weight_version"
CHECKSUM, CHECK = "/get_weights_checksum", "/update_weights_from_tensor_checker"
SLEEP, WAKE, SLEEPING = "/sleep", "/wake_up", "/is_sleeping"
HEALTH, METRICS = "/health", "/metrics"
X = torch.linspace(-1, 1, 8).reshape(1, 8)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval().requires_grad_(False)


class Engine:
    """A served engine of two components; its own endpoint runs the first."""

    def __init__(self, store: Store, max_body: int = 100_000) -> None:
        self.store = store
        self.model = fresh_model()
        self.modules = {"transformer": net(), "vae": net(1)}
        self.hook = EngineHook.attach(store, self.model, self.modules, tag="policy", backend=Faulty())
        self.controls = Controls(self.hook)
        routes = [Route("/generate", self.generate, methods=["POST"])]
        routes += control_routes(self.controls, max_body=max_body)
        self.app = handle_asleep(Starlette(routes=routes))
        self.client: Client

    def generate(self, request: Request) -> Response:
        with self.controls.generation() as version:
            return JSONResponse({"version": version, "image": self.modules["transformer"](X).tolist()})

    def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        return self.client.post(path, body)

    def get(self, path: str, body: Any = None) -> tuple[int, Any]:
        return self.client.get(path, body)

    def publish(self, seed: int, **how: Any) -> int:
        modules = {"transformer": net(seed)}
        return publish(self.store, self.model, modules, "policy", components=["transformer"], **how)

    def broken(self) -> None:
        """Have a refit of the awake engine fail half way."""
        self.publish(7)
        self.hook.backend.fail = {"update": 1}  # type: ignore[attr-defined]
        assert self.post(UPDATE)[0] == 500
        assert self.hook.state is State.BROKEN

    def metric(self, name: str) -> float:
        status, text = self.get(METRICS)
        assert status == 200
        found = [
            line for line in text.decode().splitlines() if line.startswith(f"weightstore_engine_{name} ")
        ]
        assert len(found) == 1, (name, text.decode())
        return float(found[0].rsplit(" ", 1)[1])

    @contextmanager
    def generating(self) -> Iterator[None]:
        """A generation in flight, for as long as the block lasts."""
        inside, over = threading.Event(), threading.Event()

        def generate() -> None:
            with self.controls.generation():
                inside.set()
                over.wait(PATIENCE)

        thread = threading.Thread(target=generate)
        thread.start()
        assert inside.wait(PATIENCE)
        try:
            yield
        finally:
            over.set()
            thread.join(PATIENCE)


@contextmanager
def serving(store: Store) -> Iterator[Engine]:
    engine = Engine(store)
    with engine.hook, Serving(engine.app) as engine.client:
        yield engine


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with weightstore.local_store(capacity="64MiB", window="8MiB") as store:
        yield store


@pytest.fixture
def engine(store: Store) -> Iterator[Engine]:
    with serving(store) as engine:
        yield engine


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[Engine]:
    """An engine whose store was killed."""
    with Service(tmp_path) as service, service.connect() as store, serving(store) as engine:
        service.kill()
        pause = threading.Event()
        while store.link.connection is not None:
            pause.wait(0.01)
        yield engine


# -- it works, and works again -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_release_and_resume(engine: Engine, method: str) -> None:
    status, body = engine.client(method, RELEASE)
    assert (status, body["success"], body["sleeping"]) == (200, True, True)
    assert "the store keeps the weights" in body["message"]
    assert body["freed_bytes"] == engine.controls.last["sleep"].freed_bytes  # type: ignore[union-attr]
    assert engine.hook.state is State.ASLEEP
    status, body = engine.client(method, RESUME)
    assert (status, body["success"], body["sleeping"]) == (200, True, False)
    assert body["message"] == "resumed on version 1"
    assert engine.hook.state is State.AWAKE
    assert engine.hook.verify().ok


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_release_and_resume_by_tags(engine: Engine, method: str) -> None:
    assert engine.client(method, RELEASE, {"tags": ["vae", "kv_cache"]})[1]["components"] == ["vae"]
    assert engine.hook.states == {"transformer": State.AWAKE, "vae": State.ASLEEP}
    assert engine.client(method, RESUME, {"tags": ["weights"]})[1]["components"] == ["vae"]
    assert engine.hook.state is State.AWAKE


def test_repeated_release_and_resume(engine: Engine) -> None:
    for path, message, sleeping in ((RELEASE, "already sleeping", True), (RESUME, "already awake", False)):
        assert engine.post(path)[0] == 200
        status, body = engine.post(path)
        facts = {key: body[key] for key in ("success", "sleeping", "message")}
        assert (status, facts) == (200, {"success": True, "sleeping": sleeping, "message": message})


def test_update_and_repeated_update(engine: Engine) -> None:
    engine.publish(2)
    asked = {"model": engine.model, "tag": "policy", "version": 2}
    status, body = engine.post(UPDATE, asked)
    assert (status, body["success"], body["version"], body["previous"]) == (200, True, 2, 1)
    assert torch.equal(engine.modules["transformer"](X), net(2)(X))
    status, body = engine.post(UPDATE, asked)
    assert (status, body["success"], body["copied_bytes"]) == (200, True, 0)
    assert body["message"].endswith("no tensor changed")
    assert engine.post(UPDATE)[0] == 200  # no body: whatever the tag names


def test_update_while_asleep_takes_effect_at_resume(engine: Engine) -> None:
    engine.post(RELEASE)
    engine.publish(3)
    status, body = engine.post(UPDATE, {"version": 2})
    assert (status, body["success"], body["sleeping"], body["version"]) == (200, True, True, 2)
    assert "will wake on version 2" in body["message"]
    assert engine.post(RESUME)[1]["version"] == 2
    assert torch.equal(engine.modules["transformer"](X), net(3)(X))


def test_checksum_and_repeated_checksum(engine: Engine) -> None:
    expected = {"transformer": module_checksum(net()), "vae": module_checksum(net(1))}
    for _ in range(2):
        assert engine.post(CHECKSUM) == (200, expected)
        assert engine.post(CHECKSUM, {"module_names": None}) == (200, expected)
    asked = {"module_names": ["vae", "text_encoder"]}
    assert engine.post(CHECKSUM, asked) == (200, {"vae": expected["vae"], "text_encoder": "not_found"})
    assert engine.post(CHECKSUM, {"module_names": []}) == (200, {})


def test_check_and_repeated_check(engine: Engine) -> None:
    asked = {
        "target_module": "vae",
        "expected_named_tensors_sha256": tensor_checksums(net(1), ["0.weight", "1.bias"]),
    }
    for _ in range(2):
        assert engine.post(CHECK, asked) == (
            200,
            {"success": True, "message": "2 tensors of vae as expected"},
        )
    status, body = engine.post(CHECK, asked | {"target_module": "transformer"})
    assert (status, body["success"]) == (400, False)
    assert "other bytes in 0.weight" in body["message"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_weight_version(engine: Engine, method: str) -> None:
    facts = {"model": engine.model, "tag": "policy", "sleeping": False}
    for version in (1, 2):
        expected = {"weight_version": str(version), "version": version, **facts}
        for _ in range(2):
            assert engine.client(method, VERSION) == (200, expected)
        engine.publish(2)
        engine.post(UPDATE)


def test_sleep_and_wake_up_and_both_repeated(engine: Engine) -> None:
    for path in (SLEEP, f"{SLEEP}?level=1", f"{SLEEP}?level=2&mode=wait"):
        for _ in range(2):
            assert engine.post(path) == (200, None)
            assert engine.get(SLEEPING) == (200, {"is_sleeping": True})
        for _ in range(2):
            assert engine.post(WAKE) == (200, None)
            assert engine.get(SLEEPING) == (200, {"is_sleeping": False})


def test_wake_up_by_tags(engine: Engine) -> None:
    engine.post(SLEEP)
    assert engine.post(f"{WAKE}?tags=kv_cache") == (200, None)
    assert engine.hook.state is State.ASLEEP
    assert engine.post(f"{WAKE}?tags=vae&tags=kv_cache") == (200, None)
    assert engine.hook.states == {"transformer": State.ASLEEP, "vae": State.AWAKE}
    assert engine.get(SLEEPING) == (200, {"is_sleeping": True})
    assert engine.post(f"{WAKE}?tags=weights") == (200, None)
    assert engine.get(SLEEPING) == (200, {"is_sleeping": False})


def test_health_and_repeated_health(engine: Engine) -> None:
    for state in ("awake", "asleep"):
        expected = {"status": "ok", "state": state, "components": dict.fromkeys(engine.modules, state)}
        for _ in range(2):
            assert engine.get(HEALTH) == (200, expected | {"version": 1})
        engine.post(RELEASE)


def test_metrics_and_repeated_metrics(engine: Engine) -> None:
    engine.post(RELEASE)
    engine.post(RELEASE)
    for _ in range(2):
        assert engine.metric('operations_total{operation="sleep",outcome="done"}') == 1
        assert engine.metric('operations_total{operation="sleep",outcome="repeated"}') == 1
        assert engine.metric('state{component="vae",state="asleep"}') == 1
        assert engine.metric("store_connected") == 1


# -- the engine is in another state --------------------------------------------------------------------


@pytest.mark.parametrize("path", [RELEASE, SLEEP])
def test_sleep_gives_up_on_generations_that_do_not_end(engine: Engine, path: str) -> None:
    engine.hook.drain_timeout = 0.05
    with engine.generating():
        status, body = engine.post(path)
    assert status == 400
    assert "generations were still running" in str(body)
    assert engine.get(SLEEPING) == (200, {"is_sleeping": False})
    assert engine.post(path)[0] == 200


@pytest.mark.parametrize("path", [RESUME, WAKE])
def test_nobody_wakes_on_a_torn_tag(engine: Engine, path: str) -> None:
    engine.post(RELEASE)
    with engine.store.refit(engine.model, tag="policy", components=["transformer"], in_place=True) as refit:
        status, body = engine.post(path)
        assert status == 400
        assert "in-place refit" in str(body) or "torn" in str(body)
        assert engine.get(SLEEPING) == (200, {"is_sleeping": True})
        assert engine.post(UPDATE)[0] == 400
        refit.put_module(net(4), prefix="transformer.")
    assert engine.post(path)[0] == 200
    assert torch.equal(engine.modules["transformer"](X), net(4)(X))


def test_update_of_a_broken_engine_says_to_wake_it(engine: Engine) -> None:
    engine.broken()
    status, body = engine.post(UPDATE)
    assert (status, body["success"]) == (400, False)
    assert "wake()" in body["message"]
    assert engine.post(RESUME)[0] == 200  # which fills it anew
    assert engine.hook.verify().ok


def test_update_to_something_the_engine_does_not_follow(engine: Engine) -> None:
    for asked in ({"model": "other"}, {"tag": "ema"}, {"version": 9}):
        status, body = engine.post(UPDATE, asked)
        assert (status, body["success"], body["version"]) == (400, False, 1)


@pytest.mark.parametrize("asked", [{}, {"module_names": ["vae"]}])
def test_checksums_need_the_weights_on_the_device(engine: Engine, asked: dict[str, Any]) -> None:
    engine.post(RELEASE, {"tags": ["vae"]})
    status, body = engine.post(CHECKSUM, asked)
    assert (status, list(body)) == (400, ["error"])
    assert "vae" in body["error"]
    assert engine.post(CHECKSUM, {"module_names": ["transformer"]})[0] == 200


def test_a_check_needs_the_weights_on_the_device(engine: Engine) -> None:
    asked = {
        "target_module": "transformer",
        "expected_named_tensors_sha256": tensor_checksums(net(), ["0.weight"]),
    }
    engine.post(RELEASE)
    status, body = engine.post(CHECK, asked)
    assert (status, body["success"]) == (400, False)
    assert "not on the device" in body["message"]
    engine.post(RESUME)
    assert engine.post(CHECK, asked)[0] == 200


def test_what_a_broken_engine_says_of_itself(engine: Engine) -> None:
    engine.broken()
    status, body = engine.get(HEALTH)
    assert (status, body["status"], body["state"]) == (503, "unhealthy", "broken")
    assert engine.get(SLEEPING) == (200, {"is_sleeping": False})
    assert engine.post(VERSION)[0] == 200
    assert engine.metric('state{component="transformer",state="broken"}') == 1
    assert engine.post("/generate")[0] == 503
    assert engine.post(CHECKSUM)[0] == 400
    assert engine.post(WAKE) == (200, None)
    assert engine.get(HEALTH)[0] == 200


def test_weight_version_while_asleep_is_what_a_wake_brings(engine: Engine) -> None:
    engine.post(RELEASE)
    engine.publish(2)
    engine.post(UPDATE)
    status, body = engine.get(VERSION)
    assert (status, body["version"], body["sleeping"]) == (200, 2, True)


# -- bad requests --------------------------------------------------------------------------------------

BAD = {
    "cut off": b'{"tags": ["we',
    "a list": b"[]",
    "a number": b"7",
    "not UTF-8": b'{"\xff": 1}',
    "too deep": b'{"a": ' * 9_000 + b"1" + b"}" * 9_000,
    "pickle": b"\x80\x04N.",
}
MISTYPED: dict[str, list[dict[str, Any]]] = {
    RELEASE: [{"tags": "weights"}, {"tags": [1]}, {"tags": {"weights": True}}, {"tags": ["nonsense"]}],
    RESUME: [{"tags": "weights"}, {"tags": [None]}, {"tags": ["nonsense"]}],
    UPDATE: [{"model": 1}, {"version": "2"}, {"version": True}, {"version": 1.5}, {"vresion": 2}],
    CHECKSUM: [{"module_names": "vae"}, {"module_names": [1]}],
    CHECK: [
        {},
        {"target_module": "vae"},
        {"target_module": "vae", "expected_named_tensors_sha256": {}},
        {"target_module": "vae", "expected_named_tensors_sha256": ["0.weight"]},
        {"target_module": "vae", "expected_named_tensors_sha256": {"0.weight": 1}},
        {"target_module": "nobody", "expected_named_tensors_sha256": {"0.weight": "00"}},
        {"expected_named_tensors_sha256": {"0.weight": "00"}},
    ],
}


def said(path: str, body: dict[str, Any]) -> str:
    """The message of a refusal, in the endpoint's shape."""
    if path == CHECKSUM:
        assert list(body) == ["error"]
        return str(body["error"])
    assert body["success"] is False
    return str(body["message"])


@pytest.mark.parametrize("path", MISTYPED)
def test_a_body_that_is_no_json_object(engine: Engine, path: str) -> None:
    for kind, bad in BAD.items():
        status, body = engine.post(path, bad)
        assert status == 400, kind
        assert "JSON object" in said(path, body), kind
    assert engine.hook.state is State.AWAKE


@pytest.mark.parametrize("path", MISTYPED)
def test_a_body_with_wrong_fields(engine: Engine, path: str) -> None:
    for asked in MISTYPED[path]:
        status, body = engine.post(path, asked)
        assert status == 400, asked
        assert said(path, body), asked
    assert engine.hook.state is State.AWAKE
    assert engine.hook.version == 1


def test_what_nobody_knows_is_repeated_in_a_line_of_bounded_length(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    status, body = engine.post(RELEASE, {"tags": ["a\nERROR forged", *map(str, range(900))]})
    assert status == 400 and "no component 0, 1, 10, 100, 101 and 896 more" in body["message"]
    assert "\n" not in engine.post(RELEASE, {"tags": ["a\nERROR forged"]})[1]["message"]
    for path, fields in (
        (RELEASE, {"tags": ["a" * 513]}),
        (RELEASE, {"tags": ["a"] * 1001}),
        (UPDATE, {"model": "a" * 513}),
        (CHECKSUM, {"module_names": ["a" * 513]}),
        (CHECK, {"target_module": "a" * 513, "expected_named_tensors_sha256": {"a": "b"}}),
        (CHECK, {"target_module": "transformer", "expected_named_tensors_sha256": {"a" * 513: "b"}}),
    ):
        status, body = engine.post(path, fields)
        assert status == 400 and len(str(body)) < 200, path
    assert engine.hook.state is State.AWAKE
    assert all(
        len(record.getMessage()) < 400 and "\n" not in record.getMessage() for record in caplog.records
    )


def test_required_fields_are_named_as_sglang_names_them(engine: Engine) -> None:
    assert engine.post(CHECK, {})[1] == {"success": False, "message": "target_module is required"}
    body = engine.post(CHECK, {"target_module": "vae"})[1]
    assert body == {"success": False, "message": "expected_named_tensors_sha256 is required"}


@pytest.mark.parametrize("path", MISTYPED)
def test_a_body_that_is_too_large_is_not_read_to_its_end(engine: Engine, path: str) -> None:
    status, body = engine.post(path, b" " * 100_001)
    assert status == 413
    assert "more than 100000 bytes" in said(path, body)
    assert engine.hook.state is State.AWAKE


@pytest.mark.parametrize("path", [RELEASE, RESUME, CHECKSUM])
def test_null_and_fields_of_other_servers_are_no_mistake(engine: Engine, path: str) -> None:
    assert engine.post(path, b"null")[0] == 200
    assert engine.post(path, {"rid": "abc", "flush_cache": True})[0] == 200


def test_sleep_levels_that_are_none(engine: Engine) -> None:
    for level in ("0", "3", "-1", "one", "1.0", "", "²", "1" * 5_000):
        status, body = engine.post(f"{SLEEP}?level={quote(level)}")
        assert status == 400, level
        assert "level" in body["error"]["message"]
    assert engine.get(SLEEPING) == (200, {"is_sleeping": False})


def test_wake_up_with_a_tag_nobody_knows(engine: Engine) -> None:
    engine.post(SLEEP)
    status, body = engine.post(f"{WAKE}?tags=nonsense")
    assert status == 400
    assert "no component nonsense" in body["error"]["message"]
    assert engine.get(SLEEPING) == (200, {"is_sleeping": True})


@pytest.mark.parametrize(
    ("method", "paths"),
    [
        ("GET", [UPDATE, CHECKSUM, CHECK, SLEEP, WAKE]),
        ("POST", [SLEEPING, HEALTH, METRICS]),
        ("DELETE", [RELEASE, RESUME, VERSION]),
        ("HEAD", [RELEASE, RESUME, UPDATE, CHECKSUM, CHECK, SLEEP, WAKE]),
    ],
)
def test_other_methods(engine: Engine, method: str, paths: list[str]) -> None:
    for path in paths:
        assert engine.client(method, path)[0] == 405, path
    assert engine.hook.state is State.AWAKE


# -- the store is down ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("release", "resume"), [(RELEASE, RESUME), (SLEEP, WAKE)])
def test_sleep_and_wake_go_on_without_a_store(orphan: Engine, release: str, resume: str) -> None:
    for _ in range(2):
        assert orphan.post(release)[0] == 200
    assert orphan.hook.state is State.ASLEEP
    for _ in range(2):
        assert orphan.post(resume)[0] == 200
    assert orphan.hook.state is State.AWAKE
    assert torch.equal(orphan.modules["transformer"](X), net()(X))


@pytest.mark.parametrize("asleep", [False, True])
def test_an_update_without_a_store_says_what_is_wrong(orphan: Engine, asleep: bool) -> None:
    if asleep:
        orphan.post(RELEASE)
    for _ in range(2):
        status, body = orphan.post(UPDATE)
        assert (status, body["success"], body["version"], body["sleeping"]) == (503, False, 1, asleep)
        assert orphan.store.socket in body["message"]
        assert "weightstore serve" in body["message"]


def test_checksum_and_check_without_a_store(orphan: Engine) -> None:
    assert orphan.post(CHECKSUM, {"module_names": ["vae"]}) == (200, {"vae": module_checksum(net(1))})
    digests = tensor_checksums(net(), ["0.weight"])
    asked = {"target_module": "transformer", "expected_named_tensors_sha256": digests}
    assert orphan.post(CHECK, asked)[0] == 200


def test_what_an_engine_says_of_itself_without_a_store(orphan: Engine) -> None:
    assert orphan.post(VERSION)[1]["version"] == 1
    assert orphan.get(SLEEPING) == (200, {"is_sleeping": False})
    assert orphan.get(HEALTH)[0] == 200
    assert orphan.metric("store_connected") == 0
    assert orphan.post("/generate")[0] == 200


# -- requests beside each other ------------------------------------------------------------------------


def test_generations_while_asleep_are_a_400_in_sglangs_shape(engine: Engine) -> None:
    before = engine.post("/generate")
    engine.post(RELEASE)
    status, body = engine.post("/generate")
    assert (status, list(body)) == (400, ["detail"])
    assert "the server is sleeping; call resume_memory_occupation first" in body["detail"]
    engine.post(RESUME)
    assert engine.post("/generate") == before


def test_a_release_waits_for_generations_and_the_server_goes_on_answering(engine: Engine) -> None:
    with ThreadPoolExecutor(8) as pool, ExitStack() as generating:
        generating.enter_context(engine.generating())
        release = pool.submit(engine.post, RELEASE)
        while engine.hook._drain._drainer is None:  # until it waits
            threading.Event().wait(0.01)
        late = [pool.submit(engine.post, "/generate") for _ in range(4)]
        assert engine.get(HEALTH)[0] == 200
        assert engine.get(SLEEPING) == (200, {"is_sleeping": False})
        assert engine.get(METRICS)[0] == 200
        assert not release.done()
        generating.close()
        assert release.result(PATIENCE)[1]["message"].startswith("released")
        # Those that came after it waited for its end, and are refused: there is nothing to run on.
        assert [answer.result(PATIENCE)[0] for answer in late] == [400] * 4


def test_many_clients_at_once(engine: Engine) -> None:
    expected = net()(X).tolist()
    calls = [(RELEASE, None), (RESUME, None), (UPDATE, None), ("/generate", None), (CHECKSUM, None)] * 8
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda call: (call[0], engine.post(*call)), calls))
    for path, (status, body) in answers:
        assert status in ((200, 400) if path in ("/generate", CHECKSUM) else (200,)), (path, body)
        if path == "/generate" and status == 200:
            assert body["image"] == expected
    assert engine.post(RESUME)[0] == 200
    assert engine.hook.verify().ok


# -- mounting ------------------------------------------------------------------------------------------


def test_mounted_under_fastapi(store: Store) -> None:
    modules = {"net": net()}
    with EngineHook.attach(store, fresh_model(), modules) as hook:
        controls = Controls(hook)
        app = handle_asleep(FastAPI())

        @app.post("/generate")
        def generate(seed: int = 0) -> dict[str, Any]:
            with controls.generation():
                return {"image": modules["net"](X + seed).tolist()}

        app.router.routes.extend(control_routes(controls, health=False, metrics=False))

        @app.get(HEALTH)
        def health() -> dict[str, str]:
            return {"whose": "the server's own"}

        with Serving(app) as client:
            assert client.post("/generate?seed=1")[0] == 200
            assert client.post(RELEASE, {"tags": ["weights"]})[1]["message"].startswith("released")
            assert client.post("/generate")[0] == 400
            assert client.get(HEALTH) == (200, {"whose": "the server's own"})
            assert client.get(METRICS)[0] == 404
            assert client.post(RESUME)[0] == 200
            assert client.post("/generate")[0] == 200


def test_the_app_alone_and_mounted_at_a_path(store: Store) -> None:
    with EngineHook.attach(store, fresh_model(), {"net": net()}) as hook:
        with Serving(control_app(hook)) as client:
            assert client.get(HEALTH)[0] == 200
        with Serving(Starlette(routes=[Mount("/control", control_app(Controls(hook)))])) as client:
            assert client.post(f"/control{RELEASE}")[0] == 200
            assert client.post(RELEASE)[0] == 404


def test_without_starlette_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "engine_hooks.integrations.http")
    with pytest.raises(DependencyMissing, match=r"weightstore\[http\]"):
        importlib.import_module("engine_hooks.integrations.http")


# -- a server process ----------------------------------------------------------------------------------


class SGLangClient:
    """What a trainer written for SGLang Diffusion does: it knows nothing of a store."""

    def __init__(self, port: int) -> None:
        self._call = Client(port)

    def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        status, answer = self._call.post(path, body)
        if status != 200:
            raise RuntimeError(status, answer)
        assert isinstance(answer, dict)
        return answer

    def generate(self, prompt: str, seed: int) -> str:
        answer = self._post("/v1/images/generations", {"prompt": prompt, "seed": seed})
        return str(answer["data"][0]["b64_json"])

    def release_memory_occupation(self) -> None:
        answer = self._post(RELEASE, {})
        assert answer["success"] and answer["sleeping"], answer

    def resume_memory_occupation(self) -> None:
        answer = self._post(RESUME, {})
        assert answer["success"] and not answer["sleeping"], answer

    def checksums(self, names: list[str] | None = None) -> dict[str, Any]:
        return self._post(CHECKSUM, {"module_names": names})

    def check(self, module: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        digests = {}
        for name, tensor in tensors.items():
            total = hashlib.sha256(str(tensor.dtype).encode())
            total.update(repr(tuple(tensor.shape)).encode())
            total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            digests[name] = total.hexdigest()
        return self._post(CHECK, {"target_module": module, "expected_named_tensors_sha256": digests})


def digest_of(module: nn.Module) -> str:
    """A module's checksum, as a trainer computes it for comparison."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.named_parameters()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums come out the same in another process if both use as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def server(store: Store) -> Iterator[tuple[str, SGLangClient]]:
    """The model's name, and a client of a process that serves it."""
    model = fresh_model()
    command = [sys.executable, str(Path(serving_process.__file__)), store.socket, model]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield model, SGLangClient(int(process.stdout.readline()))
        finally:
            process.stdin.close()
            try:
                assert process.wait(PATIENCE) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def test_a_client_written_for_sglang_works_unchanged(
    store: Store, server: tuple[str, SGLangClient], one_thread: None
) -> None:
    model, client = server
    reference = tiny_pipelines.build(serving_process.KIND)
    parts = tiny_pipelines.modules_of(reference)

    def expected(seed: int) -> str:
        return serving_process.encode(tiny_pipelines.generate(reference, "a cat", seed))

    first = client.generate("a cat", seed=1)
    assert first == expected(1)
    assert client.checksums() == {name: digest_of(part) for name, part in parts.items()}
    with pytest.raises(RuntimeError, match="400") as refused:
        client.check("transformer", {"nothing.weight": torch.zeros(1)})
    assert "nothing.weight" in str(refused.value)

    for step in range(2):
        client.release_memory_occupation()
        client.release_memory_occupation()
        with pytest.raises(RuntimeError, match="400") as refused:
            client.generate("a cat", seed=1)
        assert "sleeping" in str(refused.value)

        # The trainer's step. It writes to the store, and the client says nothing of that but this one call.
        trained = parts["transformer"]
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.mul_(1.05 + step)
        with store.refit(model, tag="policy", components=["transformer"]) as refit:
            refit.put_module(trained, prefix="transformer.")
        client._post(UPDATE, {"model": model, "tag": "policy", "version": refit.report.version})

        client.resume_memory_occupation()
        client.resume_memory_occupation()
        image = client.generate("a cat", seed=1)
        assert image == expected(1)
        assert image != first
        assert client.checksums(["transformer", "nobody"]) == {
            "transformer": digest_of(trained),
            "nobody": "not_found",
        }
        tensors = {name: tensor for name, tensor in trained.named_parameters() if "proj_out" in name}
        assert client.check("transformer", tensors)["success"]

    with pytest.raises(RuntimeError, match="400"):
        client.check("transformer", {name: tensor + 1 for name, tensor in tensors.items()})


def test_the_page_says_what_happens(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    namespace: dict[str, Any] = {"store": store, "pipe": tiny_pipelines.build("flux")}
    namespace["trained"] = tiny_pipelines.build("flux", seed=1).transformer
    namespace["draw"] = tiny_pipelines.generate
    with ExitStack() as stack:

        def serve(app: Any, host: str, port: int) -> None:
            stack.callback(namespace["hook"].close)
            client = stack.enter_context(Serving(app))
            namespace["url"] = f"http://{host}:{client.port}"
            status, body = client.post("/generate?prompt=cat")
            assert (status, body) == (200, {"version": 1, "pixels": [1, 3, 16, 16]})

        monkeypatch.setattr("uvicorn.run", serve)
        assert run_page(DOCS / "integrations" / "http.md", namespace, tmp_path, json_as="") == 5
