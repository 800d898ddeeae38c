# qexport on NVIDIA GPUs, amd64: docs/packaging.md. The host needs a driver for CUDA 13 and the NVIDIA container toolkit.
#
#   docker build -f docker/cuda.Dockerfile -t qexport:cuda .
#   docker run --rm --gpus all -v "$PWD:/work" qexport:cuda profile DIR --provider CUDAExecutionProvider

# Pin its digest for builds that must not change: --build-arg PYTHON_IMAGE=python:3.12.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Debian keeps one version per release, so its name pins it.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
# nvcc comes from the wheels of the extra cuda-build, into an environment that this stage keeps.
RUN python -m venv /opt/build && \
    /opt/build/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['cuda-build'], sep='\n')" \
      > /opt/build/requirements.txt && \
    /opt/build/bin/pip install --no-cache-dir -r /opt/build/requirements.txt
# Every GPU from compute capability 7.5 on unless one is named, which builds in a fraction of the time: 80, 90, 120, ...
ARG CUDA_ARCHITECTURES=
ARG EXTRAS=gpu,text
RUN CUDACXX="$(ls /opt/build/lib/python3*/site-packages/nvidia/*/bin/nvcc)" && export CUDACXX && \
    python -m venv /opt/qexport && \
    /opt/qexport/bin/pip install --no-cache-dir --config-settings=cmake.define.QEXPORT_CUDA=ON \
      "--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURES}" ".[${EXTRAS}]" && \
    /opt/qexport/bin/pip uninstall -y pip

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --create-home qexport && install -d -o qexport /work
COPY --from=build /opt/qexport /opt/qexport
# What the container toolkit is to mount: the driver's compute libraries and nvidia-smi.
ENV PATH=/opt/qexport/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER 10001
WORKDIR /work

# Does the op library load in this onnxruntime, do its kernels compute what they should, on the GPU too?
HEALTHCHECK --interval=10m --timeout=120s --start-period=60s CMD ["qexport", "doctor"]

ENTRYPOINT ["qexport"]
CMD ["--help"]
