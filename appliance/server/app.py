"""The two ASGI applications: the public one (TCP, API keys) and the admin one (unix socket, peer credentials).

Invariant: every public route but /health needs an API key; what tells of all tenants is for the operator's; admin routes
exist on the admin app only. Event loop only.
"""

from __future__ import annotations

from fastapi import Depends, FastAPI
from fastapi.telemetry import TelemetryConfig

from appliance.server import (
    admin_routes,
    anthropic_routes,
    embedding_routes,
    errors,
    kv_routes,
    llama_routes,
    openai_routes,
    responses_routes,
)
from appliance.server.auth import require_key, require_tenant
from appliance.server.base import Admin, Service
from appliance.server.edge import Edge
from appliance.server.metrics import Metrics

NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI would export exception messages and connect to collectors that environment variables name."""


def public_app(service: Service) -> FastAPI:
    app = _app(service.metrics)
    keyed = [Depends(require_key(service.authenticate))]
    app.include_router(openai_routes.router(service), dependencies=keyed)
    app.include_router(anthropic_routes.router(service), dependencies=keyed)
    app.include_router(responses_routes.router(service), dependencies=keyed)
    app.include_router(embedding_routes.router(service), dependencies=keyed)
    app.include_router(kv_routes.router(service), dependencies=keyed)
    app.include_router(llama_routes.router(service), dependencies=keyed)
    operators = [*keyed, Depends(require_tenant(service.operator))]
    app.include_router(llama_routes.metrics_router(service.metrics), dependencies=operators)
    app.include_router(llama_routes.health_router(service.state))
    return app


def admin_app(service: Service, admin: Admin) -> FastAPI:
    app = _app(service.metrics)
    app.include_router(admin_routes.router(admin, service.max_body_bytes))
    app.include_router(llama_routes.metrics_router(service.metrics))
    app.include_router(llama_routes.health_router(service.state))
    return app


def _app(metrics: Metrics) -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, telemetry=NO_TELEMETRY)
    errors.install(app)
    app.add_middleware(Edge, responded=metrics.responded)
    return app
