"""RecTrainer: the one Trainer subclass, with our batches, chunked loss, ranking metrics and atomic checkpoints."""

import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from reclingua.datasets.collators import move_batch
from reclingua.datasets.samplers import LengthGroupedBatchSampler, RepeatedBatchSampler
from reclingua.models.chunked_loss import ChunkedCrossEntropy
from reclingua.training.arguments import TuningArguments
from reclingua.training.callbacks import (
    ConsoleLogCallback,
    ProgressBarCallback,
    RelocateBestCallback,
    SaveOnSigtermCallback,
    SetEpochCallback,
    StopAtMaxStepsCallback,
    StopOnNanCallback,
    ThroughputCallback,
)
from reclingua.training.checkpoints import STAGING_DIR, commit_checkpoint, report_disk_full, rotate_checkpoints
from reclingua.training.compilation import compile_layers, without_compilation
from reclingua.training.throughput import Throughput
from reclingua.training.zero import gather_state_dict, gathered_parameters, saves_sharded_state
from reclingua.utils.metadata import CheckpointMetadata


def build_batches(
    args: TuningArguments, train: Any, lengths: Sequence[int], packing: bool
) -> LengthGroupedBatchSampler:
    """Return the batches of this process.

    Args:
        train: the samples, with their `lengths` in the current epoch.
        lengths: largest number of tokens that each sample can have in any epoch.
        packing: whether samples are packed.
    """
    order = args.train_sampling_strategy
    return LengthGroupedBatchSampler(
        lengths,
        args.per_device_train_batch_size,
        args.max_tokens_per_batch,
        packing,
        "random" if packing and order == "group_by_length" else order,
        args.seed if args.data_seed is None else args.data_seed,
        args.process_index,
        args.world_size,
        epoch_lengths=train.lengths,
    )


class RecTrainer(transformers.Trainer):
    """Trainer for recommendation models.

    Args:
        batches: batch sampler; each process has its own share.
        max_logits_mb: memory for the logits of one chunk of the loss, MB; None: the model computes its own loss, from
            labels float [samples].
        compute_valid_metrics: returns the metrics of the model on valid, e.g. {"hit@10": 0.1, "ndcg@10": 0.05} for a
            next-item model; None skips them.
        metadata: saved with every checkpoint, so that `test.py` can rebuild the prompts of the training; None for a
            run that saves nothing.
    """

    model: PreTrainedModel
    deepspeed: Any  # the engine, None without DeepSpeed
    train_dataset: Any  # a torch Dataset with `set_epoch`

    def __init__(
        self,
        *args,
        batches: LengthGroupedBatchSampler | RepeatedBatchSampler,
        max_logits_mb: int | None,
        compute_valid_metrics: Callable[[], dict[str, float]] | None,
        metadata: CheckpointMetadata | None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.batches, self.compute_valid_metrics, self.metadata = batches, compute_valid_metrics, metadata
        self.staging_dir: str | None = None
        self.save_limit: int | None = None  # --save_total_limit
        self.chunked_loss, self.labels_are_tokens = None, max_logits_mb is not None
        if max_logits_mb is not None:
            try:
                self.chunked_loss = ChunkedCrossEntropy(self.model, max_logits_mb)
                self.compute_loss_func = self._mean_over_targets
            except ValueError as error:  # the model's own loss is used instead
                if self.is_world_process_zero():
                    print(f"{error}: its output head is applied at every position, label or not")
        if self.args.torch_compile:
            compile_layers(self.model)
        self.throughput = Throughput(self.model, self.args.device)
        self.preemption, self.relocation = SaveOnSigtermCallback(), RelocateBestCallback()
        self._set_callbacks()

    def _set_callbacks(self) -> None:
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressBarCallback)
        self.add_callback(ConsoleLogCallback)
        self.add_callback(StopOnNanCallback)
        self.add_callback(self.relocation)
        self.add_callback(self.preemption)
        self.add_callback(SetEpochCallback(self.train_dataset.set_epoch, self.batches.set_epoch))
        self.add_callback(StopAtMaxStepsCallback(self.batches))
        self.add_callback(ThroughputCallback(self.throughput))

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:  # type: ignore[override]  # one argument
        """Train, and handle SIGTERM meanwhile.

        Raises:
            Preempted: SIGTERM came; the newest checkpoint is that of the step at which it came.
        """
        previous_handler = signal.signal(signal.SIGTERM, lambda *_: setattr(self.preemption, "sigterm_received", True))
        # The Trainer would delete old checkpoints in place; `_save_checkpoint` rotates them instead.
        self.save_limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            self.relocation.resumed = resume_from_checkpoint
            return super().train(resume_from_checkpoint)
        finally:
            self.args.save_total_limit = self.save_limit
            signal.signal(signal.SIGTERM, previous_handler)

    # ---- Batches ----

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of our batches, unprepared: accelerate would split them among the processes once more."""
        return self._loader(self.train_dataset, batch_sampler=self.batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return a loader of the samples in order; the base class would encode all of them to sort them by length."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.accelerator.prepare(self._loader(dataset, batch_size=self.args.eval_batch_size))

    def _loader(self, dataset: Dataset, **batching) -> DataLoader:
        return DataLoader(
            dataset,
            **batching,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=ignore_sigterm,
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Start the copies of a batch to the device, which come from pinned memory, without waiting for them."""
        return super()._prepare_inputs(move_batch(inputs, self.args.device))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a batch; the base class would walk over all weights in each step."""
        return int(self.throughput.flops[1] * inputs["input_ids"].numel())

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss at labelled positions, the only ones with logits.

        Its mean is over all targets of an update, those of other processes and of accumulated batches included.
        """
        inputs.pop("skip_logits", None)  # meant for the loss that Liger would put into the model
        lengths = inputs.pop("lengths")
        if model.training:
            self.throughput.add(inputs["labels"], lengths, inputs["input_ids"].numel())
        if self.chunked_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.chunked_loss.at_labels(inputs["labels"]):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _mean_over_targets(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        assert self.chunked_loss is not None
        loss, self.chunked_loss.loss = self.chunked_loss.loss, None  # or its gradients would outlive the update
        # ZeRO-3 gathers a module's weights for the backward pass when the gradient reaches what the module returned.
        return (loss + 0 * outputs.logits.sum()) / num_items_in_batch

    # ---- Evaluation ----

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Return the loss on valid and the metrics of `compute_valid_metrics`; throughput excludes their time."""
        compilation = without_compilation() if self.args.torch_compile else nullcontext()
        with self.throughput.paused(), compilation:
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Add the valid metrics within `evaluate`, so that early stopping and the choice of the best see them."""
        if self.labels_are_tokens:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        else:  # the valid metrics contain the loss
            output = EvalLoopOutput(np.empty(0), None, {}, len(dataloader.dataset))
        with gathered_parameters(self.deepspeed):
            metrics = self.compute_valid_metrics() if self.compute_valid_metrics else {}
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics=(output.metrics or {}) | prefixed)

    # ---- Checkpoints ----

    def _save_checkpoint(self, model, trial) -> None:
        """Save an atomic checkpoint.

        All processes write into the staging folder. When all are done, the first one renames it to checkpoint-N and
        deletes old checkpoints, so that a run killed at any moment leaves complete checkpoints only.
        """
        output_dir = self._output_dir()
        staging_dir, name = output_dir / STAGING_DIR, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self.throughput.paused(), report_disk_full(output_dir, staging_dir):
            if self.args.should_save:
                shutil.rmtree(staging_dir, ignore_errors=True)  # left by a run that was killed
            self.accelerator.wait_for_everyone()
            self.staging_dir = str(staging_dir)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.staging_dir = None
            if self.state.best_global_step == self.state.global_step and self.state.best_model_checkpoint:
                self.state.best_model_checkpoint = str(output_dir / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staging_dir / name / TRAINER_STATE_NAME))
                commit_checkpoint(staging_dir / name, output_dir / name)
                best_name = Path(self.state.best_model_checkpoint or name).name
                rotate_checkpoints(output_dir, self.save_limit, name, best_name)
            self.accelerator.wait_for_everyone()

    def _output_dir(self) -> Path:
        assert self.args.output_dir is not None  # finetune.py requires it
        return Path(self.args.output_dir)

    def _get_output_dir(self, trial) -> str:
        return self.staging_dir or super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; with DeepSpeed, gathered from all processes or as the training states that contain it."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        output_dir = output_dir or str(self._output_dir())
        is_sharded = saves_sharded_state(self.deepspeed, self.model)
        self._save(output_dir, {} if is_sharded else gather_state_dict(self.deepspeed, self.model))
        if is_sharded and not _internal_call:  # a checkpoint has the training states anyway
            self.deepspeed.save_checkpoint(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_best_model(self) -> None:
        """Load the best checkpoint; `--save_total_limit 1` then deletes the newest if that is another one."""
        with self.throughput.paused():
            super()._load_best_model()
            self.accelerator.wait_for_everyone()
            if self.args.should_save and self.save_limit == 1:
                best_name = Path(self.state.best_model_checkpoint or "").name
                rotate_checkpoints(self._output_dir(), 1, best_name, best_name)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return  # every process comes here, one writes
        folder = Path(output_dir or self._output_dir())
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nothing here reads
        if self.metadata is not None:
            self.metadata.save(folder)


def ignore_sigterm(worker: int) -> None:
    """Make a data loader's process ignore SIGTERM.

    The signal is often sent to a whole process group; without its data loader a training could not end the step.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
