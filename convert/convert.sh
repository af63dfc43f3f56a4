#!/usr/bin/env bash
# Model folders of what DeepSpeed ZeRO saved: of every checkpoint of a run, and of its end.
#
#   bash convert/convert.sh ckpt/D/lcrec                       -> ckpt/D/lcrec/converted/checkpoint-500, ..., final
#   bash convert/convert.sh ckpt/D/lcrec --dtype bfloat16      any option of python -m convert.zero_to_fp32
#
# What has been converted before is skipped.
set -euo pipefail

case ${1:-} in
  -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
  "" | -*) echo "error: which folder? see bash convert/convert.sh --help" >&2; exit 2 ;;
esac
[[ -d $1 ]] || { echo "error: $1: no such folder" >&2; exit 2; }
run=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
[[ ! -d .venv ]] || export PATH="$PWD/.venv/bin:$PATH"

found=""
for state in "$run"/checkpoint-* "$run"; do
  [[ -f $state/latest ]] || continue
  found=1
  output=$run/converted/$([[ $state == "$run" ]] && echo final || basename "$state")
  if compgen -G "$state/adapter_model.*" >/dev/null; then
    echo "$state: an adapter, whose weights are in its folder already"
  elif [[ -d $output ]]; then
    echo "$output: converted before, skipped"
  else
    python -m convert.zero_to_fp32 "$state" "$output" "$@"
  fi
done
[[ -n $found ]] || { echo "error: $run: holds no training state of DeepSpeed" >&2; exit 2; }
