# For machines with NVIDIA GPUs and the NVIDIA container toolkit; it runs on CPUs as well.
#
#   docker build -t rankalign .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" -v rankalign-cache:/cache rankalign train config.yaml
#
# The driver comes from the machine, CUDA from torch's own wheel, so the base needs neither.
FROM python:3.12-slim-bookworm

# A compiler: for the CPU's attention kernel, and for what Triton and DeepSpeed compile when they first run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    RANKALIGN_CACHE=/cache/rankalign

# torch first and alone: this layer is the large one, and stays when our own files change.
WORKDIR /src
COPY constraints.txt ./
RUN pip install -c constraints.txt torch

COPY . .
RUN pip install -c constraints.txt ".[demo,judge,deepspeed,quant,bf16,tables,completion]"

# Nobody needs root to train. /cache holds models, tokens and references; name a volume for it to keep them.
RUN useradd --create-home --uid 1000 rankalign \
    && mkdir -p /work /cache \
    && chown -R rankalign /work /cache
USER 1000
WORKDIR /work
VOLUME ["/cache"]
ENTRYPOINT ["rankalign"]
CMD ["--help"]
