"""An appliance of canned answers: the admin API on a unix socket, the OpenAI API on loopback, one thread each.

A reply is (status, body): a dict is sent as JSON, a list as JSON lines, a string as it is. `requests` holds what came in.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer, ThreadingMixIn, UnixStreamServer
from typing import Any

import tomli_w

from appliance.config import admin_socket, client_file

API_KEY = "kvctl-test-key"
Reply = tuple[int, "dict[str, Any] | list[dict[str, Any]] | str"]


@dataclass
class FakeAppliance:
    home: Path
    base_url: str = ""
    replies: dict[str, Reply | Callable[[Any], Reply]] = field(default_factory=dict)
    """By "METHOD /path"; a function makes them of the body."""
    requests: list[tuple[str, dict[str, Any] | None]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def body_of(self, route: str) -> dict[str, Any] | None:
        return next(body for seen, body in self.requests if seen == route)


class _Unix(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


def _handler(fake: FakeAppliance) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def address_string(self) -> str:
            return "test"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            route = f"{self.command} {self.path}"
            asked = json.loads(self.rfile.read(length)) if length else None
            fake.requests.append((route, asked))
            fake.keys.append(self.headers.get("authorization", ""))
            missing: Reply = (404, {"error": {"message": f"no canned reply for {route}"}})
            reply = fake.replies.get(route, missing)
            status, body = reply(asked) if callable(reply) else reply
            if isinstance(body, list):
                text = "".join(json.dumps(line) + "\n" for line in body)
            else:
                text = json.dumps(body) if isinstance(body, dict) else body
            data = text.encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer

    return Handler


def initialise(home: Path, base_url: str) -> None:
    """What `kvctl init` leaves for a client."""
    home.mkdir(parents=True, exist_ok=True)
    client_file(home).write_bytes(tomli_w.dumps({"base_url": base_url, "api_key": API_KEY}).encode())


@contextmanager
def _running(server: BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def fake_appliance(home: Path) -> Iterator[FakeAppliance]:
    fake = FakeAppliance(home)
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake)) as public:
        fake.base_url = f"http://127.0.0.1:{public.server_port}/v1"
        initialise(home, fake.base_url)
        with _Unix(str(admin_socket(home)), _handler(fake)) as admin, _running(public), _running(admin):
            yield fake


def sse(chunks: list[dict[str, Any]]) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
