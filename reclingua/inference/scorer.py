"""Ask a tuned model Yes or No about many rows; what rows of a batch begin with is read once for all of them."""

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from reclingua.datasets.yes_no import YesNoCollator, YesNoDataset
from reclingua.models.yes_no import YesNoModel
from reclingua.utils.errors import InputError
from reclingua.utils.memory import run_with_oom_retry


def batches_of(questions: YesNoDataset, batch_size: int, by_beginning: bool) -> list[list[int]]:
    """Rows of each batch: neighbours in what comes before the item (or in length), the longest first."""
    places = []
    for i in range(len(questions)):
        sample = questions[i]
        ids = sample["input_ids"]
        places.append(
            (sample["shared"], hash(tuple(ids[: sample["shared"]])), len(ids)) if by_beginning else (len(ids),)
        )
    order = sorted(range(len(places)), key=places.__getitem__, reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def ask(
    model: YesNoModel, questions: YesNoDataset, batch_size: int, split: bool = False, show_progress: bool = True
) -> np.ndarray:
    """Logits of Yes, float32 [rows], by the model in evaluation mode.

    Args:
        split: share the batches out among the processes of the default group; each of them gets all logits. The
            batches are those of a single process, so that the number of processes changes no logit.

    Raises:
        InputError: memory does not suffice for one row; a logit is no number.
    """
    collate = YesNoCollator(questions.tokenizer)
    batches = batches_of(questions, batch_size, model.supports_prefix_sharing)
    if split:
        batches = batches[distributed.get_rank() :: distributed.get_world_size()]
    scores = torch.zeros(len(questions), device=model.device)

    @torch.no_grad()
    def answer(rows: list[int]) -> torch.Tensor:
        batch = collate([questions[i] for i in rows])
        del batch["labels"], batch["lengths"]
        return model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits

    was_training = model.training
    model.eval()
    bar = tqdm(
        total=sum(map(len, batches)), desc="ask", unit="row", disable=None if show_progress else True, leave=False
    )
    try:
        for rows, logits in run_with_oom_retry(answer, batches, "row", "take a smaller model, or shorter histories"):
            scores[rows] = logits
            bar.update(len(rows))
    finally:
        bar.close()
        model.train(was_training)
    if split:
        distributed.all_reduce(scores)
    if not scores.isfinite().all():
        raise InputError(
            "the model's scores are no numbers: lower --learning_rate, or compute in bfloat16 (--bf16), not in float16"
        )
    return scores.cpu().numpy()
