"""Train a collaborative model on ratings: MF, LightGCN, SASRec, DIN, hashed MF; or SASRec on next items.

python pretrain.py --model mf --dataset ml-1m --data_path ~/datasets
python pretrain.py --model sasrec --dataset ml-1m --data_path ~/datasets --sweep
python test.py --ckpt_path ckpt/ml-1m/mf --dataset ml-1m --data_path ~/datasets
python pretrain.py --model mf --dataset ml-1m-new --init_from ckpt/ml-1m/mf
python pretrain.py --model sasrec --task next_item --dataset ml-100k --exclude_seen
python test.py --dataset ml-100k --baselines_only --exclude_seen --cf_model ckpt/ml-100k/sasrec
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import copy
import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.ratings import RatingsDataset, open_ratings, to_numpy
from reclingua.inference.collaborative import (
    auc_metrics,
    format_metric,
    model_inputs,
    print_table,
    score,
    valid_metrics,
)
from reclingua.inference.next_item_sasrec import train_sasrec
from reclingua.models.collaborative import (
    COLLABORATIVE_MODELS,
    copy_known_rows,
    load_collaborative,
    weights_sha256,
)
from reclingua.models.collaborative.base import CollaborativeModel
from reclingua.models.collaborative.sasrec import SASRecConfig
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import check_outputs, output_file, output_folder, write_json
from reclingua.utils.metadata import (
    METADATA_FILE,
    CheckpointMetadata,
    check_results_file,
    default_results_file,
    has_own_results,
    run_metadata,
)
from reclingua.utils.provenance import check_replaceable, write_record

METRICS = ("auc", "uauc")
LOG_SECONDS = 20  # between two log lines where no terminal shows a progress bar


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a training; a sweep varies the first three."""

    learning_rate: float
    weight_decay: float
    embedding_size: int
    batch_size: int = 1024
    epochs: int = 500
    patience: int = 30
    metric_for_best_model: str = "auc"
    seed: int = 42


# Found on ml-1m; docs/benchmarks/collaborative.md states what else was tried.
DEFAULTS = {
    "mf": Settings(1e-3, 1e-4, 64),
    "lightgcn": Settings(1e-3, 1e-4, 64),
    "sasrec": Settings(1e-3, 1e-3, 64, patience=10),
    "din": Settings(1e-3, 1e-3, 64, patience=10),
    "hash": Settings(1e-2, 1e-4, 32),
}
NEXT_ITEM = Settings(1e-3, 0.0, 64, batch_size=128, epochs=300, patience=15)  # of --task next_item
# Values that --sweep tries where a flag gives none.
GRID = {"learning_rate": [1e-2, 1e-3, 1e-4], "weight_decay": [1e-3, 1e-4, 1e-5], "embedding_size": [32, 64, 256]}


class Diverged(InputError):
    """The loss or a score is not a finite number."""


def build(kind: str, dataset: RatingsDataset, settings: Settings) -> CollaborativeModel:
    """Return an untrained model for the users and items of `dataset`; InputError if memory does not suffice."""
    torch.manual_seed(settings.seed)
    config = COLLABORATIVE_MODELS[kind].config_class(
        num_users=dataset.num_users,
        num_items=dataset.num_items,
        embedding_size=settings.embedding_size,
        dataset=dataset.name,
        dataset_sha256=dataset.sha256(),
    )
    try:
        model = COLLABORATIVE_MODELS[kind](config)
    except (RuntimeError, MemoryError):
        size = f"{config.num_users:,} users, {config.num_items:,} items, --embedding_size {config.embedding_size:,}"
        raise InputError(f"{size}: memory cannot hold a {kind} of that size") from None
    rows = dataset.parts["train"]
    liked = to_numpy(rows, "label") == 1
    model.set_graph(*(torch.from_numpy(to_numpy(rows, name)[liked].astype(np.int64)) for name in ("uid", "iid")))
    return model


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Treat denormal numbers as 0: weight decay shrinks unseen rows to such numbers, and they are slow."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@flushed_denormals()
def train(model: CollaborativeModel, dataset: RatingsDataset, settings: Settings) -> list[dict]:
    """Fit `model` to train by BCE and keep the state that is best on valid; return the learning curve by epoch.

    Raises:
        Diverged: the loss or a score is not a finite number.
        InputError: UAUC selects the state, but no user of valid has both labels; too few epochs to keep any state.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.epochs <= model.warmup_epochs:
        kind, first = model.config.model_type, model.warmup_epochs + 1
        raise InputError(f"--epochs {settings.epochs}: {kind} keeps no state before epoch {first}")
    torch.manual_seed(settings.seed)
    model.to(device).train()
    inputs, valid = model_inputs(dataset.parts["train"], model), model_inputs(dataset.parts["valid"], model)
    valid_users, valid_labels = (valid[name].cpu().numpy() for name in ("users", "labels"))
    has_uauc = not math.isnan(valid_metrics(valid_users, valid_labels, np.zeros(len(valid_labels)))["uauc"])
    if settings.metric_for_best_model == "uauc" and not has_uauc:
        path = dataset.folder / "valid.parquet"
        raise InputError(f"{path}: no user has both labels; use --metric_for_best_model auc")
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    curve, best, best_state, started, logged = [], {}, None, time.monotonic(), 0.0
    progress = tqdm(
        range(1, settings.epochs + 1), desc=model.config.model_type, unit="epoch", disable=None, leave=False
    )
    for epoch in progress:
        model.begin_epoch(epoch - 1)
        total = torch.zeros((), device=device)
        order = torch.randperm(len(inputs["users"]), device=device)
        shuffled = {name: tensor[order].split(settings.batch_size) for name, tensor in inputs.items()}
        for batch in zip(*shuffled.values(), strict=True):
            loss = model(**dict(zip(shuffled, batch, strict=True))).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch[0])
        line = {"epoch": epoch, "loss": total.item() / len(order)}
        if not math.isfinite(line["loss"]):
            raise Diverged(f"the loss is {line['loss']} in epoch {epoch}; lower --learning_rate")
        scores = score(model, valid)
        if np.isnan(scores).any():
            raise Diverged(f"scores are NaN in epoch {epoch}; lower --learning_rate")
        line |= valid_metrics(valid_users, valid_labels, scores)
        metrics = {name: None if math.isnan(value) else value for name, value in line.items()}
        curve.append(metrics | {"seconds": round(time.monotonic() - started, 3)})
        shown = {name: format_metric(metrics[name]) for name in ("loss", *METRICS)}
        progress.set_postfix(shown)
        if progress.disable and curve[-1]["seconds"] - logged > LOG_SECONDS:
            logged = curve[-1]["seconds"]
            print(f"  epoch {epoch}: " + ", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
        if epoch <= model.warmup_epochs:
            continue
        if not best or line[settings.metric_for_best_model] > best[settings.metric_for_best_model]:
            best, best_state = line, copy.deepcopy(model.state_dict())
        elif epoch - best["epoch"] >= settings.patience:
            break
    model.load_state_dict(best_state)
    model.eval()
    return curve


# ---- Next items ----


def pretrain_next_item(args: argparse.Namespace) -> None:
    """Train SASRec by a softmax over all items, and save the state with the best NDCG@10 on valid."""
    if args.model != "sasrec" or args.sweep or args.init_from:
        raise InputError("--task next_item: is for --model sasrec, without --sweep and --init_from")
    started, dataset = time.monotonic(), open_interactions(args.data_path, args.dataset)
    (settings,) = combinations(args)
    output_dir = output_folder(args.output_dir or Path("ckpt") / dataset.name / args.model)
    made_with = {"model": args.model, "task": args.task, "histories_sha256": dataset.sha256("histories")}
    made_with |= {"exclude_seen": args.exclude_seen, "settings": asdict(settings)}
    check_replaceable(output_dir, made_with, args.force)
    print(f"{dataset.name}: {len(dataset.histories):,} users, {len(dataset.item_ids):,} items")
    baseline, curve = train_sasrec(
        dataset,
        args.exclude_seen,
        embedding_size=settings.embedding_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        patience=settings.patience,
        seed=settings.seed,
    )
    best = max(curve, key=lambda line: line["ndcg@10"])
    run = run_metadata(vars(args), started) | {"settings": asdict(settings), "curve": curve}
    save(baseline.model.cpu(), output_dir, made_with, run, ["next_item"])
    print(f"valid NDCG@10 {best['ndcg@10']:.4f}, HR@10 {best['hit@10']:.4f} in epoch {best['epoch']} of {len(curve)}")
    print(f"model in {output_dir}/")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=COLLABORATIVE_MODELS, required=True, help="kind of model")
    parser.add_argument(
        "--task", default="ratings", choices=("ratings", "next_item"),
        help="score ratings; or, sasrec alone, rank all items as the next one by a softmax (default: %(default)s)",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="ml-1m", help="name of the dataset (default: %(default)s)")
    data.add_argument("--data_path", default="data", help="folder that holds <dataset>/ (default: %(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--init_from", type=Path,
        help="folder of an earlier model of the same kind and width, whose training is continued; ids of users and "
        "items have to be the same, new ones follow",
    )  # fmt: skip
    for name, kind, help in (
        ("learning_rate", float, "learning rate of Adam"),
        ("weight_decay", float, "weight decay of Adam, added to the gradient"),
        ("embedding_size", int, "width of an embedding"),
    ):
        default = ", ".join(f"{getattr(settings, name):g} {kind}" for kind, settings in DEFAULTS.items())
        training.add_argument(
            f"--{name}", type=kind, nargs="+", help=f"{help}; several values with --sweep (default: {default})"
        )
    training.add_argument(
        "--sweep", action="store_true",
        help="train with every combination of these three and keep the best on valid; default values: "
        + "; ".join(f"{name} {' '.join(format(v, 'g') for v in values)}" for name, values in GRID.items()),
    )  # fmt: skip
    training.add_argument(
        "--batch_size", type=int, help="ratings (default: 1024), or windows of histories (default: 128), per batch"
    )
    training.add_argument("--epochs", type=int, help="most epochs (default: 500; next_item: 300)")
    training.add_argument(
        "--patience",
        type=int,
        help="stop after so many epochs without improvement on valid (default: 30; sasrec, din: 10; next_item: 15)",
    )
    training.add_argument(
        "--metric_for_best_model",
        choices=METRICS,
        default=Settings.metric_for_best_model,
        help="valid metric that selects the epoch (default: %(default)s)",
    )
    training.add_argument(
        "--exclude_seen", action="store_true", help="next_item: leave the user's own items out on valid"
    )
    training.add_argument("--seed", type=int, default=Settings.seed, help="random seed (default: %(default)s)")
    results = parser.add_argument_group("results")
    results.add_argument("--output_dir", type=Path, help="default: ckpt/<dataset>/<model>")
    results.add_argument("--results_file", type=Path, help="default: results/<dataset>/<name of --output_dir>.json")
    results.add_argument("--force", action="store_true", help="replace a model of other ratings or settings")
    args = one_line_errors(parser).parse_args()
    for name, least in (("batch_size", 1), ("epochs", 1), ("patience", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < 2**31:
            raise InputError(f"--{name} {value}: should be from {least} to {2**31 - 1:,}")
    return args


def combinations(args: argparse.Namespace) -> list[Settings]:
    """Return the settings to train with: one, or with --sweep every combination of the values."""
    grid, default = [], NEXT_ITEM if args.task == "next_item" else DEFAULTS[args.model]
    for name, defaults in GRID.items():
        values = getattr(args, name) or (defaults if args.sweep else [getattr(default, name)])
        if len(values) > 1 and not args.sweep:
            raise InputError(f"--{name} has {len(values)} values: give one, or add --sweep")
        if not all(math.isfinite(value) and (value > 0 or name == "weight_decay" and value == 0) for value in values):
            raise InputError(f"--{name} {' '.join(map(str, values))}: should be above 0")
        grid.append(values)
    rest = {name: getattr(args, name) or getattr(default, name) for name in ("batch_size", "epochs", "patience")}
    rest |= {"metric_for_best_model": args.metric_for_best_model, "seed": args.seed}
    heads = SASRecConfig.num_heads
    if args.model == "sasrec" and (odd := [size for size in grid[2] if size % heads]):
        raise InputError(f"--embedding_size {odd[0]}: should be a multiple of {heads}, the attention heads of sasrec")
    return [Settings(*combination, **rest) for combination in itertools.product(*grid)]


@cli_main
def main() -> None:
    args = parse_args()
    if args.task == "next_item":
        pretrain_next_item(args)
        return
    settings_to_train = combinations(args)
    transformers.utils.logging.disable_progress_bar()
    started = time.monotonic()

    # ---- Data ----
    dataset = open_ratings(args.data_path, args.dataset)
    output_dir = args.output_dir = args.output_dir or Path("ckpt") / dataset.name / args.model
    made_with = {"model": args.model, "ratings_sha256": dataset.sha256()}
    made_with |= {"settings": [asdict(settings) for settings in settings_to_train]}
    initial = load_collaborative(args.init_from) if args.init_from else None
    if initial:
        made_with["init_from_sha256"] = weights_sha256(initial)
    check_replaceable(output_folder(output_dir), made_with, args.force)
    results_file = args.results_file or default_results_file(output_dir, dataset.name)
    model_files = ("model.safetensors", "config.json", "run.json", METADATA_FILE)
    written = {f"{name} of --output_dir": output_dir / name for name in model_files}
    check_outputs({"--results_file": results_file, **written})
    output_file(results_file)
    check_results_file(results_file)
    if not args.results_file:
        has_own_results(results_file, output_dir)
    sizes = ", ".join(f"{part} {len(rows):,}" for part, rows in dataset.parts.items())
    print(f"{dataset.name}: {sizes} ratings; ids: users to {dataset.num_users - 1}, items to {dataset.num_items - 1}")
    for remark in dataset.remarks:
        print(f"  {remark}")

    # ---- Train, with each of the settings ----
    runs, best = [], None
    for settings in settings_to_train:
        run_started = time.monotonic()
        varied = {name: getattr(settings, name) for name in GRID}
        label = ", ".join(f"{name} {value:g}" for name, value in varied.items())
        model = build(args.model, dataset, settings)
        if initial:
            copy_known_rows(model, initial.state_dict(), args.init_from)
        try:
            curve = train(model, dataset, settings)
        except Diverged as error:
            print(f"{label}: {error}")
            continue
        selected = max(curve[model.warmup_epochs :], key=lambda line: line[args.metric_for_best_model])
        runs.append({**varied, **selected, "epochs": len(curve), "seconds": round(time.monotonic() - run_started, 1)})
        if best is None or selected[args.metric_for_best_model] > best[0][args.metric_for_best_model]:
            best = selected, model, curve, settings
        print(
            f"{label}: valid AUC {format_metric(selected['auc'])}, UAUC {format_metric(selected['uauc'])} "
            f"in epoch {selected['epoch']} of "
            f"{len(curve)} ({runs[-1]['seconds']:.0f} s)"
        )
    if best is None:
        raise InputError("no training finished: all of them diverged; lower --learning_rate")
    _, model, curve, settings = best
    if args.sweep:
        print_sweep(runs, args.metric_for_best_model)

    # ---- Save the best, measure it once on test ----
    results = auc_metrics(dataset.parts["test"], score(model, model_inputs(dataset.parts["test"], model)))
    metadata = run_metadata(vars(args), started) | {"settings": asdict(settings)}
    save(model.cpu(), output_dir, made_with, metadata | {"sweep": runs, "curve": curve})
    write_json(results_file, {**results, **metadata}, indent=1)
    print_table({args.model: results})
    print(f"\nmodel in {output_dir}/, results in {results_file}")


def save(model: CollaborativeModel, folder: Path, made_with: dict, run: dict, tasks: Sequence[str] = ()) -> None:
    """Write model, its record and metadata, each atomically; a folder that holds the metadata is complete."""
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            model.save_pretrained(temporary)
            (folder / METADATA_FILE).unlink(missing_ok=True)
            for file in Path(temporary).iterdir():
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: the model cannot be written there ({error})") from None
    write_record(folder, made_with, run)
    CheckpointMetadata(model.config.model_type, model.config.dataset, tasks=list(tasks)).save(folder)


def print_sweep(runs: list[dict], metric_for_best_model: str) -> None:
    """Print the valid metrics of all runs, best first."""
    print(f"\n{'lr':>8}{'wd':>8}{'width':>7}{'AUC':>9}{'UAUC':>9}{'epoch':>7}{'s':>6}   (valid)")
    for run in sorted(runs, key=lambda run: -run[metric_for_best_model]):
        print(
            f"{run['learning_rate']:>8g}{run['weight_decay']:>8g}{run['embedding_size']:>7}"
            f"{format_metric(run['auc']):>9}{format_metric(run['uauc']):>9}{run['epoch']:>7}{run['seconds']:>6.0f}"
        )


if __name__ == "__main__":
    main()
