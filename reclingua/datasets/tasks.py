"""Samples of LC-Rec's six tasks (section 3.2): histories, items and user texts as `datasets.Dataset`s.

A sample names items by their ids and contains no prompt yet: its prompt template is drawn anew in each epoch
(reclingua/datasets/instructions.py). Columns, empty where a task does not use them:
    task; user; history (the user's items, oldest first); item (the target);
    preferences (texts about the user); intentions (the user's request, in the user's words and as a description);
    part, parts (number of a segment of a long history, and of all its segments; see `history_segment`).
"""

from collections.abc import Iterator, Sequence
from secrets import token_hex

import datasets
import pyarrow as pa

from reclingua.datasets.interactions import InteractionDataset
from reclingua.datasets.user_texts import UserTexts
from reclingua.utils.errors import InputError

TASKS = ("seqrec", "item2index", "index2item", "fusionseqrec", "itemsearch", "preferenceobtain")
TEST_TASKS = {"SeqRec": "seqrec", "ItemSearch": "itemsearch", "FusionSeqRec": "fusionseqrec"}  # LC-Rec's names
TEXT_TASKS = ("item2index", "index2item", "fusionseqrec")  # need item texts
USER_TASKS = ("itemsearch", "preferenceobtain")  # need user texts
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
    """Return the name of the seqrec task: with whole histories as samples it is "seqrec_history"."""
    return "seqrec" if targets == "last" else "seqrec_history"


def train_samples(
    dataset: InteractionDataset,
    task: str,
    max_his_len: int,
    texts: UserTexts | None = None,
    count: int = 0,
    seed: int = 0,
) -> datasets.Dataset:
    """Return the training samples of one task.

    seqrec and fusionseqrec: a user of n training items gives n - 1 samples (history, next item), the history cut to
    its last `max_his_len` items. seqrec_history: a history is one sample (a long one several, of `max_his_len` targets
    each) where every item after the first is a target. item2index and index2item: every item. itemsearch: every
    user with an intention. preferenceobtain: every user with preferences, and the history before
    the last training item, from which the preferences were generated.

    Args:
        count: number of samples to draw; 0 returns all.

    Raises:
        InputError: no sample exists.
    """
    texts = texts or UserTexts()
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
            make_sample(task, user, dataset.train_history(user)[:-1][-max_his_len:], preferences=preferences)
            for user, preferences in texts.preferences.items()
            if len(dataset.train_history(user)) > 1
        )
    samples = _of_rows(rows)
    if not len(samples):
        raise InputError(f"{dataset.folder}: has nothing to train {task} on: {_LACKING[task]}")
    if count and count < len(samples):
        samples = samples.shuffle(seed=seed).select(range(count)).flatten_indices()
    return samples


def next_item_samples(dataset: InteractionDataset, task: str, max_his_len: int) -> datasets.Dataset:
    """Return the samples of seqrec, one for each training item but a user's first, under the name of `task`.

    A sample's history is cut to its last `max_his_len` items; InputError if no sample exists.
    """
    samples = _of_rows(_pairs(dataset, task, max_his_len))
    if not len(samples):
        raise InputError(f"{dataset.folder}: has nothing to train on: {_LACKING['seqrec']}")
    return samples


_LACKING = {
    **dict.fromkeys(("seqrec", "seqrec_history", "fusionseqrec"), "no user has two training interactions"),
    **dict.fromkeys(("item2index", "index2item"), "there are no items"),
    **dict.fromkeys(USER_TASKS, "no user has the texts it needs; see python -m data.intentions"),
}


def held_out_samples(
    dataset: InteractionDataset, part: str, task: str, max_his_len: int, texts: UserTexts | None = None
) -> datasets.Dataset:
    """Return one sample for each user: the history before the valid or test item, and that item as the target.

    For itemsearch, with `part` "test", these are the users with preferences and an intention, who fit every prompt
    template.
    """
    if task == "itemsearch":
        texts = texts or UserTexts()
        users = texts.preferences.keys() & set(dataset.test_users)
        return _of_rows(row for row in _searches(dataset, texts, part, max_his_len) if row[1] in users)
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
    """Return the values of a sample in the order of COLUMNS."""
    return task, user, history or [], item, preferences or [], intentions or [], part, parts


def empty_samples() -> datasets.Dataset:
    """Return no samples, with the columns of samples."""
    return datasets.Dataset(COLUMNS.arrow_schema.empty_table())


def history_samples(task: str, histories: Sequence[Sequence[str]], max_his_len: int) -> datasets.Dataset:
    """Return a sample for each history of item ids, oldest first, of nobody in the dataset and without a target."""
    return _of_rows(make_sample(task, history=list(history[-max_his_len:])) for history in histories)


def _of_rows(rows: Iterator[tuple]) -> datasets.Dataset:
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    schema = COLUMNS.arrow_schema
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=schema)  # from_dict would take three times as long
    return datasets.Dataset(table, fingerprint=token_hex(8))  # nothing is cached by it, so it need not be computed


def _pairs(dataset: InteractionDataset, task: str, max_his_len: int) -> Iterator[tuple]:
    for user in dataset.histories:
        items = dataset.train_history(user)
        for target in range(1, len(items)):
            yield make_sample(task, user, items[max(0, target - max_his_len) : target], items[target])


def _histories(dataset: InteractionDataset, max_his_len: int) -> Iterator[tuple]:
    for user in dataset.histories:
        items = dataset.train_history(user)
        parts = -(-(len(items) - 1) // max_his_len)
        for part in range(parts):
            yield make_sample("seqrec_history", user, items, part=part, parts=parts)


def _searches(dataset: InteractionDataset, texts: UserTexts, part: str, max_his_len: int) -> Iterator[tuple]:
    for user, intention in texts.intentions[part].items():
        preferences, queries = texts.preferences.get(user), [intention.of_user, intention.of_item]
        yield make_sample("itemsearch", user, intention.history[-max_his_len:], intention.item, preferences, queries)


def history_segment(items: list[str], part: int, parts: int, size: int, shift: float) -> list[str]:
    """Return segment `part` of `parts`: up to `size` targets, and the item before them as their first context.

    The segments tile the history, so each item after the first is a target exactly once. `shift` in [0, 1) moves their
    boundaries, so that over the epochs an item is predicted from contexts of many lengths:

        size 3, shift 0     a[b c d]      d[e f g]      g[h]          brackets: targets
        size 3, shift .9    a[b]          b[c d e]      e[f g h]
    """
    slack = parts * size - (len(items) - 1)
    start = part * size - int(shift * (slack + 1))
    return items[max(0, start) : start + size + 1]
