"""DeepSpeed ZeRO: weights, gradients and optimizer states sharded among processes, and gathered where needed.

Every process loads and extends the whole model, as without DeepSpeed. ZeRO-3 shards it when training begins and
gathers it for the search on valid, so that methods need no code for it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from reclingua.utils.errors import InputError


def check_deepspeed(config: str | dict, on_cpu: bool) -> dict:
    """Return the content of this configuration, a JSON file or its content; ValueError if training cannot begin."""
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"--deepspeed {config}: no such file; see config/ds_*.json") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"--deepspeed {config}: not a readable JSON file ({error})") from None
    if not isinstance(config, dict) or not isinstance(zero := config.get("zero_optimization"), dict):
        raise ValueError("--deepspeed: the file should be an object with zero_optimization")
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(f"--deepspeed: zero_optimization.stage {zero.get('stage')!r} should be 1, 2 or 3")
    if "RANK" not in os.environ:
        raise ValueError("--deepspeed: start with torchrun --nproc_per_node <GPUs> finetune.py ...")
    if on_cpu:
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for a minute; gloo does the same
    return config


def check_precision(config: dict, precision: str) -> None:
    """Raise ValueError if a configuration computes in another precision than the flags: "bf16", "fp16" or ""."""
    for half, other in (("bf16", "fp16"), ("fp16", "bf16")):
        section = config.get(half)
        if isinstance(section, dict) and section.get("enabled") is True and precision != half:
            unset = f" --{other} False" if precision else ""
            raise ValueError(f"the file of --deepspeed computes in {half}, unlike the flags: add --{half}{unset}")


@contextmanager
def without_zero3_init(args: transformers.TrainingArguments) -> Iterator[None]:
    """Load whole models inside this context, not the shards of ZeRO-3."""
    if args.deepspeed:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


def check_zero3_support(model: PreTrainedModel, args: transformers.TrainingArguments) -> None:
    """Raise InputError for a quantised model, whose weights ZeRO-3 cannot shard."""
    is_quantised = not all(weight.is_floating_point() for weight in model.parameters())
    if args.deepspeed and args.hf_deepspeed_config.is_zero3() and is_quantised:
        raise InputError("ZeRO-3 cannot shard weights in 4 or 8 bits; take --deepspeed config/ds_z2_bf16.json")


def gathered_parameters(engine: Any) -> AbstractContextManager:
    """Return a context in which every process has all weights of a model sharded by ZeRO-3, to read but not to change.

    Without ZeRO-3 the context does nothing.
    """
    if engine is None or not engine.zero_optimization_partition_weights():
        return nullcontext()
    from deepspeed.runtime.zero import unwrap_model_for_generation

    return unwrap_model_for_generation(engine)


def saves_sharded_state(engine: Any, model: PreTrainedModel) -> bool:
    """Return whether the training states of all processes are saved, which `convert.zero_to_fp32` turns into a model.

    ZeRO-3 does so with `stage3_gather_16bit_weights_on_model_save` false, except for models that save only a part of
    their weights, as adapters do: these are small enough to be gathered.
    """
    gathers = not engine.zero_optimization_partition_weights() or engine.zero_gather_16bit_weights_on_model_save()
    return not gathers and not _saves_partially(model)


def gather_state_dict(engine: Any, model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Gather the weights that a folder of `model` holds, by name, on the CPU; None: all weights as they are.

    All processes have to call it; the first one gets the weights. A whole model keeps the dtype in which it computes;
    a model that saves only a part of its weights, as an adapter does, gets the optimizer's float32 copy.
    """
    if not _saves_partially(model):
        return engine._zero3_consolidated_16bit_state_dict() if engine.zero_optimization_partition_weights() else None
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if hasattr(model, "peft_config"):
        saved_names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    else:
        saved_names = model.state_dict().keys() - set(model._keys_to_ignore_on_save or ())
    state = {name: buffer.cpu() for name, buffer in model.named_buffers() if name in saved_names}
    for name, weight in model.named_parameters():
        if name not in saved_names:
            continue
        tensor = safe_get_full_fp32_param(weight) if weight.requires_grad else None
        if tensor is None:  # frozen: the optimizer has no copy
            with GatheredParameters([weight]):
                tensor = weight.detach().clone()
        state[name] = tensor.cpu()
    return state


def _saves_partially(model: PreTrainedModel) -> bool:
    return hasattr(model, "peft_config") or bool(model._keys_to_ignore_on_save)
