#!/usr/bin/env bash
# The whole test suite, style included, a file of tests on each core: bash tests/run.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
bash run.sh --setup_only
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
if [[ $EUID -eq 0 ]] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then
  echo "installing Debian's chromium, in which the tests open pages"
  export DEBIAN_FRONTEND=noninteractive
  { timeout 120 apt-get update && timeout 600 apt-get install --yes --no-install-recommends chromium; } \
    &>/dev/null </dev/null || echo "chromium could not be installed: tests that open pages are skipped"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet . || { echo "error: run .venv/bin/ruff format ." >&2; exit 1; }
.venv/bin/mypy
exec .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
