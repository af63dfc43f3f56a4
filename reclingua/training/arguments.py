"""The flags of finetune.py: one dataclass a group, LC-Rec's names beside the Trainer's own, YAML presets beneath."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import is_liger_kernel_available

from reclingua.datasets.samplers import ORDERS
from reclingua.datasets.tasks import TARGETS, TASKS
from reclingua.datasets.yes_no import CODE_FORMATS
from reclingua.models.language import DTYPES
from reclingua.training.zero import check_deepspeed
from reclingua.utils.errors import InputError, one_line_errors

METHODS = ("lcrec", "tallrec", "collm", "binllm", "cora", "softprompt", "personprompt")


# What the Trainer knows, but our batches and our loss do not.
UNSUPPORTED = {
    "label_smoothing_factor": "is not known to the loss of the labels",
    "auto_find_batch_size": "has no meaning here: give --max_tokens_per_batch",
    "dataloader_drop_last": "has no meaning here: every sample is trained on",
    "dataloader_persistent_workers": "would keep the phrasings of the first epoch",
    "use_cache": "is for generation, and set by the search itself",
    "torch_compile": "does not work with the loss of the labels",
    "ddp_static_graph": "does not work with the loss of the labels",
    "fsdp": "is not supported; use --deepspeed",
    "save_only_model": "would leave nothing to go on from; a small folder is left by --lora",
    "enable_jit_checkpoint": "has no meaning here: SIGTERM always saves",
}


@dataclass
class ModelArguments:
    """Which language model is tuned."""

    _argument_group_name = "model"

    base_model: str = HfArg(
        default=None, help="folder or hub name of a decoder-only model (required, unless --init_from knows it)"
    )
    base_dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of frozen weights, what is trained is float32; if not said, float32 or that of --init_from",
            "choices": DTYPES,
        },
    )
    load_in_4bit: bool | None = field(
        default=None,
        metadata={
            "help": "frozen weights of linear layers as nf4; if not said, as --init_from has them",
            "nargs": "?",
            "const": True,
        },
    )
    load_in_8bit: bool = HfArg(default=False, help="frozen weights of linear layers as int8; lcrec's LoRA only")


@dataclass
class DataArguments:
    """What it is tuned on."""

    _argument_group_name = "data"

    dataset: str = HfArg(default="ml-100k", help="name of the dataset")
    data_path: str = HfArg(default="data", help="folder that holds <dataset>/")
    index_file: str = HfArg(default=".index.json", help="suffix of the index file, or a path to one if it has a slash")
    user_file: str = HfArg(default=".user.json", help="suffix of the file of what users say, or a path to one")
    prompt_file: str | None = HfArg(
        default=None, help="phrasings, instead of config/prompts/lcrec.yaml (lcrec) or config/prompts/yes_no.yaml"
    )
    max_his_len: int = HfArg(default=20, help="items of a history that the model reads; -1 with lcrec: all")
    max_text_len: int = HfArg(default=64, help="words of a title, a description or what a user says, at most")
    his_sep: str = HfArg(default=", ", help="what stands between two items of a history")
    add_prefix: bool = HfArg(default=False, help="number the items of a history")


@dataclass
class MethodArguments:
    """How it is tuned: what LC-Rec takes."""

    _argument_group_name = "method"

    method: str = field(default="lcrec", metadata={"help": "way of tuning", "choices": METHODS})
    tasks: str = HfArg(default="seqrec", help=f"training tasks, separated by commas, of: {', '.join(TASKS)}")
    train_prompt_sample_num: str = HfArg(
        default="1", help="phrasings per sample and epoch, one number a task or one for all"
    )
    train_data_sample_num: str = HfArg(
        default="0", help="training samples of each task, one number a task or one for all; 0 = all"
    )
    targets: str = field(
        default="next",
        metadata={
            "help": "next: a sample per prefix of a history, as LC-Rec; history: a sample per history, all its items "
            "after the first are targets",
            "choices": TARGETS,
        },
    )
    only_train_response: bool = HfArg(default=True, help="loss on the response alone; False: on the prompt as well")
    packing: bool = HfArg(default=False, help="lay samples end to end instead of padding them")
    embedding_dropout: float = HfArg(default=0.0, help="dropout on the input embeddings while training")
    valid_users: int = HfArg(default=500, help="users whose valid item is searched for at each evaluation; 0 = all")
    exclude_seen: bool = HfArg(default=False, help="take a user's own items out of the candidates at evaluation")


@dataclass
class LoraArguments:
    """Low-rank weights."""

    _argument_group_name = "LoRA (with cora: the weights that it makes)"

    lora: bool | None = field(
        default=None,
        metadata={
            "help": "train LoRA weights; if not said, tallrec and binllm do, and with --one_stage the others",
            "nargs": "?",
            "const": True,
        },
    )
    lora_r: int = HfArg(default=8, help="their rank")
    lora_alpha: float | None = HfArg(
        default=None, help="their scale is alpha / r; if not said 16, with lcrec LC-Rec's 32"
    )
    lora_dropout: float = HfArg(default=0.05, help="dropout on what they read")
    lora_target_modules: str | None = HfArg(
        default=None, help="linear layers that get them, by name; if not said q_proj,v_proj, with lcrec all of them"
    )

    def low_rank(self, alpha: float, targets: str) -> dict:
        """rank, alpha, dropout and targets, `alpha` and `targets` where the flags do not say."""
        alpha = alpha if self.lora_alpha is None else self.lora_alpha
        if self.lora_r < 1 or alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise InputError("--lora_r should be 1 at least, --lora_alpha above 0, --lora_dropout from 0 to below 1")
        layers = (self.lora_target_modules or targets).split(",")
        return {"rank": self.lora_r, "alpha": alpha, "dropout": self.lora_dropout, "targets": layers}


@dataclass
class YesNoArguments:
    """How it is tuned: what the methods take that answer Yes or No."""

    _argument_group_name = "method: tallrec, collm, binllm, cora, softprompt, personprompt"

    cf_model: str | None = HfArg(default=None, help="folder of a collaborative model, from pretrain.py")
    init_from: str | None = HfArg(default=None, help="folder of the first stage, from --method tallrec")
    train_cf_model: bool = HfArg(default=False, help="train the collaborative model on (T1)")
    cf_model_from_scratch: bool = HfArg(default=False, help="train the collaborative model from new weights (T2)")
    one_stage: bool = HfArg(default=False, help="train new LoRA weights together with the method's own parts (T3)")
    soft_tokens: int = HfArg(default=1, help="soft tokens for each user and item")
    code_format: str = field(
        default="bits", metadata={"help": "binllm's codes: 0110... or 172.16.254.3", "choices": CODE_FORMATS}
    )
    valid_samples: int = HfArg(default=0, help="valid rows at each evaluation, drawn at random; 0 = all")
    metric_for_best_model: str = field(
        default="auc", metadata={"help": "valid metric that picks the checkpoint", "choices": ("auc", "uauc")}
    )
    patience: int = HfArg(default=0, help="evaluations without a better one after which to stop; 0 = never")
    save_base_weights: bool = HfArg(
        default=False, help="save the base model's weights as well, not only what was trained"
    )


@dataclass
class TuningArguments(TrainingArguments):
    """Every flag of `transformers.TrainingArguments`, with LC-Rec's names and defaults where it has some."""

    _argument_group_name = "training"

    output_dir: str | None = HfArg(default=None, help="folder for checkpoints and the tuned model (required)")
    per_device_train_batch_size: int = HfArg(
        default=8, aliases=["--per_device_batch_size"], help="samples per device and step"
    )
    max_tokens_per_batch: int = HfArg(
        default=0, help="tokens per device and step, padding included, instead of a number of samples; 0 = by samples"
    )
    train_sampling_strategy: str = HfArg(
        default="group_by_length",
        help="batches of samples of one length: group_by_length (with --packing as random); random; sequential",
    )
    max_logits_mb: int = HfArg(default=512, help="MB for the logits that the loss looks at a time")
    num_train_epochs: float = HfArg(default=4, aliases=["--epochs"], help="passes over the training samples")
    learning_rate: float = HfArg(default=5e-5, help="peak learning rate of AdamW")
    weight_decay: float = HfArg(default=0.01, help="weight decay of AdamW")
    lr_scheduler_type: str = HfArg(default="cosine", help="shape of the learning rate's decay")
    warmup_steps: float = HfArg(default=0.01, help="steps of linear warm-up; below 1: share of all steps")
    eval_strategy: str = HfArg(default="epoch", help="when to evaluate: no, steps, epoch")
    save_strategy: str = HfArg(default="epoch", help="when to save a checkpoint: no, steps, epoch")
    save_and_eval_strategy: str | None = HfArg(default=None, help="sets both of these")
    save_total_limit: int | None = HfArg(default=1, help="checkpoints kept beside the best")
    load_best_model_at_end: bool = HfArg(default=True, help="end with the checkpoint of the best valid metric")
    metric_for_best_model: str | None = HfArg(
        default="ndcg@10", help="valid metric that picks it: hit@10, ndcg@10, loss"
    )
    logging_steps: float = HfArg(default=50, help="steps between two lines of the training log")
    report_to: str | None = HfArg(default="none", help="experiment loggers: tensorboard, wandb, ...")
    dataloader_pin_memory: bool = HfArg(
        default=torch.cuda.is_available(), help="pin batches in memory; helps with a GPU"
    )
    dataloader_num_workers: int = HfArg(
        default=4 if torch.cuda.is_available() else 0, help="processes that write out samples while a GPU computes"
    )
    logging_nan_inf_filter: bool = HfArg(default=False, help="leave a loss of NaN or infinity out of the log")
    remove_unused_columns: bool = HfArg(default=False, help="left to the collator")
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="checkpoint folder to go on from; auto: the newest complete one in output_dir, if any"
    )

    def __post_init__(self):
        if self.save_and_eval_strategy:
            self.eval_strategy = self.save_strategy = self.save_and_eval_strategy
        if self.eval_strategy == "no" or self.save_strategy == "no":
            self.load_best_model_at_end = False  # there will be no best to load
        if self.eval_steps is None:
            self.eval_steps = self.save_steps
        if self.train_sampling_strategy not in ORDERS:
            raise ValueError(f"--train_sampling_strategy should be one of {', '.join(ORDERS)}")
        for flag, instead in UNSUPPORTED.items():
            if getattr(self, flag):
                raise ValueError(f"--{flag} {instead}")
        if self.max_tokens_per_batch < 0 or self.max_logits_mb < 1 or self.per_device_train_batch_size < 1:
            raise ValueError(
                "--max_tokens_per_batch should be 0 at least, --max_logits_mb and --per_device_batch_size 1"
            )
        if self.use_liger_kernel:
            if not torch.cuda.is_available():
                raise ValueError("--use_liger_kernel needs a GPU")
            if not is_liger_kernel_available():
                raise ValueError("--use_liger_kernel needs `pip install liger-kernel`")
            # Liger's own losses would compute the head at every position.
            own_loss = {"cross_entropy": False, "fused_linear_cross_entropy": False}
            self.liger_kernel_config = (self.liger_kernel_config or {}) | own_loss
        if self.deepspeed:
            check_deepspeed(self.deepspeed, on_cpu=self.use_cpu or not torch.cuda.is_available())
        super().__post_init__()
        if self.deepspeed and self.hf_deepspeed_config.mismatches:
            wrong = "; ".join(each.removeprefix("- ds ") for each in self.hf_deepspeed_config.mismatches)
            raise ValueError(f"the file of --deepspeed says otherwise: {wrong}; give the flag, or auto in the file")
        if self.deepspeed and self.save_on_each_node:
            raise ValueError("--save_on_each_node: DeepSpeed's checkpoints go to a folder that all machines see")
        if self.push_to_hub and "checkpoint" in self.hub_strategy.value:
            raise ValueError("--hub_strategy: checkpoints cannot be pushed while they are written; take end")
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process: start with torchrun --nproc_per_node {self.n_gpu}, "
                "or show it one by CUDA_VISIBLE_DEVICES=0"
            )


def refuse_flags(method: str, group: object, flags: Iterable[str]) -> None:
    """InputError for one of these flags of a group that was given, although the method does not listen to it."""
    defaults = {field.name: field.default for field in fields(group)}
    for flag in flags:
        if getattr(group, flag) != defaults[flag]:
            raise InputError(f"--{flag} means nothing with --method {method}; leave it out")


def parse(dataclasses: list[type], description: str, argv: list[str] | None = None) -> tuple:
    """One filled dataclass for each given: defaults, then `--config preset.yaml`, then the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(dataclasses, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML preset: supplies defaults for the flags, the command line wins")
    declared = [f for dataclass_ in dataclasses for f in fields(dataclass_) if f.init]
    known = {f.name for f in declared} | {a.lstrip("-") for f in declared for a in f.metadata.get("aliases", [])}
    for at, word in enumerate(argv):
        if word == "--config" and at + 1 < len(argv):
            argv = preset_flags(argv[at + 1], known) + argv
        elif word.startswith("--config="):
            argv = preset_flags(word.partition("=")[2], known) + argv
    namespace = vars(one_line_errors(parser).parse_args(argv))
    try:
        return tuple(cls(**{f.name: namespace[f.name] for f in fields(cls) if f.init}) for cls in dataclasses)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"these flags do not go together: {error}") from None


def preset_flags(path: str, known: set[str]) -> list[str]:
    """The flags that a YAML preset stands for; InputError names the key that is no flag."""
    try:
        preset = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such preset") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable YAML file ({error})") from None
    if not isinstance(preset, dict):
        raise InputError(f"{path}: should hold 'flag: value' lines")
    flags = []
    for key, value in preset.items():
        if key not in known:
            raise InputError(f"{path}: {key!r} is not a flag of this script; see --help")
        if value is not None:
            value = "no" if value is False and key.endswith("strategy") else value  # YAML reads a bare no as false
            value = json.dumps(value) if isinstance(value, dict) else value
            flags += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return flags
