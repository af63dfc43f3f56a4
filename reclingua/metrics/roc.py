"""Area under the ROC curve of any number of groups in one pass: AUC has one group, UAUC one group per user."""

import numpy as np

from reclingua.utils.errors import InputError


def auc_of_groups(groups: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the AUC of every group of samples.

    The AUC of a group is the share of its (positive, negative) pairs in which the positive scores higher, ties
    counting half: the Mann-Whitney statistic from mean ranks, equal to `sklearn.metrics.roc_auc_score`.

    Args:
        groups: [samples] group of each sample, e.g. user ids, of any sortable type.
        labels: [samples] 0 or 1.
        scores: [samples] higher means more likely 1; can be infinite.

    Returns:
        (groups in sorted order [groups], float64 AUC [groups], NaN where a group has one class only).

    Raises:
        InputError: a score is NaN, a label is not 0 or 1, there are no samples, or the lengths differ.
    """
    groups, labels, scores = np.asarray(groups), np.asarray(labels), np.asarray(scores)
    if not len(groups) == len(labels) == len(scores):
        raise InputError(
            f"{len(groups)} groups, {len(labels)} labels and {len(scores)} scores: the lengths should be equal"
        )
    if not len(scores):
        raise InputError("no samples to measure")
    if np.isnan(scores).any():
        raise InputError(
            f"{np.isnan(scores).sum():,} of {len(scores):,} scores are NaN, the first that of sample "
            f"{np.isnan(scores).argmax()}: the model has diverged; lower its learning rate"
        )
    if not np.isin(labels, (0, 1)).all():
        row = int((~np.isin(labels, (0, 1))).argmax())
        raise InputError(f"sample {row} has label {labels[row]}: should be 0 or 1")

    # Sorted by group, then score, ties form runs; every member of a run gets the mean of its ranks:
    #     group  a    a    a    a   | b    b
    #     score  0.1  0.4  0.4  0.9 | 0.2  0.3
    #     rank   1    2.5  2.5  4   | 5    6
    names, group = np.unique(groups, return_inverse=True)
    order = np.lexsort((scores, group))
    group, score, positive = group[order], scores[order], labels[order] == 1
    begins_run = np.r_[True, (group[1:] != group[:-1]) | (score[1:] != score[:-1])]
    run_starts = np.flatnonzero(begins_run)
    run_ends = np.r_[run_starts[1:], len(order)]
    rank = ((run_starts + run_ends + 1) / 2)[np.cumsum(begins_run) - 1]

    samples = np.bincount(group)
    positives = np.bincount(group, weights=positive)
    negatives = samples - positives
    offset = np.cumsum(samples) - samples  # ranks run through all groups: subtract the earlier groups' samples
    rank_sum = np.bincount(group, weights=(rank - offset[group]) * positive)
    with np.errstate(invalid="ignore", divide="ignore"):
        return names, (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the AUC of all samples; NaN if they have one class only."""
    return float(auc_of_groups(np.zeros(len(labels), np.int8), labels, scores)[1][0])


def uauc(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Return {"uauc": mean AUC over users, "users_counted", "users_left_out"} (CoLLM, section 4.1).

    Users whose samples all have one label have no AUC: they are left out and counted. The mean is NaN if all are.
    """
    user_aucs = auc_of_groups(users, labels, scores)[1]
    defined = user_aucs[~np.isnan(user_aucs)]
    return {
        "uauc": float(defined.mean()) if len(defined) else float("nan"),
        "users_counted": len(defined),
        "users_left_out": len(user_aucs) - len(defined),
    }
