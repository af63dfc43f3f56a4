"""Histories, items and what users say -> instruction datasets: what is to be asked and answered, as `Dataset`s.

LC-Rec's six tasks (section 3.2). A sample names items by their ids and is still without words: which phrasing it gets
is drawn anew in each epoch (reclingua/datasets/instructions.py). Its columns, empty where a task has no use for them:
    task; user; history (what the user had, oldest first); item (the target);
    preferences (texts on the user); intentions (what the user is looking for: in the user's words, described);
    part, parts (which stretch of a long history a sample is; see `stretch`).
"""

from collections.abc import Iterator

import datasets
import pyarrow as pa

from reclingua.datasets.interactions import RecDataset
from reclingua.datasets.user_texts import UserTexts
from reclingua.utils.errors import InputError

TASKS = ("seqrec", "item2index", "index2item", "fusionseqrec", "itemsearch", "preferenceobtain")
TEST_TASKS = {"SeqRec": "seqrec", "ItemSearch": "itemsearch", "FusionSeqRec": "fusionseqrec"}  # LC-Rec's names
TEXT_TASKS = ("item2index", "index2item", "fusionseqrec")  # need item texts
USER_TASKS = ("itemsearch", "preferenceobtain")  # need what users say
TARGETS = ("last", "all")
COLUMNS = datasets.Features(
    {
        "task": datasets.Value("string"),
        "user": datasets.Value("string"),
        "history": datasets.List(datasets.Value("string")),
        "item": datasets.Value("string"),
        "preferences": datasets.List(datasets.Value("string")),
        "intentions": datasets.List(datasets.Value("string")),
        "part": datasets.Value("int32"),
        "parts": datasets.Value("int32"),
    }
)


def seqrec_task(targets: str) -> str:
    """What seqrec is called: with whole histories as samples it is another task, "seqrec_history"."""
    return "seqrec" if targets == "last" else "seqrec_history"


def train_samples(
    dataset: RecDataset, task: str, max_his_len: int, texts: UserTexts | None = None, count: int = 0, seed: int = 0
) -> datasets.Dataset:
    """The training samples of one task.

    seqrec and fusionseqrec: a user of n training items gives n - 1 samples (history, next item), the history cut to
    its last `max_his_len` items. seqrec_history: a history is one sample (a long one several, of `max_his_len` targets
    each) in which every item after the first is a target. item2index and index2item: every item. itemsearch: every
    user with an intention. preferenceobtain: every user with preferences, and the history before the
    last training item, as these were made from.

    Args:
        count: draw this many of them; 0 takes all.

    Raises:
        InputError: there is no such sample.
    """
    if task in ("seqrec", "fusionseqrec"):
        rows = _pairs(dataset, task, max_his_len)
    elif task == "seqrec_history":
        rows = _histories(dataset, max_his_len)
    elif task in ("item2index", "index2item"):
        rows = (make_sample(task, item=item) for item in dataset.item_ids)
    elif task == "itemsearch":
        rows = _searches(dataset, texts, "train", max_his_len)
    else:
        rows = (
            make_sample(task, user, dataset.train_history(user)[:-1][-max_his_len:], preferences=found)
            for user, found in texts.preferences.items()
            if len(dataset.train_history(user)) > 1
        )
    samples = _of_rows(rows)
    if not len(samples):
        raise InputError(f"{dataset.folder}: has nothing to train {task} on: {_LACKING[task]}")
    if count and count < len(samples):
        samples = samples.shuffle(seed=seed).select(range(count)).flatten_indices()
    return samples


_LACKING = {
    **dict.fromkeys(("seqrec", "seqrec_history", "fusionseqrec"), "no user has two training interactions"),
    **dict.fromkeys(("item2index", "index2item"), "there are no items"),
    **dict.fromkeys(USER_TASKS, "no user has the texts it needs; see python -m data.intentions"),
}


def held_out_samples(
    dataset: RecDataset, part: str, task: str, max_his_len: int, texts: UserTexts | None = None
) -> datasets.Dataset:
    """One sample for each user that can be asked: what came before the valid or test item, and that item.

    Of itemsearch, whose `part` is "test", these are the users with preferences and an intention: every phrasing can be
    asked of them.
    """
    if task == "itemsearch":
        able = texts.preferences.keys() & set(dataset.test_users)
        return _of_rows(row for row in _searches(dataset, texts, part, max_his_len) if row[1] in able)
    held_out = ((user, *dataset.split(user, part)) for user in dataset.test_users)
    return _of_rows(make_sample(task, user, history[-max_his_len:], item) for user, history, item in held_out)


def make_sample(
    task: str,
    user: str = "",
    history: list[str] | None = None,
    item: str = "",
    preferences: list[str] | None = None,
    intentions: list[str] | None = None,
    part: int = 0,
    parts: int = 1,
) -> tuple:
    """The columns of a sample, in their order."""
    return task, user, history or [], item, preferences or [], intentions or [], part, parts


def _of_rows(rows: Iterator[tuple]) -> datasets.Dataset:
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    schema = COLUMNS.arrow_schema
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    return datasets.Dataset(pa.Table.from_arrays(arrays, schema=schema))  # from_dict would take three times as long


def _pairs(dataset: RecDataset, task: str, max_his_len: int) -> Iterator[tuple]:
    for user in dataset.histories:
        items = dataset.train_history(user)
        for at in range(1, len(items)):
            yield make_sample(task, user, items[max(0, at - max_his_len) : at], items[at])


def _histories(dataset: RecDataset, max_his_len: int) -> Iterator[tuple]:
    for user in dataset.histories:
        items = dataset.train_history(user)
        parts = -(-(len(items) - 1) // max_his_len)
        for part in range(parts):
            yield make_sample("seqrec_history", user, items, part=part, parts=parts)


def _searches(dataset: RecDataset, texts: UserTexts, part: str, max_his_len: int) -> Iterator[tuple]:
    for user, found in texts.intentions[part].items():
        said, queries = texts.preferences.get(user), [found.of_user, found.of_item]
        yield make_sample("itemsearch", user, found.history[-max_his_len:], found.item, said, queries)


def stretch(items: list[str], part: int, parts: int, size: int, shift: float) -> list[str]:
    """Stretch `part` of `parts`: up to `size` targets and the items before them that they are to be told from.

    The stretches tile the history, so each item after the first is a target exactly once. `shift` in [0, 1) moves the
    borders, so that over the epochs an item is predicted from contexts of many lengths.
    """
    slack = parts * size - (len(items) - 1)
    start = part * size - int(shift * (slack + 1))
    return items[max(0, start) : start + size + 1]
