# syntax=docker/dockerfile:1
# A worker, for CPUs unless it is built with another TORCH_INDEX_URL.
#
# The wheels of torch carry CUDA themselves and need of the host its driver alone. So the same slim base serves CPU and
# CUDA, and only the index that torch comes from differs. PyPI's own wheel for Linux is the one with CUDA, gigabytes
# of it, which is why the default is the index of the wheels without.

FROM python:3.12-slim-bookworm AS dependencies
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY constraints.txt ./
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# Torch alone and first: the largest layer, which neither code nor other dependencies touch. What it depends on comes
# from PyPI below, because that index does not hold the versions in constraints.txt.
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --index-url "$TORCH_INDEX_URL" -c constraints.txt torch
COPY pyproject.toml ./
# What the project depends on, without the project: a change of its code leaves this layer as it is.
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*project["dependencies"], *project["optional-dependencies"]["worker"], sep="\n")' > requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt -r requirements.txt

FROM python:3.12-slim-bookworm AS build
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY worker worker
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /dist .

FROM python:3.12-slim-bookworm
# The same numbers in both images: API and workers share the data volume, which takes its owner from here.
RUN groupadd --gid 10001 maskmerge \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin maskmerge \
    && install -d -o 10001 -g 10001 /data /hub
COPY --from=dependencies /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1
RUN --mount=type=bind,from=build,source=/dist,target=/dist pip install --no-cache-dir --no-deps --no-index /dist/*.whl
ENV MASKMERGE_DATA_DIR=/data \
    MASKMERGE_LOCAL_ROOTS=/inputs \
    HF_HOME=/hub
USER 10001:10001
CMD ["maskmerge", "worker"]
