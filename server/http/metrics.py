"""Our own Prometheus metrics, beside vLLM's on `/metrics`. docs/observability.md lists them.

Our metrics live in prometheus_client's default registry, which vLLM exposes. Where PROMETHEUS_MULTIPROC_DIR is set, all
metrics are kept in files there, so nothing here may rely on a callback at the moment of a scrape.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from pat_serve.server.http.admission import Admission
from pat_serve.server.http.exchange import NO_KEY, Exchange
from pat_serve.server.http.route_names import UNPARSED

_WAIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_ANSWER_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_BY = ("route", "key")


class ServerMetrics:
    """All metrics of ours. A process makes them once.

    Args:
        registry: takes the metrics; tests give one of their own.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, told: str, labels: tuple[str, ...]) -> Counter:
            return Counter(f"pat_serve_{name}", told, labels, registry=registry)

        def histogram(name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"pat_serve_{name}_seconds", told, _BY, buckets=buckets, registry=registry)

        def gauge(name: str, told: str) -> Gauge:
            return Gauge(f"pat_serve_{name}", told, registry=registry, multiprocess_mode="livesum")

        self._requests = counter("requests", "Requests that have ended; 499: the client left.", (*_BY, "status"))
        self._rejections = counter(
            "rejections", "Answers and streams that were an error, by its error.type.", ("route", "reason")
        )
        self._prompt_tokens = counter("prompt_tokens", "Tokens of the prompts given to the engine.", _BY)
        self._output_tokens = counter("output_tokens", "Tokens that the engine has made.", _BY)
        self._ttft = histogram("time_to_first_token", "Time from a request's arrival until its first token.", _WAIT_S)
        self._tpot = histogram("time_per_output_token", "Mean time per token after a sequence's first.", _TOKEN_S)
        self._queue = histogram("queue", "Time that a request waited in the engine to be scheduled.", _WAIT_S)
        self._answers = histogram("request", "Time from a request's arrival until its good answer ended.", _ANSWER_S)
        self._in_flight = gauge("requests_in_flight", "Requests that hold a place: running or waiting.")
        self._sequences = gauge("sequences_in_flight", "Sequences of these requests.")
        self._waiting = gauge("sequences_waiting", "Sequences beyond those that the engine runs at once.")
        self._queue_limit = gauge("sequences_waiting_limit", "Sequences that may wait; more are refused with 503.")
        self._registry = registry

    def model(self, labels: Mapping[str, str]) -> None:
        """Name the served model, in the labels of a gauge that is 1."""
        told = "The served model: its name, its base, width and pruning method, and the version of pat-serve."
        # A gauge takes the place of prometheus_client's Info, which several processes cannot share.
        info = Gauge(
            "pat_serve_model_info", told, tuple(labels), registry=self._registry, multiprocess_mode="mostrecent"
        )
        info.labels(**labels).set(1)

    def admission(self, admission: Admission, running: int) -> None:
        """Follow the places that are taken.

        Args:
            admission: gets `changed` set.
            running: sequences that the engine runs at once.
        """
        self._queue_limit.set(admission.capacity - running)

        def changed() -> None:
            self._in_flight.set(admission.requests)
            self._sequences.set(admission.sequences)
            self._waiting.set(max(0, admission.sequences - running))

        admission.changed = changed
        changed()

    def record(self, exchange: Exchange) -> None:
        """Count a request that has ended, and observe its times."""
        by = (exchange.route, exchange.key)
        self._requests.labels(*by, str(exchange.status)).inc()
        if exchange.error is not None:
            self._rejections.labels(exchange.route, exchange.error).inc()
        if exchange.work.prompt_tokens:
            self._prompt_tokens.labels(*by).inc(exchange.work.prompt_tokens)
            self._output_tokens.labels(*by).inc(exchange.work.output_tokens)
        # A client that left has seen the first token all the same, and its latencies count as well.
        for seen, value in (
            (self._ttft, exchange.ttft_s),
            (self._queue, exchange.work.queue_s),
            (self._tpot, exchange.work.tpot_s),
        ):
            if value is not None:
                seen.labels(*by).observe(value)
        if exchange.complete and exchange.error is None and exchange.status < 400:
            self._answers.labels(*by).observe(exchange.duration_s)

    def record_unparsed(self, status: int, reason: str) -> None:
        """Count a request that was refused before it was one."""
        self._requests.labels(UNPARSED, NO_KEY, str(status)).inc()
        self._rejections.labels(UNPARSED, reason).inc()
