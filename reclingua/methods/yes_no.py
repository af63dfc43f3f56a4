"""TALLRec, CoLLM, BinLLM, CoRA, soft and personalised prompts: will this user like this item, Yes or No?"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn import functional as F

from reclingua.datasets.prompts import YES_NO_FIELDS, YES_NO_PROMPT_FILE, read_prompts
from reclingua.datasets.ratings import RatingsDataset, open_ratings, sample_ratings, to_numpy
from reclingua.datasets.yes_no import YesNoCollator
from reclingua.inference.collaborative import check_same_dataset, model_inputs
from reclingua.inference.loading import questions_of
from reclingua.inference.scorer import ask
from reclingua.methods import TrainingSetup
from reclingua.metrics.roc import auc, uauc
from reclingua.models.collaborative import load_collaborative, weights_sha256
from reclingua.models.collaborative.base import CollaborativeModel
from reclingua.models.collaborative.hash import HashedMF
from reclingua.models.collaborative.mf import MF, MFConfig
from reclingua.models.collm import CoLLM
from reclingua.models.cora import CoRA
from reclingua.models.language import load_tokenizer
from reclingua.models.lora import add_lora
from reclingua.models.registry import YES_NO_METHODS
from reclingua.models.yes_no import YesNoConfig, YesNoModel, open_language
from reclingua.training.arguments import (
    DataArguments,
    LoraArguments,
    MethodArguments,
    ModelArguments,
    TuningArguments,
    YesNoArguments,
    refuse_flags,
)
from reclingua.training.checkpoints import checkpoint_to_resume
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json
from reclingua.utils.metadata import METADATA_FILE

LORA_METHODS = ("tallrec", "binllm")  # what these train is LoRA weights, and nothing else
CF_METHODS = ("collm", "binllm", "cora")
OFFSET_SAMPLES = 32  # of train, by which the level of the logits before training is known
NORMALIZATION_SAMPLES = 4096  # of train, by which the scale of collaborative vectors is known
LORA_DEFAULTS = (16, "q_proj,v_proj")  # alpha and target layers where the flags say none
PROMPT_WIDTH = 64  # of the embeddings that soft and personalised prompts begin with


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    method_args: MethodArguments,
    lora_args: LoraArguments,
    args: YesNoArguments,
    training_args: TuningArguments,
    log: Callable[[str], None],
) -> TrainingSetup:
    """Samples, model and evaluation by AUC, from the flags; InputError for those that cannot be."""
    method = method_args.method
    check_flags(method, model_args, data_args, method_args, lora_args, args, training_args)
    training_args.metric_for_best_model, training_args.greater_is_better = args.metric_for_best_model, True

    # ---- Data ----
    dataset = open_ratings(data_args.data_path, data_args.dataset)
    _, task = YES_NO_METHODS[method]
    prompts = read_prompts(
        data_args.prompt_file or YES_NO_PROMPT_FILE, {name: YES_NO_FIELDS[name] for name in {"text", task}}
    )
    train, valid = dataset.parts["train"], dataset.parts["valid"]
    count = int(method_args.train_data_sample_num)
    if 0 < count < len(train):
        train = train.shuffle(seed=training_args.seed).select(range(count))
    valid = sample_ratings(valid, data_args.max_eval_samples)
    for part, rows in (("train", train), ("valid", valid)):
        if len(set(to_numpy(rows, "label").tolist())) < 2:
            raise InputError(f"{dataset.folder}: the {len(rows)} rows taken of {part} are all of one label; take more")
    liked = to_numpy(train, "label").mean()
    log(
        f"{dataset.name}: {len(train):,} of {len(dataset.parts['train']):,} training rows, "
        f"{len(valid):,} of {len(dataset.parts['valid']):,} valid"
    )

    # ---- Model ----
    model = build_model(method, model_args, lora_args, args, dataset)
    tokenizer = load_tokenizer(args.init_from or model_args.base_model)
    record = {
        "method": method,
        "dataset": dataset.name,
        "ratings_sha256": dataset.sha256(),
        "base_model": model.config.base_model,
        "base_dtype": model.config.base_dtype,
        "load_in_4bit": model.config.load_in_4bit,
        "cf_sha256": model.config.cf_sha256,
        "trained": model.config.trained,
        "train_data_sample_num": count,
        "max_his_len": data_args.max_his_len,
        "his_sep": data_args.his_sep,
        "prompts": [asdict(template) for template in prompts[task]],
        "text_prompts": [asdict(template) for template in prompts["text"]],
        "seed": training_args.seed,
        **asdict(lora_args),
        **{flag: value for flag, value in asdict(args).items() if flag not in ("patience", "save_base_weights")},
    }
    checkpoint = checkpoint_to_resume(training_args, record)
    if "cf_model" in model.config.trained and training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = True  # what scores in a collaborative model makes no vector

    # ---- Rows -> tokens ----
    questions = {
        part: questions_of(rows, dataset, tokenizer, model, record, template, seed=training_args.seed)
        for part, rows, template in (("train", train, None), ("valid", valid, 0))
    }
    lengths = {part: rows.lengths(longest=True) for part, rows in questions.items()}
    model.config.answer = questions["train"].answer.yes
    answers = tokenizer.convert_ids_to_tokens(list(questions["train"].answer))
    log(f"the score is the logit of {answers[0]!r} (token {model.config.answer}); no is {answers[1]!r}")
    model.to(training_args.device)
    shuffled = np.random.default_rng(0).permutation(len(train))
    if "projector" in model.config.trained and method != "softprompt":  # whose embeddings are all alike
        inputs = model_inputs(train.select(shuffled[:NORMALIZATION_SAMPLES]), model.cf_model)
        model.fit_normalization(inputs["users"], inputs["items"], inputs.get("histories"))
    some = questions_of(train.select(shuffled[:OFFSET_SAMPLES]), dataset, tokenizer, model, record)
    level = ask(model, some, OFFSET_SAMPLES, show_progress=False).mean()
    model.config.offset = float(level - np.log(liked / (1 - liked)))
    sizes = {
        part: sum(w.numel() for name, w in model.named_parameters() if model.component_of(name) == part)
        for part in model.config.trained
    }
    log(
        f"{model.config.base_model}: {model.language.num_parameters():,} parameters; trained are "
        + ", ".join(f"{size:,} of {part}" for part, size in sizes.items())
    )
    for part, rows in questions.items():
        if rows.cut:  # never at the question
            log(f"  {rows.cut:,} prompts of {part} exceeded {rows.limit:,} tokens: their oldest titles are left out")

    # ---- Evaluation: ask about the rows of valid ----
    users, labels = (to_numpy(valid, name) for name in ("uid", "label"))

    def measure() -> dict[str, float]:
        device = training_args.device.type
        half = torch.bfloat16 if training_args.bf16 else torch.float16
        with torch.autocast(device, half, enabled=training_args.bf16 or training_args.fp16):
            scores = ask(
                model,
                questions["valid"],
                training_args.per_device_eval_batch_size,
                split=distributed.is_initialized(),
                show_progress=False,
            )
        figures = {
            "loss": F.binary_cross_entropy_with_logits(
                model.log_odds(torch.tensor(scores)), torch.tensor(labels).float()
            ).item(),
            "auc": auc(labels, scores),
            "uauc": uauc(users, labels, scores)["uauc"],
        }
        figures = {name: value for name, value in figures.items() if not np.isnan(value)}
        if args.metric_for_best_model not in figures:
            raise InputError(
                f"{dataset.folder / 'valid.parquet'}: its rows have no {args.metric_for_best_model}; see --max_eval_samples"
            )
        return figures

    return TrainingSetup(
        model=model,
        tokenizer=tokenizer,
        train=questions["train"],
        valid=questions["valid"],
        collator=YesNoCollator(tokenizer),
        lengths=lengths["train"],
        measure=measure,
        record=record,
        max_logits_mb=None,
        checkpoint=checkpoint,
    )


def check_flags(
    method: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    method_args: MethodArguments,
    lora_args: LoraArguments,
    args: YesNoArguments,
    training_args: TuningArguments,
) -> None:
    """InputError for flags that contradict each other or the method."""
    if not method_args.train_data_sample_num.isdecimal():
        raise InputError(f"--train_data_sample_num {method_args.train_data_sample_num}: should be one whole number")
    if method in CF_METHODS and not args.cf_model:
        raise InputError(f"--cf_model is required with --method {method}: a folder made by python pretrain.py")
    refuse_flags(method, data_args, ["index_file", "user_file", "max_text_len", "add_prefix"])
    refuse_flags(method, model_args, ["load_in_8bit"])
    heard = {"cf_model": method in CF_METHODS, "soft_tokens": YES_NO_METHODS[method][0] is CoLLM}
    heard |= {"code_format": method == "binllm"}
    refuse_flags(method, args, [flag for flag, listens in heard.items() if not listens])
    if args.init_from and args.one_stage:
        raise InputError("--one_stage trains both stages at once: leave --init_from out")
    if args.one_stage and (method in LORA_METHODS or lora_args.lora is False):
        raise InputError("--one_stage trains LoRA weights beside the method's own parts: not with tallrec or binllm")
    if (args.train_cf_model or args.cf_model_from_scratch) and method not in ("collm", "cora"):
        raise InputError(f"--train_cf_model and --cf_model_from_scratch are for collm and cora, not for {method}")
    if args.soft_tokens < 1:
        raise InputError(f"--soft_tokens {args.soft_tokens}: should be 1 at least")
    if min(data_args.max_eval_samples, args.patience) < 0:
        raise InputError("--max_eval_samples and --patience should be 0 at least")
    if training_args.metric_for_best_model not in (TuningArguments.metric_for_best_model, args.metric_for_best_model):
        raise InputError(
            f"--metric_for_best_model means nothing with --method {method}: give --metric_for_best_model auc or uauc"
        )
    if args.patience and not training_args.load_best_model_at_end:
        raise InputError("--patience needs --load_best_model_at_end and evaluations (--save_and_eval_strategy)")
    if lora_args.lora is False and method in LORA_METHODS and model_args.load_in_4bit:
        raise InputError("--load_in_4bit: weights in 4 bits cannot be tuned themselves; leave --lora False out")
    if args.save_base_weights and model_args.load_in_4bit:
        raise InputError("--save_base_weights is for weights in full, not with --load_in_4bit")


def build_model(
    method: str,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    args: YesNoArguments,
    dataset: RatingsDataset,
) -> YesNoModel:
    """The model that is to be trained: on its first stage where there is one, with its collaborative model."""
    kind, _ = YES_NO_METHODS[method]
    lora = (method in LORA_METHODS or args.one_stage) if lora_args.lora is None else lora_args.lora
    how = {"load_in_4bit": model_args.load_in_4bit, "base_dtype": model_args.base_dtype}
    low_rank = lora_args.low_rank(*LORA_DEFAULTS)
    if args.init_from:
        first = read_json(Path(args.init_from) / METADATA_FILE, "the record of a first stage, from --method tallrec")
        if first.get("method") != "tallrec":
            raise InputError(f"--init_from {args.init_from}: was made by {first.get('method')!r}; give one of tallrec")
        earlier = YesNoModel.from_pretrained(args.init_from, base_model=model_args.base_model, **how)
        config, language = earlier.config, earlier.language
        if "language" in config.saved:  # with the weights of the folder, not of the base model
            for name, weight in language.named_parameters():
                weight.data = weight.data if "lora_" in name else weight.data.to(getattr(torch, config.base_dtype))
    else:
        config = YesNoConfig(base_model=model_args.base_model, **{key: v for key, v in how.items() if v is not None})
        language = open_language(config)
    if lora and not config.lora:
        config.lora = low_rank
        add_lora(language, **config.lora)
    elif (
        lora and kind is not CoRA and low_rank != config.lora and low_rank != LoraArguments().low_rank(*LORA_DEFAULTS)
    ):
        raise InputError(
            f"--lora_r, --lora_alpha, --lora_dropout, --lora_target_modules: the LoRA weights of {args.init_from} are "
            "trained on as they are; leave these flags out"
        )
    trained = {"lora"} if lora else {"language"} if method in LORA_METHODS else set()
    cf_model = None
    if method in CF_METHODS:
        cf_model = load_collaborative(args.cf_model)
        check_same_dataset(cf_model, dataset)
        if method == "binllm" and not isinstance(cf_model, HashedMF):
            raise InputError(
                f"{args.cf_model}: is a model of type {cf_model.config.model_type!r}; binllm reads one of hash"
            )
        config.cf_model, config.cf_sha256 = args.cf_model, weights_sha256(cf_model)
        if args.cf_model_from_scratch:
            cf_model = reinitialized(cf_model)
    elif method in ("softprompt", "personprompt"):
        rows = {"num_users": dataset.num_users, "num_items": dataset.num_items}
        rows = {name: 2 for name in rows} if method == "softprompt" else rows
        cf_model = MF(MFConfig(**rows, embedding_size=PROMPT_WIDTH, initializer_range=0.1))
        trained |= {"cf_model"}
    if method not in LORA_METHODS:
        trained |= {"projector"} | ({"cf_model"} if args.train_cf_model or args.cf_model_from_scratch else set())
    saved = trained | {"language"} & set(config.saved or ()) | ({"lora"} if config.lora else set())
    own = {}
    if kind is CoLLM:
        own = {"soft_tokens": args.soft_tokens, "one_for_all": method == "softprompt"}
    elif kind is CoRA:
        own = {"r" if key == "rank" else key: value for key, value in low_rank.items()}
    whole = config.to_dict() | own | {"cf_config": cf_model and cf_model.config.to_dict()}
    del whole["model_type"]
    return kind(kind.config_class(**whole | {"trained": sorted(trained), "saved": sorted(saved)}), language, cf_model)


def reinitialized(model: CollaborativeModel) -> CollaborativeModel:
    """A model of the same kind and size, with new weights; what is no weight, such as a graph, is kept."""
    new = type(model)(model.config)
    for name, buffer in model.named_buffers():
        new.get_buffer(name).copy_(buffer)
    return new.eval()
