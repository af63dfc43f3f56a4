"""Like-rates as text: the share of likes among the earlier ratings of an item, or of a user ("68%").

The simplest statistics that a collaborative model has to beat. Only ratings of train from before a row's own time are
counted, for rows of every part alike; the mean that smooths them is that of all of train. Leaving out just the row
itself would reveal its label: of two rows of one item, the liked one would have one like less.
"""

import numpy as np
from datasets import Dataset

from reclingua.datasets.ratings import to_numpy

SMOOTHING = 5  # ratings with the mean label that every item and user is given
RATE_FIELDS = {"item_rate": "iid", "user_rate": "uid"}  # field of `prompts.RATES` -> column of a row


def rates_before(train: Dataset, rows: Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the likes and the ratings of each row's item or user in `train` before the row's time, int64 [rows]."""
    ids, times, labels = (to_numpy(train, name).astype(np.int64) for name in (column, "timestamp", "label"))
    order = np.lexsort((times, ids))
    moments = np.unique(times)
    key = lambda ids, times: ids * (len(moments) + 1) + np.searchsorted(moments, times)  # noqa: E731  # id, then time
    keys, likes = key(ids, times)[order], np.concatenate([[0], np.cumsum(labels[order])])
    asked = to_numpy(rows, column).astype(np.int64)
    ends = np.searchsorted(keys, key(asked, to_numpy(rows, "timestamp").astype(np.int64)))
    starts = np.searchsorted(keys, asked * (len(moments) + 1))
    return likes[ends] - likes[starts], ends - starts


def rate_texts(train: Dataset, rows: Dataset, fields: set[str]) -> dict[str, list[str]]:
    """Return field -> text of each row, a smoothed like-rate in percent, for those of RATE_FIELDS in `fields`.

    Smoothing, (likes + SMOOTHING x mean) / (ratings + SMOOTHING), puts the rate and its reliability into one number.
    """
    mean, texts = float(to_numpy(train, "label").mean()), {}
    for field in sorted(fields & RATE_FIELDS.keys()):
        likes, ratings = rates_before(train, rows, RATE_FIELDS[field])
        percent = 100 * (likes + SMOOTHING * mean) / (ratings + SMOOTHING)
        texts[field] = [f"{value:.0f}%" for value in percent.tolist()]
    return texts
