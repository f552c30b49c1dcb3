# emt with the libraries of CUDA, for one GPU, many (--gpus all), or the nodes of a Ray cluster.
#
#     docker build -t emt .
#     docker run --rm --gpus all --shm-size 1g -v "$PWD:/data" -w /data emt transfer clips/ --prompts prompts.txt -o out
#
# PyTorch brings CUDA's libraries, the driver is the host's (NVIDIA Container Toolkit). Triton compiles a small launcher
# with the C compiler, engines are built with the C++ one; ffmpeg comes with a Python package. KubeRay's probes call wget.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/emt/bin:$PATH

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ libc6-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/emt

WORKDIR /opt/source
COPY pyproject.toml constraints.txt README.md LICENSE MANIFEST.in ./
COPY emt emt
COPY emt_cli emt_cli
COPY kernels kernels
COPY engines engines
RUN pip install -c constraints.txt torch triton \
    && pip install -c constraints.txt ".[evaluate,ray,s3]"

# Ubuntu's first user is 1000: results on a mounted folder belong to it. Its number is what runAsNonRoot checks.
RUN usermod --login emt --home /home/emt --move-home ubuntu && groupmod --new-name emt ubuntu
USER 1000:1000
WORKDIR /home/emt
ENTRYPOINT ["emt"]
CMD ["--help"]
