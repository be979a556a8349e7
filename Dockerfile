# megacog in a container, for GPUs or for CPUs:
#
#   docker build -t megacog .
#   docker build -t megacog:cpu --build-arg TARGET=cpu --build-arg TORCH_INDEX_URL=<index with CPU builds of torch> .
#   docker run --rm -it --gpus all -v "$PWD/data:/data" megacog
#
# No image has been built from this file in development, where no Docker engine was to be had. What it
# relies on is tested: tests/skeleton/test_install.py runs launch/install.sh in a clean environment.
# The CUDA libraries come with torch; the host needs only the NVIDIA driver and its container toolkit.
FROM python:3.11-slim-bookworm

ARG TARGET=gpu
ARG TORCH_INDEX_URL=""
ARG USER_ID=1000

# openssh-client: DeepSpeed's launcher reaches other hosts with it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git openssh-client \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid "$USER_ID" megacog \
    && mkdir /opt/megacog /opt/venv /data \
    && chown megacog:megacog /opt/megacog /opt/venv /data

USER megacog
WORKDIR /opt/megacog
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN python -m venv /opt/venv

COPY --chown=megacog:megacog . .
RUN TORCH_INDEX_URL="$TORCH_INDEX_URL" bash launch/install.sh --target "$TARGET"

CMD ["bash"]
