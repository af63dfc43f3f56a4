"""The one Trainer subclass: our batches and our loss, our metrics at evaluation, checkpoints that survive any end."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from reclingua.datasets.samplers import LengthGroupedBatchSampler
from reclingua.models.chunked_loss import ChunkedCrossEntropy
from reclingua.training.callbacks import (
    ConsoleLogCallback,
    ProgressBarCallback,
    SaveOnSigtermCallback,
    SetEpochCallback,
    StopAtMaxStepsCallback,
    StopOnNanCallback,
    ThroughputCallback,
)
from reclingua.training.checkpoints import STAGING_DIR, commit_checkpoint, report_disk_full, rotate_checkpoints
from reclingua.training.throughput import Throughput
from reclingua.training.zero import gather_state_dict, gathered_parameters, saves_sharded_state
from reclingua.utils.metadata import METADATA_FILE


def ignore_sigterm(worker: int) -> None:
    """For processes that read samples: SIGTERM is often sent to all, and without them no step could be ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class RecTrainer(transformers.Trainer):
    """A Trainer for recommendation.

    Args:
        batches: which samples go together; its own share for each process.
        max_logits_mb: memory that the loss of the labels may use for logits at a time; None: the model has a loss of
            its own, from labels float [samples].
        measure: metrics of the model on valid, e.g. {"hit@10": 0.1, "ndcg@10": 0.05} by search; None skips it.
        record: what `test.py` must know to ask the model as it was trained; saved with every checkpoint.
    """

    def __init__(
        self,
        *args,
        batches: LengthGroupedBatchSampler,
        max_logits_mb: int | None,
        measure: Callable[[], dict[str, float]] | None,
        record: dict,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.batches, self.measure, self.record = batches, measure, record
        self.staging_dir: str | None = None
        self.kept: int | None = None  # checkpoints beside the best
        self.chunked_loss, self.labels_are_tokens = None, max_logits_mb is not None
        if self.labels_are_tokens:
            try:
                self.chunked_loss = ChunkedCrossEntropy(self.model, max_logits_mb)
                self.compute_loss_func = self._mean_over_targets
            except ValueError as error:  # then the model's own loss it is
                if self.is_world_process_zero():
                    print(f"{error}: its output head is applied at every position, label or not")
        self.throughput = Throughput(self.model, self.args.device)
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressBarCallback)
        self.add_callback(ConsoleLogCallback)
        self.add_callback(StopOnNanCallback)
        self.preemption = SaveOnSigtermCallback()
        self.add_callback(self.preemption)
        self.add_callback(SetEpochCallback(self.train_dataset.set_epoch, batches.set_epoch))
        self.add_callback(StopAtMaxStepsCallback(batches))
        self.add_callback(ThroughputCallback(self.throughput))

    def train(self, *args, **kwargs) -> TrainOutput:
        """Raises:
        Preempted: SIGTERM came, and the newest checkpoint is of the step at which it did.
        """
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self.preemption, "told", True))
        self.kept, self.args.save_total_limit = self.args.save_total_limit, None  # the Trainer would delete in place
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.save_total_limit = self.kept
            signal.signal(signal.SIGTERM, before)

    def get_train_dataloader(self) -> DataLoader:
        """Not prepared by accelerate, which would share out the batches among the processes once more."""
        return self._loader(self.train_dataset, batch_sampler=self.batches)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """The samples as they come. The base class would write out every one to sort them by length."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.accelerator.prepare(self._loader(dataset, batch_size=self.args.eval_batch_size))

    def _loader(self, dataset: Dataset, **batches) -> DataLoader:
        return DataLoader(
            dataset,
            **batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=ignore_sigterm,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the labels, without logits anywhere else; its mean is over all targets of an update, those of
        other processes and accumulated batches included."""
        inputs.pop("skip_logits", None)  # meant for a loss that Liger would put into the model
        lengths = inputs.pop("lengths")
        if model.training:
            self.throughput.add(inputs["labels"], lengths, inputs["input_ids"].numel())
        if self.chunked_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.chunked_loss.at_labels(inputs["labels"]):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _mean_over_targets(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        loss, self.chunked_loss.loss = self.chunked_loss.loss, None  # or its gradients would outlive the update
        # ZeRO-3 gathers a module's weights for the backward pass when the gradient reaches what the module returned.
        return (loss + 0 * outputs.logits.sum()) / num_items_in_batch

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Loss on valid, and what `measure` finds there."""
        with self.throughput.paused():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Within `evaluate`, so that early stopping and the choice of the best see all metrics."""
        if self.labels_are_tokens:
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        else:  # what is measured tells the loss, too
            output = EvalLoopOutput(None, None, {}, len(dataloader.dataset))
        with gathered_parameters(self.deepspeed):
            found = self.measure() if self.measure else {}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def _save_checkpoint(self, model, trial) -> None:
        """Under another name until every process has written its part: a checkpoint is complete or invisible."""
        output_dir = Path(self.args.output_dir)
        unfinished, name = output_dir / STAGING_DIR, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self.throughput.paused(), report_disk_full(output_dir, unfinished):
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            self.accelerator.wait_for_everyone()
            self.staging_dir = str(unfinished)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.staging_dir = None
            if self.state.best_global_step == self.state.global_step and self.state.best_model_checkpoint:
                self.state.best_model_checkpoint = str(output_dir / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
                commit_checkpoint(unfinished / name, output_dir / name)
                rotate_checkpoints(output_dir, self.kept, name, Path(self.state.best_model_checkpoint or name).name)
            self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial) -> str:
        return self.staging_dir or super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """With DeepSpeed, the weights of all processes: as a model, or as training states, which they are part of."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        output_dir = output_dir or self.args.output_dir
        apart = saves_sharded_state(self.deepspeed, self.model)
        self._save(output_dir, {} if apart else gather_state_dict(self.deepspeed, self.model))
        if apart and not _internal_call:  # a checkpoint has the training states anyway
            self.deepspeed.save_checkpoint(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_best_model(self) -> None:
        """And with `--save_total_limit 1` keep that one alone."""
        with self.throughput.paused():
            super()._load_best_model()
            self.accelerator.wait_for_everyone()
            if self.args.should_save and self.kept == 1:
                best = Path(self.state.best_model_checkpoint).name
                rotate_checkpoints(Path(self.args.output_dir), 1, best, best)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return  # every process comes here, one writes
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle; the record says the same in the open
        (folder / METADATA_FILE).write_text(
            json.dumps(self.record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
