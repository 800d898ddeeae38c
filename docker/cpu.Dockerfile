# qexport on CPUs, amd64 and arm64: docs/packaging.md
#
#   docker build -f docker/cpu.Dockerfile -t qexport .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" qexport validate DIR

# Pin its digest for builds that must not change: --build-arg PYTHON_IMAGE=python:3.12.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# The compiler stays in this stage. Debian keeps one version per release, so its name pins it.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
# What runs bundles; EXTRAS=cpu,text,export also converts torch and Hugging Face models, and takes gigabytes.
ARG EXTRAS=cpu,text
RUN python -m venv /opt/qexport && \
    /opt/qexport/bin/pip install --no-cache-dir --config-settings=cmake.define.QEXPORT_CUDA=OFF ".[${EXTRAS}]" && \
    /opt/qexport/bin/pip uninstall -y pip

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --create-home qexport && install -d -o qexport /work
COPY --from=build /opt/qexport /opt/qexport
ENV PATH=/opt/qexport/bin:$PATH

USER 10001
WORKDIR /work

# Does the op library load in this onnxruntime, and does its kernel compute what it should?
HEALTHCHECK --interval=10m --timeout=60s --start-period=60s CMD ["qexport", "doctor"]

ENTRYPOINT ["qexport"]
CMD ["--help"]
