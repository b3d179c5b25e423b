# apt on a GPU, without weights but the package's own digits:
#
#   docker build --tag diffusion-apt .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" -v "$HOME/models:/models" \
#       diffusion-apt train digits
#
# /work is where commands read and write, /models keeps what is downloaded from the Hub.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# A compiler and Python's headers: Triton builds a launcher for each kernel when it is first used.
# Ubuntu keeps one version of a package, so pinning one would fail with the next.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home apt-user \
    && install --directory --owner apt-user --mode 1777 /work /models

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY apt apt
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[hub,lora,triton]'

# Caches lie where any user may write.
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/models \
    TRITON_CACHE_DIR=/tmp/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    MPLCONFIGDIR=/tmp/matplotlib
USER 10001
WORKDIR /work
ENTRYPOINT ["diffusion-apt"]
CMD ["--help"]
