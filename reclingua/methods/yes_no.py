"""TALLRec, CoLLM, BinLLM, CoRA, soft and personalised prompts: will this user like this item, Yes or No?"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reclingua.datasets.prompts import YES_NO_FIELDS, YES_NO_PROMPT_FILE, PromptTemplate, read_prompts
from reclingua.datasets.ratings import RatingsDataset, open_ratings, sample_ratings, to_numpy
from reclingua.datasets.yes_no import YesNoCollator
from reclingua.inference.collaborative import check_same_dataset, model_inputs, valid_metrics
from reclingua.inference.loading import build_yes_no_dataset
from reclingua.inference.scorer import Scorer
from reclingua.methods.setup import Log, TrainingSetup
from reclingua.models.collaborative import load_collaborative, reinitialized, weights_sha256
from reclingua.models.collaborative.base import CollaborativeModel
from reclingua.models.collaborative.hash import HashedMF
from reclingua.models.collaborative.mf import MF, MFConfig
from reclingua.models.collm import CoLLM
from reclingua.models.continuation import copy_own_weights
from reclingua.models.cora import CoRA
from reclingua.models.language import absolute_name, base_fingerprint, load_tokenizer
from reclingua.models.lora import add_lora
from reclingua.models.registry import YES_NO_METHODS
from reclingua.models.yes_no import YesNoConfig, YesNoModel, open_language
from reclingua.training.arguments import Arguments, LoraArguments, MethodArguments, refuse_flags
from reclingua.training.checkpoints import checkpoint_to_resume
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import CheckpointMetadata
from reclingua.utils.precision import frozen_dtype

LORA_METHODS = ("tallrec", "binllm")  # train LoRA weights and nothing else
CF_METHODS = ("collm", "binllm", "cora")  # read a collaborative model of pretrain.py
# Flags of YesNoArguments that a resumed training need not share, or whose value has a field of its own.
OTHER_FLAGS = ("patience", "save_base_weights", "code_format", "history_window", "rows_per_tree")
OFFSET_SAMPLES = 32  # of train, whose mean logit before training becomes the offset in the loss
NORMALIZATION_SAMPLES = 4096  # of train, whose collaborative vectors set the normalization
LORA_DEFAULTS = (16, "q_proj,v_proj")  # alpha and target layers without flags
PROMPT_WIDTH = 64  # of the embeddings that soft and personalised prompts start from


@dataclass(frozen=True)
class YesNoData:
    """Rows of ratings for train and valid; `prompts` are the templates of the method and those of titles alone."""

    dataset: RatingsDataset
    prompts: dict[str, list[PromptTemplate]]
    train: Dataset
    valid: Dataset


def check_flags(args: Arguments) -> None:
    """Raise InputError for flags that contradict each other or the method."""
    method, yes_no = args.method.method, args.yes_no
    shared = ("method", "train_data_sample_num")
    refuse_flags(method, args.method, [field.name for field in fields(MethodArguments) if field.name not in shared])
    refuse_flags(method, args.data, ["index_file", "user_file", "max_text_len", "add_prefix"])
    refuse_flags(method, args.model, ["load_in_8bit"])
    used = {"cf_model": method in CF_METHODS, "soft_tokens": YES_NO_METHODS[method][0] is CoLLM}
    used |= {"code_format": method == "binllm"}
    refuse_flags(method, yes_no, [flag for flag, is_used in used.items() if not is_used])
    if args.data.max_his_len < 1:
        raise InputError(f"--max_his_len {args.data.max_his_len}: should be 1 at least")
    if not args.method.train_data_sample_num.isdecimal():
        raise InputError(f"--train_data_sample_num {args.method.train_data_sample_num}: should be one whole number")
    if method in CF_METHODS and not yes_no.cf_model:
        raise InputError(f"--cf_model is required with --method {method}: a folder made by python pretrain.py")
    if args.model.init_from and yes_no.one_stage:
        raise InputError("--one_stage trains both stages at once: leave --init_from out")
    if yes_no.one_stage and (method in LORA_METHODS or args.lora.lora is False):
        raise InputError("--one_stage trains LoRA weights beside the method's own parts: not with tallrec or binllm")
    if (yes_no.train_cf_model or yes_no.cf_model_from_scratch) and method not in ("collm", "cora"):
        raise InputError(f"--train_cf_model and --cf_model_from_scratch are for collm and cora, not for {method}")
    if yes_no.rows_per_tree < 1:
        raise InputError(f"--rows_per_tree {yes_no.rows_per_tree}: should be 1 at least")
    if yes_no.soft_tokens < 1:
        raise InputError(f"--soft_tokens {yes_no.soft_tokens}: should be 1 at least")
    if yes_no.patience < 0:
        raise InputError(f"--patience {yes_no.patience}: should be 0 at least")
    if (metric := args.training.metric_for_best_model) not in ("auc", "uauc"):
        raise InputError(f"--metric_for_best_model {metric}: should be auc or uauc with --method {method}")
    if yes_no.patience and not args.training.load_best_model_at_end:
        raise InputError("--patience needs --load_best_model_at_end and evaluations (--save_and_eval_strategy)")
    if args.lora.lora is False and method in LORA_METHODS and args.model.load_in_4bit:
        raise InputError("--load_in_4bit: weights in 4 bits cannot be tuned themselves; leave --lora False out")
    if args.training.use_liger_kernel:
        raise InputError(
            f"--use_liger_kernel: Liger knows language models by their type and would leave that of --method {method} "
            "as it is; leave the flag out"
        )
    reads_cache = method not in (*LORA_METHODS, "cora") and not (yes_no.one_stage or args.lora.lora)
    if args.training.torch_compile and reads_cache:  # it would be compiled once for each layer
        raise InputError(
            f"--torch_compile: {method} reads histories into a cache of its frozen language model, which is not "
            "compiled; leave the flag out, or train LoRA weights as well (--one_stage)"
        )
    if yes_no.save_base_weights and args.model.load_in_4bit:
        raise InputError("--save_base_weights is for weights in full precision, not with --load_in_4bit")


def build_data(args: Arguments, log: Log) -> YesNoData:
    """Open the ratings and draw the rows that are used; InputError where these have one label only."""
    dataset = open_ratings(args.data.data_path, args.data.dataset)
    _, task = YES_NO_METHODS[args.method.method]
    prompts = read_prompts(
        args.data.prompt_file or YES_NO_PROMPT_FILE, {name: YES_NO_FIELDS[name] for name in {"text", task}}
    )
    train, valid = dataset.parts["train"], dataset.parts["valid"]
    count = int(args.method.train_data_sample_num)
    if 0 < count < len(train):
        train = train.shuffle(seed=args.training.seed).select(range(count))
    valid = sample_ratings(valid, args.data.max_eval_samples or 0)
    for part, rows in (("train", train), ("valid", valid)):
        if len(set(to_numpy(rows, "label").tolist())) < 2:
            raise InputError(f"{dataset.folder}: the {len(rows)} rows taken of {part} are all of one label; take more")
    log(
        f"{dataset.name}: {len(train):,} of {len(dataset.parts['train']):,} training rows, "
        f"{len(valid):,} of {len(dataset.parts['valid']):,} valid"
    )
    return YesNoData(dataset, prompts, train, valid)


def build_model(args: Arguments, data: YesNoData, log: Log) -> TrainingSetup:
    """Assemble the model, write the rows as prompts, fit normalization and offset; InputError where they don't fit."""
    model = assemble_model(args, data.dataset)
    tokenizer = load_tokenizer(args.model.init_from or str(args.model.base_model))
    metadata = checkpoint_metadata(args, data, model)
    checkpoint = checkpoint_to_resume(args.training, metadata)

    # ---- Rows -> tokens ----
    train, valid = (
        build_yes_no_dataset(rows, data.dataset, tokenizer, model, metadata, prompt_id, seed=args.training.seed)
        for rows, prompt_id in ((data.train, None), (data.valid, 0))
    )
    lengths = {"train": train.lengths(longest=True), "valid": valid.lengths(longest=True)}
    model.config.answer = train.answer.yes
    answers = tokenizer.convert_ids_to_tokens(list(train.answer))
    log(f"the score is the logit of {answers[0]!r} (token {model.config.answer}); no is {answers[1]!r}")
    if not args.training.deepspeed or metadata.load_in_4bit:  # DeepSpeed takes the model to the GPU in half precision
        model.to(args.training.device)  # type: ignore[arg-type]
    if not is_continued(args):
        fit_scales(args.method.method, data, model, tokenizer, metadata)
    sizes = {
        part: sum(w.numel() for name, w in model.named_parameters() if model.component_of(name) == part)
        for part in model.config.trained
    }
    log(
        f"{model.config.base_model}: {model.language.num_parameters():,} parameters; trained are "
        + ", ".join(f"{size:,} of {part}" for part, size in sizes.items())
    )
    for part, samples in (("train", train), ("valid", valid)):
        rows = len(samples.users)
        log(f"  {part}: {rows:,} rows in {len(samples):,} trees, {lengths[part].sum() / rows:.1f} tokens a row")
        if samples.num_breaks:
            log(f"  {samples.num_breaks:,} histories do not continue the one before: their rows are in other trees")
        if samples.num_truncated:  # never at the question
            count, limit = samples.num_truncated, samples.limit
            log(f"  {count:,} prompts of {part} exceed {limit:,} tokens: the oldest titles are left out")
    return TrainingSetup(
        model=model,
        tokenizer=tokenizer,
        train=train,
        valid=valid,
        collator=YesNoCollator(tokenizer),
        lengths=lengths["train"],
        metadata=metadata,
        checkpoint=checkpoint,
        # The part of a collaborative model that scores is not used for its vectors.
        find_unused_parameters=True if "cf_model" in model.config.trained else None,
    )


def build_evaluation(args: Arguments, data: YesNoData, setup: TrainingSetup) -> Callable[[], dict[str, float]]:
    """Return a function that scores the rows of valid: loss, AUC and UAUC.

    Raises:
        InputError: the metric that selects the model does not exist for these rows, whatever their scores.
    """
    scorer = Scorer(setup.model, data.dataset, setup.metadata, setup.tokenizer)
    users, labels = (to_numpy(data.valid, name) for name in ("uid", "label"))
    training = args.training
    half = torch.bfloat16 if training.bf16 else torch.float16
    metric, constant = training.metric_for_best_model, np.zeros(len(labels))
    defined = valid_metrics(users, labels, constant)
    if training.eval_strategy != "no" and np.isnan(defined[str(metric)]):
        reason = "no user of its rows has both labels" if metric == "uauc" else "its rows have one label"
        raise InputError(
            f"{data.dataset.folder / 'valid.parquet'}: {reason}, so that there is no {metric}; see "
            "--metric_for_best_model, --max_eval_samples"
        )

    def compute_valid_metrics() -> dict[str, float]:
        with torch.autocast(training.device.type, half, enabled=training.bf16 or training.fp16):
            scores = scorer.score_samples(setup.valid, training.per_device_eval_batch_size)
        log_odds = torch.as_tensor(setup.model.log_odds(scores))
        loss = F.binary_cross_entropy_with_logits(log_odds, torch.tensor(labels).float()).item()
        metrics = {"loss": loss, **valid_metrics(users, labels, scores)}
        return {name: value for name, value in metrics.items() if not np.isnan(value)}

    return compute_valid_metrics


def finish_model(args: Arguments, model: Any) -> None:
    """Have the saved folder hold the base model's weights as well, with --save_base_weights."""
    if args.yes_no.save_base_weights:
        model.include_base_weights()


def fit_scales(
    method: str,
    data: YesNoData,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    metadata: CheckpointMetadata,
) -> None:
    """Fit the normalization of collaborative vectors, and the offset in the loss, to rows of train."""
    rows = np.random.default_rng(0).permutation(len(data.train))
    if "projector" in model.config.trained and method != "softprompt":  # whose embeddings are all alike
        inputs = model_inputs(data.train.select(rows[:NORMALIZATION_SAMPLES]), model.cf_model)
        model.fit_normalization(inputs["users"], inputs["items"], inputs.get("histories"))
    scorer = Scorer(model, data.dataset, metadata, tokenizer)
    samples = scorer.encode(data.train.select(rows[:OFFSET_SAMPLES]))
    liked = to_numpy(data.train, "label").mean()
    model.config.offset = float(scorer.score_samples(samples, OFFSET_SAMPLES).mean() - np.log(liked / (1 - liked)))


def checkpoint_metadata(args: Arguments, data: YesNoData, model: YesNoModel) -> CheckpointMetadata:
    """Return what a test must know to ask the model as it was trained, and to refuse other ratings."""
    config, yes_no = model.config, asdict(args.yes_no)
    flags = {flag: value for flag, value in yes_no.items() if flag not in OTHER_FLAGS}
    flags |= {"init_from": args.model.init_from}
    flags |= {flag: absolute_name(flags[flag]) for flag in ("cf_model", "init_from") if flags[flag]}
    flags |= {"metric_for_best_model": args.training.metric_for_best_model}
    flags |= {"max_eval_samples": args.data.max_eval_samples, "seed": args.training.seed, "trained": config.trained}
    flags |= {"train_data_sample_num": int(args.method.train_data_sample_num)} | asdict(args.lora)
    return CheckpointMetadata(
        method=args.method.method,
        dataset=data.dataset.name,
        base_model=config.base_model,
        base_dtype=config.base_dtype,
        base_sha256=config.base_sha256,
        load_in_4bit=bool(config.load_in_4bit),
        bf16=args.training.bf16,
        prompts={task: [asdict(template) for template in templates] for task, templates in data.prompts.items()},
        max_his_len=args.data.max_his_len,
        his_sep=args.data.his_sep,
        history_window=args.yes_no.history_window,
        rows_per_tree=args.yes_no.rows_per_tree,
        code_format=args.yes_no.code_format if args.method.method == "binllm" else None,
        ratings_sha256=data.dataset.sha256(),
        items_sha256=data.dataset.items_sha256(),
        cf_sha256=config.cf_sha256,
        training=flags,
        items={item: {"title": str(texts["title"])} for item, texts in data.dataset.items.items()},
    )


# ---- The model of a method, assembled from its first stage and its collaborative model ----


def assemble_model(args: Arguments, dataset: RatingsDataset) -> YesNoModel:
    """Return the model that is to be trained: on its first stage where there is one, with its collaborative model."""
    method, yes_no = args.method.method, args.yes_no
    kind, _ = YES_NO_METHODS[method]
    low_rank = args.lora.low_rank(*LORA_DEFAULTS)
    config, language = load_first_stage(args)
    lora = (method in LORA_METHODS or yes_no.one_stage) if args.lora.lora is None else args.lora.lora
    if lora and not config.lora:
        config.lora = low_rank
        add_lora(language, **low_rank)
    elif lora and kind is not CoRA and low_rank not in (config.lora, LoraArguments().low_rank(*LORA_DEFAULTS)):
        raise InputError(
            "--lora_r, --lora_alpha, --lora_dropout, --lora_target_modules: the LoRA weights of "
            f"{args.model.init_from} are trained further as they are; leave these flags out"
        )
    trained = {"lora"} if lora else {"language"} if trains_base(args) else set()
    if method not in LORA_METHODS:
        trained |= {"projector"} | ({"cf_model"} if yes_no.train_cf_model or yes_no.cf_model_from_scratch else set())
    cf_model: CollaborativeModel | None = None
    if method in CF_METHODS:
        cf_model = load_cf_model(args, dataset)
        config.cf_model, config.cf_sha256 = absolute_name(yes_no.cf_model or ""), weights_sha256(cf_model)
        cf_model = reinitialized(cf_model) if yes_no.cf_model_from_scratch else cf_model
    elif method in ("softprompt", "personprompt"):
        sizes: dict[str, Any] = {"num_users": dataset.num_users, "num_items": dataset.num_items}
        sizes = dict.fromkeys(sizes, 2) if method == "softprompt" else sizes
        cf_model = MF(MFConfig(**sizes, embedding_size=PROMPT_WIDTH, initializer_range=0.1))
        trained |= {"cf_model"}
    kept = {"language", "cf_model"} if is_continued(args) else {"language"}
    saved = trained | kept & set(config.saved or ()) | ({"lora"} if config.lora else set())
    own: dict[str, object] = {"cf_config": cf_model and cf_model.config.to_dict()}
    if kind is CoLLM:
        own |= {"soft_tokens": yes_no.soft_tokens, "one_for_all": method == "softprompt"}
    elif kind is CoRA:
        own |= {"r" if key == "rank" else key: value for key, value in low_rank.items()}
    values = config.to_dict() | own | {"trained": sorted(trained), "saved": sorted(saved)}
    del values["model_type"]
    model = kind(kind.config_class(**values), language, cf_model)
    if is_continued(args):
        copy_own_weights(model, args.model.init_from or "")
    return model


def trains_base(args: Arguments) -> bool:
    """Return whether the weights of the base model themselves are trained."""
    return args.method.method in LORA_METHODS and args.lora.lora is False


def is_continued(args: Arguments) -> bool:
    """Return whether --init_from is a checkpoint of the method itself, not of its first stage."""
    folder = args.model.init_from
    return bool(folder) and CheckpointMetadata.load(str(folder)).method == args.method.method


def load_first_stage(args: Arguments) -> tuple[YesNoConfig, PreTrainedModel]:
    """Return config and language model of --init_from, or those of the base model.

    Raises:
        InputError: the checkpoint is neither of tallrec nor of the method itself.
    """
    overrides: dict[str, Any] = {"load_in_4bit": args.model.load_in_4bit, "base_dtype": args.model.base_dtype}
    base_model = args.model.base_model and absolute_name(args.model.base_model)
    folder = args.model.init_from
    if not folder:
        given = {key: value for key, value in overrides.items() if value is not None}
        if not trains_base(args):
            training, in_4bit = args.training, bool(args.model.load_in_4bit)
            given = {"base_dtype": frozen_dtype(training.device.type, training.bf16, in_4bit)} | given
        config = YesNoConfig(base_model=base_model or "", **given)
        language = open_language(config, args.training.device)
        config.base_sha256 = base_fingerprint(config.base_model)
        return config, language
    method, own = CheckpointMetadata.load(folder).method, args.method.method
    if method not in ("tallrec", own):
        further = "" if own == "tallrec" else f" or {own}"
        raise InputError(f"--init_from {folder}: was made by {method!r}; give one of tallrec{further}")
    parts, device = ("language", "lora"), args.training.device
    first = YesNoModel.from_pretrained(folder, parts, device, base_model=base_model, **overrides)
    if "language" in first.config.saved:  # with the weights of the folder, not of the base model
        for name, weight in first.language.named_parameters():
            weight.data = weight.data if "lora_" in name else weight.data.to(getattr(torch, first.config.base_dtype))
    return cast(YesNoConfig, first.config), first.language


def load_cf_model(args: Arguments, dataset: RatingsDataset) -> CollaborativeModel:
    """Return the collaborative model of --cf_model; InputError if it is of another kind or of other ratings."""
    folder = args.yes_no.cf_model or ""
    model = load_collaborative(folder)
    check_same_dataset(model, dataset)
    if args.method.method == "binllm" and not isinstance(model, HashedMF):
        raise InputError(f"{folder}: is a model of type {model.config.model_type!r}; binllm reads one of hash")
    return model
