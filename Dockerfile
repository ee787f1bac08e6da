# sdxl-train with PyTorch for CUDA. Needs NVIDIA's container toolkit on the host.
#
#   docker build -t sdxl-train .
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" sdxl-train configs/4x3090.yaml
#
# --ipc host: NCCL and the readers exchange through /dev/shm, of which a container has 64 MB by default.
FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /opt/sdxl-train
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY trainer trainer
RUN pip install --constraint constraints.txt '.[quantized]'

WORKDIR /work
ENTRYPOINT ["sdxl-train"]
CMD ["--help"]
