"""Synchronous clients: the admin API over the unix socket, the OpenAI API over HTTP.

Invariant: what goes wrong here is an exception of the tree in appliance.errors (or ApiError) with one line that says what
to do; nothing of httpx escapes. Main thread only. Imported by commands when they run: httpx is not loaded for --help.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import httpx
import tomli
from pydantic import BaseModel, ValidationError

from appliance.api import control
from appliance.api.trace import TraceEvent, TraceHeader
from appliance.config import admin_socket, client_file
from appliance.errors import KeyringError, NotInitialised, NotRunning, Overloaded, RequestError, UsageError
from kvctl.diagnostics import ApiError

CONNECT_S = 5.0
ADMIN_S = 120.0
"""Longest silence of the admin API: between two progress lines a block is moved or a chunk prefilled."""

C = TypeVar("C", bound="_Client")
M = TypeVar("M", bound=BaseModel)


class _Client:
    """HTTP whose failures are ours. `absent` makes the error for nobody listening."""

    def __init__(self, http: httpx.Client, absent: Callable[[], Exception]) -> None:
        self._http = http
        self._absent = absent

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._open(method, path, body) as response:
            response.read()
            return _json(response.text)

    def _lines(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[str]:
        with self._open(method, path, body, headers) as response:
            yield from response.iter_lines()

    @contextmanager
    def _open(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, path, json=body, headers=headers) as response:
                if response.is_error:
                    response.read()
                    raise _refusal(response)
                yield response
        except httpx.ConnectError:
            raise self._absent() from None
        except httpx.TimeoutException:
            raise ApiError("the appliance did not answer in time; look at `kvctl status` and its log") from None
        except httpx.TransportError:
            raise ApiError("the appliance closed the connection; look at `kvctl status` and its log") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ApiError(
            "the appliance sent something that is not JSON; are kvctl and the appliance of one version?"
        ) from None


def _refusal(response: httpx.Response) -> Exception:
    try:
        error = response.json()["error"]
        message = str(error["message"])
    except (ValueError, KeyError, TypeError):
        return ApiError(f"HTTP {response.status_code} from {response.url.host}: not the answer of an appliance")
    status = response.status_code
    if status == HTTPStatus.UNAUTHORIZED:
        return ApiError(f"{message}; the key comes from client.toml in the home")
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        after = response.headers.get("retry-after", "")
        return Overloaded(message, retry_after_s=float(after) if after.isdigit() else 1.0, status=status)
    if 400 <= status < 500:
        return RequestError(message, param=error.get("param"), code=error.get("code"), status=status)
    return ApiError(message)


class AdminClient(_Client):
    """One method per operation of appliance/api/control.py. NotRunning or NotInitialised if nobody answers."""

    def __init__(self, home: Path) -> None:
        _knock(home)
        transport = httpx.HTTPTransport(uds=str(admin_socket(home)))
        timeout = httpx.Timeout(ADMIN_S, connect=CONNECT_S)
        client = httpx.Client(transport=transport, base_url="http://appliance", timeout=timeout)
        super().__init__(client, lambda: _absent(home))

    def look(self) -> control.Status | control.Loading:
        tree = self._request("GET", "/v1/admin/status")
        loading = isinstance(tree, dict) and tree.get("state") == "loading"
        return _parse(control.Loading, tree) if loading else _parse(control.Status, tree)

    def status(self) -> control.Status:
        """Of an appliance that serves. Overloaded while it is loading."""
        found = self.look()
        if isinstance(found, control.Loading):
            raise Overloaded(f"the appliance is {found.progress}", retry_after_s=1, status=503)
        return found

    def store(self) -> control.StoreOverview:
        return _parse(control.StoreOverview, self._request("GET", "/v1/admin/store"))

    def requests(self, call_id: str | None = None) -> control.RequestList:
        """The last ones, or those of one API call. RequestError for one that is not known any more."""
        path = "/v1/admin/requests" + (f"/{quote(call_id, safe='')}" if call_id is not None else "")
        return _parse(control.RequestList, self._request("GET", path))

    def sessions(self) -> control.SessionList:
        return _parse(control.SessionList, self._request("GET", "/v1/admin/sessions"))

    def inspect(self, prompt: control.PromptRef) -> control.PromptInspection:
        return _parse(control.PromptInspection, self._request("POST", "/v1/admin/inspect", prompt.model_dump()))

    def prefetch(self, request: control.PrefetchRequest) -> Iterator[control.PrefetchProgress]:
        return self._stream(control.PrefetchProgress, "/v1/admin/prefetch", request)

    def verify(self, request: control.VerifyRequest) -> Iterator[control.VerifyProgress]:
        return self._stream(control.VerifyProgress, "/v1/admin/verify", request)

    def evict(self, tier: Literal["hbm", "dram"]) -> control.EvictResult:
        request = control.EvictRequest(tier=tier)
        return _parse(control.EvictResult, self._request("POST", "/v1/admin/evict", request.model_dump()))

    def trace(self) -> Iterator[TraceHeader | TraceEvent | None]:
        """A header, then each request that ends; None each second without one."""
        kind: type[TraceHeader] | type[TraceEvent] = TraceHeader
        for line in self._lines("GET", "/v1/admin/trace"):
            yield _parse(kind, _or_error(_json(line))) if line else None
            kind = TraceEvent

    def pin(self, prompt: control.PromptRef) -> control.PinResult:
        return _parse(control.PinResult, self._request("POST", "/v1/admin/pin", prompt.model_dump()))

    def unpin(self, prompt: control.PromptRef) -> control.PinResult:
        return _parse(control.PinResult, self._request("POST", "/v1/admin/unpin", prompt.model_dump()))

    def erase(self, prompt: control.PromptRef) -> control.EvictResult:
        return _parse(control.EvictResult, self._request("POST", "/v1/admin/erase", prompt.model_dump()))

    def tenants(self) -> control.TenantList:
        return _parse(control.TenantList, self._request("GET", "/v1/admin/tenants"))

    def set_quota(self, asked: control.TenantQuota) -> control.TenantInfo:
        return _parse(control.TenantInfo, self._request("POST", "/v1/admin/quota", asked.model_dump()))

    def add_tenant(self, request: control.TenantAdd) -> control.TenantAdded:
        return _parse(control.TenantAdded, self._request("POST", "/v1/admin/tenants", request.model_dump()))

    def _stream(self, model: type[M], path: str, body: BaseModel) -> Iterator[M]:
        for line in self._lines("POST", path, body.model_dump()):
            if line:
                yield _parse(model, _or_error(_json(line)))


def _knock(home: Path) -> None:
    """Raises if nobody listens. Not left to httpx, which leaks the socket of a failed connect."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(admin_socket(home)))
        except PermissionError:
            raise UsageError(f"{home} belongs to another user; run kvctl as the user who runs the appliance") from None
        except OSError:
            raise _absent(home) from None


def _absent(home: Path) -> Exception:
    """Why nobody answers on this home, and what to type."""
    if not client_file(home).exists():
        return NotInitialised(f"{home} is not initialised; run: kvctl init")
    return NotRunning(f"no appliance is running on {home}; start one with: kvctl serve")


def _parse(model: type[M], tree: Any) -> M:
    try:
        return model.model_validate(tree)
    except ValidationError:
        raise ApiError("kvctl does not understand the answer; are kvctl and the appliance of one version?") from None


def _or_error(tree: Any) -> Any:
    """A stream's last item may be an error instead."""
    if isinstance(tree, dict) and isinstance(tree.get("error"), dict):
        raise ApiError(str(tree["error"].get("message", "the appliance failed")))
    return tree


@dataclass(frozen=True)
class Answer:
    """A whole answer. Times are the client's own, but load_s, which is the appliance's."""

    text: str
    ttft_s: float
    """From sending the request to the first text."""
    seconds: float
    """From sending the request to the last token."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str | None
    load_s: float
    """What staging and restoring took."""
    explained: dict[str, Any]
    """What the appliance says of it: X-Kvctl-Explain."""

    @property
    def step_s(self) -> float:
        """Per token after the first; 0 when there was only one."""
        return (self.seconds - self.ttft_s) / (self.completion_tokens - 1) if self.completion_tokens > 1 else 0.0


def _unheard(text: str) -> None:
    """For callers that want the whole answer only."""


class PublicClient(_Client):
    """The OpenAI API of the appliance, as much of it as `kvctl` needs, with the key of the home's client.toml.

    It is sent to the appliance running on this home; to the base_url of client.toml if none does, as a home may hold
    nothing but the client.toml of an appliance elsewhere.
    """

    def __init__(self, home: Path) -> None:
        base_url, api_key = read_client_file(home)
        try:
            with AdminClient(home) as admin:
                base_url = admin.status().base_url
        except NotRunning:
            pass
        client = httpx.Client(
            base_url=base_url.rstrip("/").removesuffix("/v1"),
            headers={"authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            trust_env=False,
        )
        super().__init__(client, lambda: NotRunning(f"nothing answers at {base_url}; start it with: kvctl serve"))

    def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self._request("POST", "/tokenize", {"content": text})["tokens"]
        return tokens

    def chat(
        self, messages: list[dict[str, Any]], *, on_text: Callable[[str], None] = _unheard, **options: Any
    ) -> Answer:
        """`on_text` hears the answer as it comes; `options` go into the request as they are."""
        return self._generate("/v1/chat/completions", {"messages": messages, **options}, on_text)

    def complete(self, prompt: str | list[int], *, on_text: Callable[[str], None] = _unheard, **options: Any) -> Answer:
        return self._generate("/v1/completions", {"prompt": prompt, **options}, on_text)

    def _generate(self, path: str, body: dict[str, Any], on_text: Callable[[str], None]) -> Answer:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        parts: list[str] = []
        last: dict[str, Any] = {}
        finish_reason: str | None = None
        started_s = time.perf_counter()
        first_s = end_s = None
        for line in self._lines("POST", path, body, {"x-kvctl-explain": "1"}):
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = _or_error(_json(line.removeprefix("data: ")))
            last |= {name: chunk[name] for name in ("usage", "kvctl") if chunk.get(name)}
            for choice in chunk.get("choices", ()):
                finish_reason = choice.get("finish_reason") or finish_reason
                text = choice.get("text") or (choice.get("delta") or {}).get("content")
                if text:
                    end_s = time.perf_counter()
                    first_s = first_s or end_s
                    parts.append(text)
                    on_text(text)
        if finish_reason is None:
            raise ApiError("the answer ended early; look at `kvctl status` and the log of the appliance")
        end_s = end_s or time.perf_counter()  # an answer without text
        usage = last.get("usage", {})
        return Answer(
            text="".join(parts),
            ttft_s=(first_s or end_s) - started_s,
            seconds=end_s - started_s,
            prompt_tokens=usage.get("prompt_tokens", 0),
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            finish_reason=finish_reason,
            load_s=last.get("kvctl", {}).get("timings_ms", {}).get("load", 0.0) / 1e3,
            explained=last.get("kvctl", {}),
        )


def read_client_file(home: Path) -> tuple[str, str]:
    """base_url and api_key as `kvctl init` wrote them."""
    path = client_file(home)
    try:
        tree = tomli.loads(path.read_text(encoding="utf-8"))
        return str(tree["base_url"]), str(tree["api_key"])
    except FileNotFoundError:
        raise NotInitialised(f"{home} is not initialised; run: kvctl init") from None
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError, KeyError):
        raise KeyringError(
            f"{path} cannot be read as TOML with base_url and api_key; write it again with: kvctl init"
        ) from None
