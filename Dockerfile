# pat-serve as an image: `docker build -t pat-serve .`; `docker run -p 8000:8000 pat-serve` serves /model.
# Targets: cpu (the default) and cuda. See docs/containers.md.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
# vLLM's CPU kernels link it; a slim image has none.
RUN dpkg -s libnuma1 >/dev/null 2>&1 \
    || { apt-get update -qq && apt-get install -y -qq --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*; }
# Where pip looks for packages, in this stage and all that begin from it; without one, on PyPI.
ARG PIP_INDEX_URL
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /src

# ---- cpu: what is served with, in a virtual environment of its own
FROM base AS locked-cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/ requirements/
RUN PIP_NO_CACHE_DIR=1 requirements/setup.sh python3 /opt/venv requirements/serve-cpu.lock

FROM locked-cpu AS packages-cpu
COPY . .
RUN /opt/venv/bin/pip install --no-cache-dir --quiet --no-deps --no-build-isolation .

# The built-in model, so that a first try answers: the chat model of `make demo`, cut and trained within ten minutes, or a
# small Llama, trained on what Python documents of itself. DEMO=real and DEMO=tiny choose; without a choice it is the
# first where the package index has it. /model/NOTICE says which it is.
FROM locked-cpu AS model
RUN PIP_NO_CACHE_DIR=1 requirements/setup.sh python3 /opt/venv requirements/cpu.lock
COPY . .
ARG DEMO
RUN case "$DEMO" in tiny) flag=--tiny ;; real) flag= ;; "") flag=--or-tiny ;; \
        *) echo "DEMO: expected real, tiny or nothing, found $DEMO" >&2; exit 2 ;; esac \
    && /opt/venv/bin/pip install --no-cache-dir --quiet --no-deps --no-build-isolation . \
    && PAT_SERVE_CACHE=/demo/cache /opt/venv/bin/pat-demo $flag --out /demo --model-only \
    && mv /demo/pruned /model && chmod -R a+rX /model && rm -rf /demo && head -n 1 /model/NOTICE

# The common end of both images, without their packages.
FROM base AS runtime
COPY --from=model /model /model
COPY docker/ready.py /opt/ready.py
# A user without a name of its own: everything that is written goes to /tmp, so the root file system may be read-only.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
# Until the start period is over only success counts: a large model takes its time.
HEALTHCHECK --interval=10s --timeout=10s --start-period=600s --retries=3 CMD ["python", "/opt/ready.py"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["pat-serve", "--model", "/model", "--host", "0.0.0.0"]

FROM runtime AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv

# ---- cuda: the CUDA libraries come as packages; the driver comes from the host (nvidia-container-toolkit)
FROM base AS packages-cuda
COPY . .
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements/serve-cuda.lock \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM runtime AS cuda
USER root
# Triton compiles launchers when the engine starts: the one thing that needs a compiler at run time.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=packages-cuda /opt/venv /opt/venv

# The last stage is what a build without --target makes.
FROM cpu AS default
