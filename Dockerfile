# syntax=docker/dockerfile:1

# Two stages: the first has pip and leaves a virtual environment, the second has only that.
FROM python:3.11.14-slim-bookworm AS build

# The index's torch for x86-64 brings CUDA along. For a small CPU image, pass the address of an index
# with CPU builds: docker build --build-arg PIP_EXTRA_INDEX_URL=… .
ARG PIP_EXTRA_INDEX_URL=""

RUN python -m venv /opt/molex
ENV PATH="/opt/molex/bin:$PATH"
WORKDIR /src

# The dependencies first, with empty packages in place of the sources: a change of code reuses them.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir molex molex_client server \
    && touch molex/__init__.py molex_client/__init__.py server/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt torch==2.13.0 '.[structured,onnx,s3]'

COPY molex molex
COPY molex_client molex_client
COPY server server
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# The kernels, which the second stage has no compiler for.
ENV XDG_CACHE_HOME=/opt/molex/cache
RUN apt-get update && apt-get install -y --no-install-recommends g++=4:12.2.0-3 \
    && rm -rf /var/lib/apt/lists/* \
    && python -c "from molex.native.build import library; library()"


FROM python:3.11.14-slim-bookworm

RUN useradd --system --uid 10001 --create-home molex
COPY --from=build /opt/molex /opt/molex

ENV PATH="/opt/molex/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/opt/molex/cache \
    MOLEX_PORT=8000

USER 10001
WORKDIR /home/molex
EXPOSE 8000

# Loading several bases from a cold disk may take a minute or two.
HEALTHCHECK --interval=10s --timeout=3s --start-period=3m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['MOLEX_PORT']}/readyz\", timeout=2)"]

# Further settings come as options or as MOLEX_… variables, for example MOLEX_BASES. Metrics, changes of
# adapters and administration answer on 127.0.0.1:8001 alone: for others set MOLEX_ADMIN_HOST.
ENTRYPOINT ["molex", "serve", "--host", "0.0.0.0"]
