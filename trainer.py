"""The one Trainer subclass: new phrasings each epoch, ranking metrics at evaluation, a record in each checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import transformers
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

RECORD = "reclingua.json"  # in every checkpoint: how its prompts are made and what it was trained on


class NewEpoch(TrainerCallback):
    """Tells the training samples which epoch it is, also after a resume in the middle of one."""

    def __init__(self, set_epoch: Callable[[int], None]):
        self.set_epoch = set_epoch

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.set_epoch(int(state.epoch or 0))


class LogLines(TrainerCallback):
    """The training log in words, one line at a time, under the progress bar of a terminal or without one."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        where = f"  step {state.global_step:>6,} of {state.max_steps:,}, epoch {state.epoch or 0:.1f}   "
        if "loss" in logs:
            tqdm.write(f"{where}loss {float(logs['loss']):.4f}   learning rate {float(logs['learning_rate']):.1e}")
        elif ranking := {name: value for name, value in logs.items() if "@" in name}:
            tqdm.write(where + "   ".join(f"{name.replace('eval_', 'valid ')} {v:.4f}" for name, v in ranking.items()))


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar without its dump of the log."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        pass


class RecTrainer(transformers.Trainer):
    """A Trainer for generative recommendation.

    Args:
        rank: measures the model by search over the valid users, e.g. {"hit@10": 0.1, "ndcg@10": 0.05}; None skips it.
        record: what `test.py` must know to ask the model as it was trained; saved with every checkpoint.
    """

    def __init__(self, *args, rank: Callable[[], dict[str, float]] | None, record: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.rank, self.record = rank, record
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(QuietProgress)
        self.add_callback(LogLines)
        self.add_callback(NewEpoch(self.train_dataset.set_epoch))

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        """Loss on the valid items, and the ranking metrics of a search for them."""
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.rank is not None:
            ranking = {f"{metric_key_prefix}_{name}": value for name, value in self.rank().items()}
            self.log(ranking)
            metrics |= ranking
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle; the record says the same in the open
        (folder / RECORD).write_text(json.dumps(self.record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end (its trainer state comes last), or None."""
    found = [
        folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (folder / "trainer_state.json").exists()
    ]
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
