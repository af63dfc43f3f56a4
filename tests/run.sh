#!/usr/bin/env bash
# The tests, style and types included, a file of tests on each core:
#
#   bash tests/run.sh                     everything that this machine can run
#   bash tests/run.sh --quick             what takes seconds: for every save
#   bash tests/run.sh --browser           install Debian's chromium first, in which tests open pages
#   bash tests/run.sh tests/decoding -x   further arguments are pytest's
set -euo pipefail
cd "$(dirname "$0")/.."
BROWSER="" PYTEST=()
for argument in "$@"; do
  case $argument in
    --quick) PYTEST+=(-m "not slow and not browser and not gpu") ;;
    --browser) BROWSER=1 ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' tests/run.sh; exit 0 ;;
    *) PYTEST+=("$argument") ;;
  esac
done

bash run.sh --setup_only
if ! sha256sum --check --status .venv/requirements-dev.sha256 2>/dev/null; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
  sha256sum requirements-dev.txt .venv/requirements.sha256 >.venv/requirements-dev.sha256
fi
if [[ -n $BROWSER ]] && ! command -v chromium >/dev/null; then
  echo "installing Debian's chromium"
  export DEBIAN_FRONTEND=noninteractive
  as_root=()
  [[ $EUID -eq 0 ]] || as_root=(sudo)
  { "${as_root[@]}" timeout 120 apt-get update &&
    "${as_root[@]}" timeout 600 apt-get install --yes --no-install-recommends chromium; } &>/dev/null </dev/null ||
    echo "chromium could not be installed: tests that open pages are skipped"
fi

.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet . || { echo "error: run .venv/bin/ruff format ." >&2; exit 1; }
.venv/bin/mypy >.venv/mypy.txt 2>&1 & # its first run takes a minute, beside the tests
MYPY=$! CODE=0
.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "${PYTEST[@]}" || CODE=$?
wait "$MYPY" || CODE=1
cat .venv/mypy.txt
exit "$CODE"
