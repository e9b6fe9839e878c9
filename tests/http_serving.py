"""A real HTTP server in a thread, and a plain client for it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from types import TracebackType
from typing import Any

import uvicorn

PATIENCE = 60.0


class Client:
    """One request for each call, on a connection of its own; a body is given as bytes or as JSON."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The status, and the answer: decoded if it is JSON, None if there is none, else its bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            headers = {} if data is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            content = answer.read()
            if (answer.getheader("Content-Type") or "").startswith("application/json"):
                return answer.status, json.loads(content)
            return answer.status, content or None
        finally:
            connection.close()

    def get(self, path: str, body: Any = None) -> tuple[int, Any]:
        return self("GET", path, body)

    def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        return self("POST", path, body)


class Serving:
    """`with Serving(app) as client`: an ASGI application behind uvicorn, on a free port of this machine."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Client:
        self._thread.start()
        # Connections wait in the socket's queue until the server takes them: no need to wait for it.
        return Client(self._socket.getsockname()[1])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        self._socket.close()
        assert not self._thread.is_alive()
