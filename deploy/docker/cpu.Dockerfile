# SafeGene for vLLM on CPU, at the versions of requirements.txt. Build from the repository's root:
#   docker build -f deploy/docker/cpu.Dockerfile -t safegene-vllm:cpu .
# There is no compiler in it: give `--enforce-eager`.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG UV_VERSION=0.13.9
# Where the CPU build of torch comes from; "--find-links DIR-OR-URL" for a mirror.
ARG TORCH_SOURCE="--torch-backend cpu"
WORKDIR /src
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --quiet "uv==${UV_VERSION}" \
    && python3 -m venv --without-pip /opt/safegene
COPY pyproject.toml requirements.txt ./
COPY requirements/ requirements/
# The runtime part of the lock, worked out by uv: pins from requirements.txt, and without what
# requirements/overrides.txt drops. This layer lasts until one of these files changes.
RUN /opt/uv/bin/uv pip compile pyproject.toml --quiet --no-sources --extra cpu --extra server --extra s3 \
      --constraint requirements.txt --override requirements/overrides.txt ${TORCH_SOURCE} \
      --output-file runtime.txt \
    && /opt/uv/bin/uv pip install --quiet --no-cache --no-deps --compile-bytecode ${TORCH_SOURCE} \
      --python /opt/safegene/bin/python --requirement runtime.txt
COPY LICENSE README.md ./
COPY safegene_vllm/ safegene_vllm/
COPY server/ server/
RUN /opt/uv/bin/uv pip install --quiet --no-cache --no-deps --no-build-isolation --compile-bytecode \
      --python /opt/safegene/bin/python .

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="SafeGene for vLLM (CPU)" \
      org.opencontainers.image.description="One safety vector per model family, coefficients per tenant, on stock vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# libnuma is what vLLM's CPU kernels link against; its version is the base image's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 safegene \
    && useradd --uid 10001 --gid 10001 --home-dir /var/cache/safegene --no-create-home safegene \
    && install -d -o 10001 -g 10001 /var/cache/safegene /var/lib/safegene
COPY --from=build /opt/safegene /opt/safegene
# What is written goes to two volumes and /tmp; the rest of the root may be read-only.
ENV PATH=/opt/safegene/bin:$PATH \
    HOME=/var/cache/safegene \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1
VOLUME ["/var/cache/safegene", "/var/lib/safegene"]
WORKDIR /var/lib/safegene
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=6s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ.get('SAFEGENE_PORT', 8000)}/v1/safegene/ready\", timeout=5)"]
ENTRYPOINT ["safegene"]
CMD ["--help"]
