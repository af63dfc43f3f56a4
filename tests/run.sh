#!/usr/bin/env bash
# The whole test suite, style included, a file of tests on each core: bash tests/run.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
bash run.sh --setup_only
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet . || { echo "error: run .venv/bin/ruff format ." >&2; exit 1; }
exec .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
