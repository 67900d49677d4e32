"""Our routes on vLLM's own FastAPI app.

vLLM loads this class through the entry-point group `vllm.endpoint_plugins` when `VLLM_PLUGINS` names it. A route of
ours replaces one of vLLM's with the same path and method, which is meant for `/health`.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.middleware import Middleware
from starlette.routing import Route

from pat_serve.server.engine.baseline import Baseline, available, start_baseline
from pat_serve.server.engine.life import attach
from pat_serve.server.engine.online import Engine
from pat_serve.server.engine.patches import engine_faults, let_engine_errors_through
from pat_serve.server.engine.readiness import Readiness
from pat_serve.server.engine.workers.process_group import ProcessGroup, children
from pat_serve.server.http.access_log import AccessLog, LogFormat, start_log
from pat_serve.server.http.admission import Admission
from pat_serve.server.http.body_check import ModelBounds
from pat_serve.server.http.drain import Drain
from pat_serve.server.http.errors import ErrorBody, ErrorShapeRoute, HttpError, shape_routing_errors, shape_vllm_errors
from pat_serve.server.http.front import Front, Gate, OwnRoutes
from pat_serve.server.http.keys import collect_keys
from pat_serve.server.http.metrics import ServerMetrics
from pat_serve.server.http.observer import Observation, Observer
from pat_serve.server.http.policy import Policy
from pat_serve.server.http.route_names import RouteNames
from pat_serve.server.http.served_routes import keep_served
from pat_serve.server.http.web_page import PageModel, page_router, read_card
from pat_serve.server.routes.benchmark import Benchmark
from pat_serve.server.routes.benchmark_schemas import (
    LatencyRequest,
    LatencyResponse,
    ThroughputRequest,
    ThroughputResponse,
)
from pat_serve.server.routes.exclusive import Exclusive
from pat_serve.server.routes.generate import generate
from pat_serve.server.routes.live_speedup import Side, check_live_speedup
from pat_serve.server.routes.provenance import model_labels
from pat_serve.server.routes.schemas import GenerateRequest, GenerateResponse, HealthResponse, ReadyResponse
from pat_serve.server.routes.speedup_request import LiveSpeedupResult, SpeedupRequest
from pat_serve.server.start.handover import Handover
from pat_serve.version import __version__


class Service:
    """The state that the routes share for as long as the server runs."""

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self.engine = engine
        self.admission = admission
        self.readiness = Readiness(engine)
        self.exclusive = Exclusive(admission)
        # These are the served engine's processes: the baseline has none yet.
        processes = ProcessGroup(children())
        self.side = Side(engine, processes, start_s=processes.age_s())
        self.baseline: Baseline | None = None
        self.last_speedup: LiveSpeedupResult | None = None
        self.card: str | None = None

    @property
    def baseline_engine(self) -> Engine | None:
        """The baseline's engine, dead or alive."""
        return None if self.baseline is None else self.baseline.engine

    def benchmark(self, http: Request) -> Benchmark:
        """A benchmark of the served engine for one request."""
        return Benchmark(engine=self.engine, baseline=self.baseline_engine, exclusive=self.exclusive, http=http)


def _service(request: Request) -> Service:
    service = request.app.state.pat_serve
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(_service)]

# FastAPI's own 422 never leaves these routes, so the schema must not promise it.
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request can never succeed as it stands."},
    "4XX": {"model": ErrorBody},
    "5XX": {"model": ErrorBody},
}

router = APIRouter(route_class=ErrorShapeRoute, responses=_ERRORS, tags=["pat-serve"])

# All benchmarks, and nothing else, are found under this path.
_BENCHMARKS = "/benchmark/"
_STREAM = {"description": "One answer, or a stream of events.", "content": {"text/event-stream": {}}}


@router.post("/generate", response_model=GenerateResponse, responses={200: _STREAM})
async def generate_route(body: GenerateRequest, http: Request, service: ServiceDep) -> Response:
    """Generate text from a prompt, token ids or a conversation; `stream: true` answers with server-sent events."""
    return await generate(service.engine, body, http)


@router.get("/health")
async def health_route() -> HealthResponse:
    """The process is alive. `GET /ready` says whether the engine answers."""
    return HealthResponse(status="alive", version=__version__)


@router.get("/ready")
async def ready_route(service: ServiceDep) -> ReadyResponse:
    """The engine has produced a token lately; 503 with the reason if it has not."""
    if service.admission.draining:
        raise HttpError(503, "not_ready", "the server is stopping")
    baseline = service.baseline if service.exclusive.running else None
    age_s = await service.readiness.check(beside=None if baseline is None else baseline.readiness)
    return ReadyResponse(status="ready", model=service.engine.model_name, last_token_age_s=age_s)


@router.post(f"{_BENCHMARKS}latency")
async def latency_route(body: LatencyRequest, http: Request, service: ServiceDep) -> LatencyResponse:
    """Time batches of random prompts, one after the other. 409 while another benchmark runs or users are served."""
    return await service.benchmark(http).latency(body)


@router.post(f"{_BENCHMARKS}throughput")
async def throughput_route(body: ThroughputRequest, http: Request, service: ServiceDep) -> ThroughputResponse:
    """Keep a number of requests under way and count what comes out. 409 as for latency."""
    return await service.benchmark(http).throughput(body)


@router.post(f"{_BENCHMARKS}speedup")
async def speedup_route(body: SpeedupRequest, http: Request, service: ServiceDep) -> LiveSpeedupResult:
    """Check a claimed speed-up over the baseline: pass, fail or inconclusive. 409 without a baseline."""
    result = await check_live_speedup(service.side, service.baseline, service.exclusive, body, http)
    service.last_speedup = result
    return result


@router.get(f"{_BENCHMARKS}speedup")
async def last_speedup_route(service: ServiceDep) -> LiveSpeedupResult:
    """The result of the last check; 404 before the first."""
    if service.last_speedup is None:
        raise HttpError(404, "not_found", "no speed-up has been checked yet; POST /benchmark/speedup checks one")
    return service.last_speedup


@router.post("/baseline/generate", response_model=GenerateResponse, responses={200: _STREAM})
async def baseline_generate_route(body: GenerateRequest, http: Request, service: ServiceDep) -> Response:
    """Generate as `/generate` does, with the baseline. 409 without a baseline, 503 when it is dead."""
    baseline = available(service.baseline)
    return await generate(baseline.engine, body, http)


@router.get("/page/model")
async def page_model_route(service: ServiceDep) -> PageModel:
    """The facts about the model that the page shows: names, length, card."""
    engines = [service.engine, *([service.baseline_engine] if service.baseline_engine else [])]
    return PageModel(
        model=service.engine.model_name,
        baseline=None if service.baseline is None else service.baseline.engine.model_name,
        max_model_len=service.engine.max_model_len,
        has_chat=all([await engine.has_chat_template() for engine in engines]),
        has_speedup=service.last_speedup is not None,
        card=service.card,
    )


OUR_PATHS = frozenset(route.path for own in (router, page_router()) for route in own.routes if isinstance(route, Route))
OWN_ROUTES = OwnRoutes(
    posts=(
        *(route.path for route in router.routes if isinstance(route, Route) and "POST" in (route.methods or ())),
        _BENCHMARKS,
    ),
    benchmarks=_BENCHMARKS,
)


class PatServePlugin:
    """The entry point: attaches the routes, then gives them the engine."""

    name = "pat_serve"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes to vLLM's app."""
        app.include_router(router)
        app.include_router(page_router())
        app.add_middleware(Front)
        shape_routing_errors(app)
        self._app = app

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Bind the routes to the engine that vLLM has started."""
        # A plain vLLM server that loads this plugin has no launcher of ours: its keys count, and the default bounds.
        handover = Handover.given(args) or Handover(
            policy=Policy(keys=collect_keys(args.api_key or [], environment=dict(os.environ)))
        )
        policy = handover.policy
        engine = attach(engine_client, args, handover.life)
        if warning := engine.vocabulary.warning:
            sys.stderr.write(f"pat-serve: warning: {warning}\n")
        waiting = 4 * engine.max_num_seqs if policy.max_queue is None else policy.max_queue
        admission = Admission(capacity=engine.max_num_seqs + waiting, per_key=policy.max_concurrency_per_key)
        drain = Drain(admission, grace_s=policy.shutdown_timeout_s)
        bounds = ModelBounds(max_model_len=engine.max_model_len, vocab_size=engine.vocab_size)
        service = Service(engine, admission)
        service.card = read_card(args.model)
        if handover.baseline is not None:
            service.baseline = start_baseline(args, handover.baseline)

        def before_stop() -> None:
            drain.wait()
            if service.baseline is not None:
                service.baseline.stop()

        engine.before_stop = before_stop
        state.pat_serve = service
        state.pat_serve_gate = Gate(policy, admission, bounds, OWN_ROUTES)
        if self._app is not None:
            # This comes last, because vLLM adds middleware and more routes after the plugins'.
            keep_served(self._app, OUR_PATHS)
            self._app.user_middleware.insert(0, Middleware(Observer))
            let_engine_errors_through()
            shape_vllm_errors(self._app, engine_faults())
            metrics = ServerMetrics()
            metrics.model(model_labels(args.model, engine.model_name, engine.hidden_size))
            metrics.admission(admission, engine.max_num_seqs)
            routes = RouteNames(getattr(route, "path", "") for route in self._app.routes)
            observation = Observation(metrics, access_log(args, handover.log_format), routes)
            state.pat_serve_observation = handover.observation = observation


def access_log(args: Namespace, form: LogFormat) -> AccessLog | None:
    """The access log, in place of uvicorn's. vLLM's two flags for uvicorn's log hold for ours."""
    if args.disable_uvicorn_access_log:
        return None
    # uvicorn reads this flag when it starts, which is later.
    args.disable_uvicorn_access_log = True
    start_log()
    quiet = (args.disable_access_log_for_endpoints or "").split(",")
    return AccessLog(form, [path.strip() for path in quiet])
