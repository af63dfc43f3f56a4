"""What test.py prints: the table of a model and its baselines, and the recommendations for three users."""

from collections.abc import Mapping, Sequence

from reclingua.datasets.interactions import InteractionDataset

Metrics = Mapping[str, float]


def summarize(by_prompt: Mapping[int, Metrics]) -> dict[str, dict[str, float]]:
    """Return the metrics over all prompts: "mean", "min" and "max"."""
    names = next(iter(by_prompt.values()))
    values = {name: [metrics[name] for metrics in by_prompt.values()] for name in names}
    return {
        "mean": {name: sum(numbers) / len(numbers) for name, numbers in values.items()},
        "min": {name: min(numbers) for name, numbers in values.items()},
        "max": {name: max(numbers) for name, numbers in values.items()},
    }


def print_users(
    dataset: InteractionDataset,
    histories: Sequence[Sequence[str]],
    targets: Sequence[str],
    longest_list: int | None,
    relation: str = "",
) -> None:
    """Print how many users are measured, and who is left out.

    Args:
        longest_list: largest k of the metrics where seen items are excluded; None: they are not.
        relation: how the histories relate to those of training.
    """
    more = f"; histories {relation}" if relation else ""
    print(f"{dataset.name}: {len(targets):,} test users, {len(dataset.item_ids):,} items{more}")
    if dataset.too_short:
        print(f"  {len(dataset.too_short):,} users have fewer than 3 interactions: left out")
    repeated = sum(target in history for history, target in zip(histories, targets, strict=True))
    if longest_list is None:
        return
    if repeated:
        print(f"  {repeated:,} users had their target before: with --exclude_seen it counts as a miss")
    num_left = [len(dataset.item_ids) - len({*history}) for history in histories]
    if empty := num_left.count(0):
        print(f"  {empty:,} users had every item: no item is left to recommend, which counts as a miss")
    if few := sum(0 < left <= longest_list for left in num_left):
        print(
            f"  {few:,} users have at most {longest_list} items left: a list of {longest_list} has their target, "
            "whatever the model"
        )


def print_rows(rows: Mapping[str, Metrics]) -> None:
    """Print a line of metrics for each name."""
    width = max(map(len, rows))
    print("\n" + " " * width + "".join(f"{name:>10}" for name in next(iter(rows.values()))))
    for row, metrics in rows.items():
        print(f"{row:<{width}}" + "".join(f"{value:>10.4f}" for value in metrics.values()))


def print_metrics(
    method: str, by_prompt: Mapping[int, Metrics], baselines: Mapping[str, Metrics], fused: Mapping[str, Metrics]
) -> None:
    """Print the metrics of the model, its worst and best prompt where there are several, and its fusions."""
    summary = summarize(by_prompt)
    rows = {**baselines, method: summary["mean"]}
    if len(by_prompt) > 1:
        rows |= {f"{method}, worst prompt": summary["min"], f"{method}, best prompt": summary["max"]}
    print_rows({**rows, **fused})


def print_examples(
    dataset: InteractionDataset,
    users: Sequence[str],
    targets: Sequence[str],
    histories: Sequence[Sequence[str]],
    lists: Sequence[Sequence[str]],
) -> None:
    """Print three users, spread over the list: the end of the history, the five best items, the item taken."""
    for row in sorted({0, len(users) // 2, len(users) - 1}):
        recent = "; ".join(dataset.title(item)[:50] for item in histories[row][-5:])
        print(f"\nuser {users[row]} had {len(histories[row])} items, the last: {recent}")
        for rank, item in enumerate(lists[row][:5], start=1):
            mark = "   <- taken" if item == targets[row] else ""
            print(f"  {rank}. {dataset.title(item)[:70]}{mark}")
        print(f"  taken: {dataset.title(targets[row])[:70]}")
