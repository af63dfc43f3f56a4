"""Formats in which other projects publish datasets: which command makes a dataset folder of them."""

from pathlib import Path

PICKLE_ENDINGS = (".pkl", ".pickle")
# Endings of file names -> the --source of data.prepare that reads such files, the first that fits.
SOURCE_OF_FILES = {
    ".inter": "recbole",
    "_ood2.parquet": "collm",
    "ratings.dat": "movielens",
    "movies.csv": "movielens",
    "sequential_data.txt": "sequences",
    "info.txt": "minionerec",
    ".jsonl": "amazon2023",
    ".jsonl.gz": "amazon2023",
}


def pickle_remedy(path: Path) -> str:
    """Return how to turn a pickled frame into parquet, which this project reads; it never loads a pickle."""
    target = path.with_suffix(".parquet")
    return (
        f"{path} is a pickle, which can run code when it is loaded, so it is not read here; if you trust its authors: "
        f"python -c \"import pandas; pandas.read_pickle('{path}').to_parquet('{target}')\""
    )


def conversion_hint(folder: Path, name: str) -> str:
    """Return which command opens or converts the files of a folder without a dataset of ours; "" if none is known."""
    files = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
    if {f"{part}.parquet" for part in ("train", "valid", "test")} <= {path.name for path in files}:
        return "the folder holds a ratings dataset, for the Yes/No methods: see finetune.py --method, pretrain.py"
    if (folder / f"{name}.inter.json").is_file():
        return "the folder holds a next-item dataset, for lcrec: see finetune.py --method lcrec"
    if other := next((path.name for path in files if path.name.endswith(".inter.json")), None):
        return f"the folder holds {other}: rename the folder and its files to one name, which --dataset takes"
    source = source_of(folder, files)
    if source:
        command = f"python -m data.prepare --source {source} --raw_path {folder} --dataset {name}"
        return f"make a dataset of its files: {command}"
    pickle = next((path for path in files if path.suffix in PICKLE_ENDINGS), None)
    return f"{pickle_remedy(pickle)}; then python -m data.prepare --source collm" if pickle else ""


def source_of(folder: Path, files: list[Path]) -> str:
    """Return the --source of `data.prepare` that reads these files of a folder, "" if none is known."""
    names = [path.name for path in files]
    if any(path.parent.name == "info" and path.suffix == ".txt" for path in files):
        return "minionerec"
    for ending, source in SOURCE_OF_FILES.items():
        if any(name.endswith(ending) for name in names):
            return source
    if any(name.startswith("reviews_") for name in names):
        return "amazon2014"
    if any(name.startswith("meta_") and name.removesuffix(".gz").endswith(".json") for name in names):
        return "amazon2018"
    if {"train.json", "test.json"} <= {*names}:
        return "tallrec"
    return ""
