"""Trees of ratings: rows of one user whose histories continue each other share one trunk of liked titles.

A row's prompt shows the user's liked titles so far and asks about one item. The rows of a user mostly repeat each
other's titles; a tree has them once, and each row sees the trunk up to its own time:

    trunk          instruction   liked 1   liked 2   liked 3
    row 1                             \\ question 1
    row 2                                       \\ question 2
    row 3                                       \\ question 3
    row 4                                                 \\ question 4
"""

from typing import NamedTuple

import numpy as np

HISTORY_WINDOWS = ("anchored", "sliding")


class Histories(NamedTuple):
    """Liked items of all rows, one after another: int64 items [all], int64 offsets [rows + 1]."""

    items: np.ndarray
    offsets: np.ndarray

    def shown(self, row: int, start: int) -> np.ndarray:
        """Return the liked items of a row from number `start`, oldest first."""
        return self.items[self.offsets[row] + start : self.offsets[row + 1]]


def window_starts(lengths: np.ndarray, window: int, kind: str) -> np.ndarray:
    """Return the number of the first liked item that a prompt shows, int64 [rows].

    "sliding" shows the last `window` items, as in the papers, so that two prompts rarely begin alike. "anchored" moves
    by `window` items at a time and shows the last `window` to 2 `window` - 1:

        liked items      0 ... window-1 ... 2 window-1  |  2 window ... 3 window-1  |  3 window ...
        first shown      0                              |  window                   |  2 window

    Either depends on the row alone.

    Args:
        lengths: int64 [rows], liked items of each row.
        kind: one of HISTORY_WINDOWS.
    """
    if kind == "sliding":
        return np.maximum(lengths - window, 0)
    return window * np.maximum(lengths // window - 1, 0)


def group_rows(
    users: np.ndarray, kinds: np.ndarray, histories: Histories, starts: np.ndarray, rows_per_tree: int
) -> tuple[list[np.ndarray], int]:
    """Group rows whose shown items continue each other.

    Args:
        users, kinds: int64 [rows]; rows of a tree agree in both.
        starts: int64 [rows], number of the first liked item that is shown.
        rows_per_tree: largest number of rows of a tree.

    Returns:
        int64 row numbers of each tree, the shortest history first, the trees in the order of their first rows; and how
        often a history did not continue the one before it, although user, kind and start agree.
    """
    lengths = np.diff(histories.offsets)
    order = np.lexsort((lengths, starts, kinds, users))
    runs: list[list[int]] = []
    num_breaks = 0
    for row in order.tolist():
        if runs:
            last = runs[-1][-1]
            if (users[last], kinds[last], starts[last]) == (users[row], kinds[row], starts[row]):
                before, shown = histories.shown(last, starts[last]), histories.shown(row, starts[row])
                if np.array_equal(before, shown[: len(before)]):
                    runs[-1].append(row)
                    continue
                num_breaks += 1
        runs.append([row])
    trees = [tree for run in runs for tree in np.array_split(np.array(run), -(-len(run) // rows_per_tree))]
    return sorted(trees, key=lambda tree: tree.min()), num_breaks
