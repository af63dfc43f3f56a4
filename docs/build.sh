#!/usr/bin/env bash
# Build the documentation as a site in site/, without a network; a broken link or anchor fails: bash docs/build.sh [folder]
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} != -* ]] || { sed -n '2s/^# //p' docs/build.sh; exit 0; }
bash run.sh --setup_only
.venv/bin/python -m mkdocs --version &>/dev/null || .venv/bin/python -m pip install --quiet --disable-pip-version-check \
  -r requirements-dev.txt
NO_MKDOCS_2_WARNING=1 exec .venv/bin/python -m mkdocs build --quiet --site-dir "${1:-$PWD/site}"
