# syntax=docker/dockerfile:1
# The API. Nothing here needs torch, so this image is small and starts at once.

FROM python:3.12-slim-bookworm AS dependencies
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY pyproject.toml constraints.txt ./
# What the project depends on, without the project: a change of its code leaves this layer as it is.
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > requirements.txt
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
    && install -d -o 10001 -g 10001 /data
COPY --from=dependencies /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1
RUN --mount=type=bind,from=build,source=/dist,target=/dist pip install --no-cache-dir --no-deps --no-index /dist/*.whl
ENV MASKMERGE_DATA_DIR=/data \
    MASKMERGE_LOCAL_ROOTS=/inputs \
    MASKMERGE_HOST=0.0.0.0
EXPOSE 8000
USER 10001:10001
CMD ["maskmerge", "api"]
