# sdxl-train with PyTorch for CUDA. Needs NVIDIA's container toolkit on the host.
#
#   docker build -t sdxl-train .
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" sdxl-train configs/4x3090.yaml
#
# A model's name on the hub is downloaded into /root/.cache: -v "$HOME/.cache:/root/.cache" keeps it. Weights & Biases or
# MLflow: docker build --build-arg EXTRAS=quantized,wandb -t sdxl-train .
# --ipc host: NCCL and the readers exchange through /dev/shm, of which a container has 64 MB by default.
FROM python:3.12-slim

# A compiler: torch.compile fuses the arithmetic of 8-bit AdamW, and the blocks with train.compile.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /opt/sdxl-train
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY trainer trainer
ARG EXTRAS=quantized
RUN pip install --constraint constraints.txt ".[${EXTRAS}]"

WORKDIR /work
ENTRYPOINT ["sdxl-train"]
CMD ["--help"]
