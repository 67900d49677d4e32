"""`pat-bench load`: guidellm, as a process of its own, against any server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from pat_serve.checkpoints.locate import stock_path
from pat_serve.errors import EngineError, UsageError, want
from pat_serve.files.atomic import write_json
from pat_serve.machine.extras import require
from pat_serve.machine.hardware import describe
from pat_serve.machine.local_addresses import UNUSABLE_PROXY, is_local, without_proxies
from pat_serve.server.bench.load import client
from pat_serve.server.bench.load.result import SLO_NAMES, LoadResult, LoadSettings, read_guidellm

_LOOK_TIMEOUT_S = 10.0
# Seconds that guidellm may take to import, to make its prompts and to write its report, beside the runs themselves.
_SPARE_S = 600.0
_LOG_LINES = 8
# guidellm 0.8 ends in this error where a run has sent no request, and loses the reports of the runs before it.
_NOTHING_SENT = "No measurement start or end times available"


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model of a server, as the server describes it.

    Attributes:
        name: name for requests.
        root: place of its weights and tokenizer, as far as the server says.
    """

    name: str
    root: str


def run_load(settings: LoadSettings, *, api_key: str | None) -> LoadResult:
    """Send requests and judge the answers' times.

    Args:
        settings: what to send.
        api_key: for a server that asks for one.

    Raises:
        MissingExtra: guidellm is not installed.
        UsageError: settings that make no sense, a key that the server refuses, a model that it does not have.
        EngineError: no server, or guidellm failed.
    """
    check_load(settings)
    require("guidellm", "bench", wanted_by="pat-bench load")
    url = settings.url.rstrip("/").removesuffix("/v1")
    served = look_up(url, settings.model, api_key=api_key)
    tokenizer = stock_path(settings.tokenizer or served.root)
    date, begun_s = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pat-bench-") as scratch:
        place = tokenizer_place(tokenizer)
        report = _run_guidellm(settings, url, served.name, place, api_key, Path(scratch))
    return LoadResult(
        date=date,
        duration_s=time.monotonic() - begun_s,
        machine=describe(),
        guidellm=version("guidellm"),
        settings=settings,
        model=served.name,
        tokenizer=tokenizer,
        runs=read_guidellm(report, settings.slo),
    )


def tokenizer_place(tokenizer: str) -> str:
    """The place where guidellm, which runs in another folder, finds a tokenizer: an absolute path, or a hub id.

    Raises:
        UsageError: the place is a path without a folder.
    """
    if Path(tokenizer).is_dir():
        return str(Path(tokenizer).resolve())
    if tokenizer.endswith("/") or tokenizer.startswith((".", "/", "~")):
        raise UsageError(
            "--tokenizer",
            expected="the folder or hub id of the server's tokenizer",
            found=f"{tokenizer}, and no such folder here",
            fix="Name one with --tokenizer; a path that the server tells counts from its own working folder.",
        )
    return tokenizer


def check_load(settings: LoadSettings) -> None:
    """Refuse settings of a load that cannot be sent.

    Raises:
        UsageError: naming the flag.
    """
    web = settings.url.startswith(("http://", "https://"))
    want("--url", web, "a URL with http:// or https://", settings.url, "Try --url http://127.0.0.1:8000.")
    want(
        "--rate",
        bool(settings.rates) and all(0 < one < math.inf for one in settings.rates),
        "above 0, finite",
        settings.rates,
        "Try --rate 1, or --profile sweep.",
    )
    want("--sweep-size", settings.sweep_size >= 3, "at least 3", settings.sweep_size, "Try --sweep-size 5.")
    want("--prompt-tokens", settings.prompt_tokens >= 1, "at least 1", settings.prompt_tokens, "Try 64.")
    want("--output-tokens", settings.output_tokens >= 1, "at least 1", settings.output_tokens, "Try 16.")
    want("--seconds", 0 < settings.seconds < math.inf, "above 0, finite", settings.seconds, "Try --seconds 20.")
    for name, bound_s in settings.slo.items():
        want(f"--slo {name}", name in SLO_NAMES, ", ".join(SLO_NAMES), name, "Try --slo ttft=0.2.")
        want(f"--slo {name}", 0 < bound_s < math.inf, "seconds above 0", bound_s, f"Try --slo {name}=0.2.")


def look_up(url: str, model: str, *, api_key: str | None) -> Served:
    """Ask a server for its models.

    Args:
        url: address of the server, without /v1.
        model: the one wanted; empty for the first.
        api_key: sent as a bearer token.

    Raises:
        EngineError: nobody answers, or not as OpenAI's protocol wants.
        UsageError: no key or a wrong one, or no such model.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=_LOOK_TIMEOUT_S, trust_env=not is_local(url))
    except (httpx.HTTPError, httpx.InvalidURL, *UNUSABLE_PROXY) as error:
        raise EngineError(
            f"--url {url}",
            expected="a server that answers",
            found=str(error) or type(error).__name__,
            fix="Start one (pat-serve --model MODEL), wait for GET /ready, and check host and port.",
        ) from error
    if answer.status_code in (401, 403):
        raise UsageError(
            f"--url {url}",
            expected="a key that the server takes",
            found="no key" if api_key is None else f"status {answer.status_code} for this one",
            fix="Put it into PAT_BENCH_API_KEY, or a file for --api-key-file.",
        )
    names: list[dict[str, Any]] = []
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        names = [one for one in answer.json()["data"] if isinstance(one["id"], str)]
    if answer.status_code != 200 or not names:
        raise EngineError(
            f"{url}/v1/models",
            expected="a list of models",
            found=f"status {answer.status_code}, {answer.text[:80]!r}",
            fix="Point --url at the root of a server that speaks OpenAI's protocol.",
        )
    chosen = next((one for one in names if one["id"] == model), None) if model else names[0]
    if chosen is None:
        raise UsageError(
            f"--served-model {model}",
            expected=f"one of {', '.join(one['id'] for one in names)}",
            found="none of this name",
            fix="Leave it out for the first.",
        )
    return Served(name=chosen["id"], root=chosen.get("root") or chosen["id"])


def scenario(settings: LoadSettings, url: str, model: str, tokenizer: str, api_key: str | None) -> dict[str, Any]:
    """guidellm's settings as a scenario file, because a command line would show the key to other users."""
    if settings.profile == "sweep":
        profile: dict[str, Any] = {"kind": "sweep", "sweep_size": settings.sweep_size, "strategy_type": "constant"}
    else:
        profile = {"kind": settings.profile, "rate": list(settings.rates)}
    backend = {"kind": "openai_http", "target": url, "model": model, "request_format": "/v1/completions"}
    if api_key is not None:
        backend["api_key"] = api_key
    data = {
        "kind": "synthetic_text",
        "prompt_tokens": settings.prompt_tokens,
        "output_tokens": settings.output_tokens,
    }
    return {
        "metadata": {},
        "spec": {
            "backend": backend,
            "profile": profile,
            "constraints": [{"kind": "max_duration", "seconds": settings.seconds}],
            "tokenizer": {"kind": "huggingface_auto", "model": tokenizer},
            "data": [data],
            "seed": {"kind": "static", "value": settings.seed},
        },
    }


def guidellm_environment(environ: Mapping[str, str], *, tokenizer: str, url: str) -> dict[str, str]:
    """guidellm's environment; values that the user has set win, but for a proxy before a server of this machine.

    guidellm gets one worker process, because the machine belongs to the server. One is enough for hundreds of requests
    a second, and `LoadRun.late_s` says whether the client kept its schedule.
    """
    ours = {"GUIDELLM__MAX_WORKER_PROCESSES": "1"}
    if Path(tokenizer).is_dir():
        ours["HF_HUB_OFFLINE"] = "1"
        if is_local(url):
            environ = without_proxies(environ)
    return ours | dict(environ)


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _run_guidellm(
    settings: LoadSettings, url: str, model: str, tokenizer: str, api_key: str | None, scratch: Path
) -> dict[str, Any]:
    plan, report, log = scratch / "scenario.json", scratch / "report.json", scratch / "guidellm.log"
    plan.touch(mode=0o600)
    write_json(plan, scenario(settings, url, model, tokenizer, api_key))
    plan.chmod(0o600)
    runs = settings.sweep_size if settings.profile == "sweep" else len(settings.rates)
    command = [sys.executable, "-P", "-m", client.__name__, "run"]
    command += ["--config", str(plan), "--disable-console", "--output", f"kind=json,path={report}"]
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command,
                cwd=scratch,
                env=guidellm_environment(os.environ, tokenizer=tokenizer, url=url),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=runs * (settings.seconds + 60) + _SPARE_S,
                check=False,
            )
            found = f"exit code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            found = f"no end within {error.timeout:.0f} s"
    if not report.exists():
        said = log.read_text(errors="replace")
        if _NOTHING_SENT in said:
            raise EngineError(
                "guidellm",
                expected="a request in every run",
                found=f"a run of {settings.seconds:g} s without one (runs at {_listed(settings.rates)} a second)",
                fix="Give more --seconds or a higher --rate, so that a run sends ten requests or more.",
            )
        tail = "\n".join(said.splitlines()[-_LOG_LINES:])
        tail = tail.replace(api_key, "KEY") if api_key else tail
        raise EngineError(
            "guidellm",
            expected="a report",
            found=found,
            fix=f"If it did not find the tokenizer {tokenizer}, name a folder with --tokenizer. It says:\n{tail}",
        )
    loaded: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return loaded
