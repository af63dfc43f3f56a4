"""DeepSpeed ZeRO: weights, gradients and optimizer states shared out among processes, and when a whole is needed.

A model is loaded, extended and looked at whole in every process, as without DeepSpeed. ZeRO-3 takes it apart when
training begins and puts it together again for a search on valid, so that no method has to know of it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from reclingua.utils.errors import InputError


def check_deepspeed(config: str | dict, on_cpu: bool) -> None:
    """ValueError where a training with this configuration (a JSON file, or its content) cannot begin."""
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

        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling, for what gloo does as well


@contextmanager
def without_zero3_init(args: transformers.TrainingArguments) -> Iterator[None]:
    """Inside it models are loaded whole, not in the pieces of ZeRO-3."""
    if args.deepspeed:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


def check_zero3_support(model: PreTrainedModel, args: transformers.TrainingArguments) -> None:
    """InputError for weights that ZeRO-3 cannot take apart."""
    quantised = not all(weight.is_floating_point() for weight in model.parameters())
    if args.deepspeed and args.hf_deepspeed_config.is_zero3() and quantised:
        raise InputError("ZeRO-3 cannot share out weights in 4 or 8 bits; take --deepspeed config/ds_z2_bf16.json")


def gathered_parameters(engine: torch.nn.Module | None):
    """A context in which every process has all weights of a model that ZeRO-3 has taken apart; else it does nothing.

    They may be read there, by each process in its own time, but not changed.
    """
    if engine is None or not engine.zero_optimization_partition_weights():
        return nullcontext()
    from deepspeed.runtime.zero import unwrap_model_for_generation

    return unwrap_model_for_generation(engine)


def saves_sharded_state(engine: torch.nn.Module, model: PreTrainedModel) -> bool:
    """Whether what is saved are the training states of all processes, of which `convert.zero_to_fp32` makes a model.

    So `stage3_gather_16bit_weights_on_model_save` false tells ZeRO-3. What saves only a part of itself, as an adapter
    does, is small enough to be put together.
    """
    gathers = not engine.zero_optimization_partition_weights() or engine.zero_gather_16bit_weights_on_model_save()
    return not gathers and not _saves_a_part(model)


def gather_state_dict(engine: torch.nn.Module, model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """What a folder of `model` is to hold, on the CPU, by name; None: all its weights as they are.

    All processes have to call it, the first one gets the weights: those of a whole model in the dtype that it computes
    in, those of an adapter, or of what else saves only a part of itself, in float32, as the optimizer has them.
    """
    if not _saves_a_part(model):
        return engine._zero3_consolidated_16bit_state_dict() if engine.zero_optimization_partition_weights() else None
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if hasattr(model, "peft_config"):
        saved = {name for name, weight in model.named_parameters() if weight.requires_grad}
    else:
        saved = model.state_dict().keys() - model._keys_to_ignore_on_save
    state = {name: buffer.cpu() for name, buffer in model.named_buffers() if name in saved}
    for name, weight in model.named_parameters():
        if name not in saved:
            continue
        found = safe_get_full_fp32_param(weight) if weight.requires_grad else None
        if found is None:
            with GatheredParameters([weight]):
                found = weight.detach().clone()
        state[name] = found.cpu()
    return state


def _saves_a_part(model: PreTrainedModel) -> bool:
    return hasattr(model, "peft_config") or bool(model._keys_to_ignore_on_save)
