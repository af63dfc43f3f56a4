"""Histories -> instruction datasets: `datasets.Dataset`s of what is to be asked and answered, still without words.

A sample has the columns task, user, history (rendered items, oldest first), target (a rendered item, "" where the
history itself is the target) and part, parts (which stretch of a long history a sample is; see `stretch`).
The words come later, drawn anew in each epoch (data/collate.py).
"""

import datasets

from data.dataset import RecDataset
from errors import InputError

TASKS = ("seqrec",)
SUPERVISE = ("next", "history")
COLUMNS = datasets.Features(
    {
        "task": datasets.Value("string"),
        "user": datasets.Value("string"),
        "history": datasets.List(datasets.Value("string")),
        "target": datasets.Value("string"),
        "part": datasets.Value("int32"),
        "parts": datasets.Value("int32"),
    }
)


def render(dataset: RecDataset, history: list[str]) -> list[str]:
    """Items as their indices: ["3", "8"] -> ["<a_1><b_7>", "<a_4><b_2>"]."""
    return ["".join(dataset.index[item]) for item in history]


def train_samples(dataset: RecDataset, supervise: str, max_his_len: int, sample_num: int = 0, seed: int = 0):
    """The training samples of seqrec.

    Args:
        supervise: "next", LC-Rec's way: a user of n training items gives n - 1 samples (history, next item), the
            history cut to its last `max_his_len` items. "history": a history is one sample (a long one several,
            of `max_his_len` targets each) in which every item after the first is a target.
        sample_num: draw this many of them; 0 takes all.
    """

    def pairs():
        for user in dataset.histories:
            items = render(dataset, dataset.train_history(user))
            for at in range(1, len(items)):
                yield sample("seqrec", user, items[max(0, at - max_his_len) : at], items[at])

    def histories():
        for user in dataset.histories:
            items = render(dataset, dataset.train_history(user))
            parts = -(-(len(items) - 1) // max_his_len)
            for part in range(parts):
                yield sample("seqrec_history", user, items, "", part, parts)

    rows = list(pairs() if supervise == "next" else histories())
    if not rows:
        raise InputError(f"{dataset.folder}: no user has two training interactions, so there is nothing to train on")
    samples = datasets.Dataset.from_list(rows, features=COLUMNS)
    if sample_num and sample_num < len(samples):
        samples = samples.shuffle(seed=seed).select(range(sample_num))
    return samples


def held_out_samples(dataset: RecDataset, part: str, supervise: str, max_his_len: int) -> datasets.Dataset:
    """One sample for each user that can be split: what came before the valid or test item, and that item."""
    rows = []
    for user in dataset.test_users:
        history, target = dataset.split(user, part)
        history, target = render(dataset, history[-max_his_len:]), render(dataset, [target])[0]
        rows.append(sample("seqrec" if supervise == "next" else "seqrec_history", user, history, target))
    return datasets.Dataset.from_list(rows, features=COLUMNS)


def sample(task: str, user: str, history: list[str], target: str, part: int = 0, parts: int = 1) -> dict:
    return {"task": task, "user": user, "history": history, "target": target, "part": part, "parts": parts}


def stretch(items: list[str], part: int, parts: int, size: int, shift: float) -> list[str]:
    """Stretch `part` of `parts`: up to `size` targets and the items before them that they are to be told from.

    The stretches tile the history, so each item after the first is a target exactly once. `shift` in [0, 1) moves the
    borders, so that over the epochs an item is predicted from contexts of many lengths.
    """
    slack = parts * size - (len(items) - 1)
    start = part * size - int(shift * (slack + 1))
    return items[max(0, start) : start + size + 1]
