# Image of serve.py; compose.yaml runs it. `--build-arg PIP_INDEX_URL=...` names another package index than pip's own,
# for example one with builds of torch for CPUs.
FROM python:3.11-slim

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY serve.py .
COPY reclingua reclingua

RUN useradd --create-home --uid 1000 server
USER 1000

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0"]
