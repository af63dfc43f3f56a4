"""Area under the ROC curve, for any number of groups of samples in one pass: AUC is one group, UAUC one a user."""

import numpy as np

from reclingua.utils.errors import InputError


def auc_of_groups(groups: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The AUC of every group of samples.

    A group's AUC is its share of (positive, negative) pairs in which the positive scores higher, ties counting half:
    the Mann-Whitney statistic, from mean ranks, as `sklearn.metrics.roc_auc_score` has it.

    Args:
        groups: [samples] what the samples are grouped by, e.g. user ids, of any type that sorts.
        labels: [samples] 0 or 1.
        scores: [samples] higher = more likely 1; infinite ones are as good as any.

    Returns:
        (the groups in sorted order [groups], float64 AUC [groups], NaN where a group has one class only).

    Raises:
        InputError: a score is NaN, a label is not 0 or 1, there is nothing to measure, or the lengths differ.
    """
    groups, labels, scores = np.asarray(groups), np.asarray(labels), np.asarray(scores)
    if not len(groups) == len(labels) == len(scores):
        raise InputError(f"{len(groups)} groups, {len(labels)} labels and {len(scores)} scores: not of one length")
    if not len(scores):
        raise InputError("no samples to measure")
    if np.isnan(scores).any():
        raise InputError(
            f"{np.isnan(scores).sum():,} of {len(scores):,} scores are NaN, the first that of sample "
            f"{np.isnan(scores).argmax()}: the model has diverged; lower its learning rate"
        )
    if not np.isin(labels, (0, 1)).all():
        at = int((~np.isin(labels, (0, 1))).argmax())
        raise InputError(f"sample {at} has label {labels[at]}: should be 0 or 1")

    # Sorted by group, then score: a run is what ties. Every member of a run gets the mean of the run's places.
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
    before = np.cumsum(samples) - samples  # ranks count from the beginning of all, not of the group
    rank_sum = np.bincount(group, weights=(rank - before[group]) * positive)
    with np.errstate(invalid="ignore", divide="ignore"):
        return names, (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """AUC of all samples; NaN where they have one class only."""
    return float(auc_of_groups(np.zeros(len(labels), np.int8), labels, scores)[1][0])


def uauc(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """{"uauc": mean AUC of a user, NaN if none counts, "users_counted", "users_left_out"} (CoLLM, section 4.1).

    Users whose samples all have one label have no AUC: they are left out, and counted.
    """
    each = auc_of_groups(users, labels, scores)[1]
    counted = each[~np.isnan(each)]
    return {
        "uauc": float(counted.mean()) if len(counted) else float("nan"),
        "users_counted": len(counted),
        "users_left_out": len(each) - len(counted),
    }
