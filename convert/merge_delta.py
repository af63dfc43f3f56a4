"""Add a delta to its base model; the result equals the fine-tuned model bit by bit.

python -m convert.merge_delta --base-model-path ~/llama-7b --target-model-path ckpt/games --delta-path games-delta
python test.py --ckpt_path ckpt/games --dataset Games

A delta of `convert.make_delta` names its base, and other bases are rejected. LC-Rec's own deltas name none; they are
added in the dtype of the delta (float16), to which the base is rounded, as they were made. Weights are read and
written in chunks; `pytorch_model.bin` files are supported as well as safetensors.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from collections.abc import Mapping
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch

from convert.deltas import CORRECTIONS, DELTA, Entry, pair_tensors, read_delta
from convert.folders import copy_rest, model_folder, public_name
from convert.model_card import add_flags, push, validated_metrics, write_card
from convert.shards import CODES, StoredTensor, Writer, paired_chunks, read_safetensors, shard_layout_like
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_folder


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = {"type": Path, "required": True, "metavar": "FOLDER"}
    parser.add_argument("--base-model-path", "--base_model_path", help="base model of the delta", **folder)
    parser.add_argument(
        "--target-model-path", "--target_model_path", help="output folder of the fine-tuned model", **folder
    )
    parser.add_argument("--delta-path", "--delta_path", help="delta folder", **folder)
    parser.add_argument(
        "--low-cpu-mem", "--low_cpu_mem", action="store_true",
        help="ignored; memory use is always low (LC-Rec compatibility)",
    )  # fmt: skip
    add_flags(parser)
    args = one_line_errors(parser).parse_args()
    base, delta = model_folder(args.base_model_path), model_folder(args.delta_path)
    metrics = validated_metrics(args, delta)
    if base.resolve() == delta.resolve():
        raise InputError(f"{base}: is both base and delta; name two folders")

    base_name, stored_entries = read_delta(delta) if (delta / DELTA).exists() else (public_name(base), None)
    entries, pairs = pair_tensors(base, delta, base_name if stored_entries else None)
    if stored_entries:
        check_entries(delta, entries, stored_entries)
        entries = stored_entries
    else:
        differences = (name for name, entry in entries.items() if entry.stored == "difference")
        dtypes = sorted({CODES[pairs[name][1].dtype] for name in differences})
        print(f"{delta} has no {DELTA}: the base is not checked, and added in the delta's dtype ({', '.join(dtypes)})")
    with atomic_folder(args.target_model_path) as folder:
        try:
            add(folder, entries, pairs, read_corrections(delta, entries, pairs))
        except WrongBaseError as error:
            raise InputError(
                f"{base}: is not {base_name!r}, the base of {delta}: its tensor {str(error)!r} differs; "
                "give that model as --base-model-path"
            ) from None
        copy_rest(delta, folder)
        write_card(folder, "complete", args.push_to_hub or args.target_model_path, base_name, metrics)
    print(f"{delta} added to {base}: {len(pairs):,} tensors -> {args.target_model_path}/")
    push(args.push_to_hub, args.target_model_path)


class WrongBaseError(Exception):
    """A tensor of the base model differs from the one that the delta was made with."""


def check_entries(delta: Path, entries: Mapping[str, Entry], stored_entries: Mapping[str, Entry]) -> None:
    """Raise InputError if the entries of delta.json do not match the weights."""
    if wrong := sorted(entries.keys() ^ stored_entries.keys()):
        raise InputError(f"{delta / DELTA}: does not match the weights in tensor {wrong[0]!r}; download both again")
    if wrong := next((name for name in entries if entries[name].stored != stored_entries[name].stored), None):
        raise InputError(
            f"{delta / DELTA}: has {wrong!r} as {stored_entries[wrong].stored}, which does not match this base; "
            "give the base model of the delta"
        )


def read_corrections(
    delta: Path, entries: Mapping[str, Entry], pairs: Mapping[str, tuple[StoredTensor | None, StoredTensor]]
) -> dict[str, StoredTensor]:
    """Read the corrections of a delta; InputError if they are incomplete or do not match the entries."""
    corrections: dict[str, StoredTensor] = {}
    for file in sorted(delta.glob(f"{CORRECTIONS}*.safetensors")):
        corrections |= read_safetensors(file)
    for name, entry in entries.items():
        values, positions = corrections.get(f"{name}:values"), corrections.get(f"{name}:positions")
        tensor = pairs[name][1]
        if entry.corrected == 0:
            is_valid = values is None and positions is None
        else:
            is_valid = values is not None and values.dtype == tensor.dtype and values.numel == entry.corrected
            is_valid = is_valid and entry.corrected == (tensor if positions is None else positions).numel
            if positions is not None:
                is_valid = is_valid and positions.dtype in (torch.int32, torch.int64) and len(positions.shape) == 1
        if not is_valid:
            raise InputError(
                f"{delta}: the corrections of tensor {name!r} do not match {DELTA}; download the {CORRECTIONS} files "
                "again"
            )
    return corrections


def add(
    folder: Path,
    entries: Mapping[str, Entry],
    pairs: Mapping[str, tuple[StoredTensor | None, StoredTensor]],
    corrections: Mapping[str, StoredTensor],
) -> None:
    """Write base + delta with corrections, in the shard layout of the delta.

    Raises:
        WrongBaseError: the checksum of a base tensor is not the one in its entry.
        InputError: positions of corrections are not increasing or out of range.
    """
    with Writer(folder, shard_layout_like({name: delta for name, (_, delta) in pairs.items()})) as writer:
        for name, chunks in groupby(paired_chunks(pairs), attrgetter("name")):
            entry, exact = entries[name], corrections.get(f"{name}:values")
            positions = corrections[f"{name}:positions"].read() if f"{name}:positions" in corrections else None
            if positions is not None:
                exact = exact.read()
                is_in_range = positions[0] >= 0 and positions[-1] < pairs[name][1].numel
                if not is_in_range or not (positions.diff() > 0).all():
                    file = corrections[f"{name}:positions"].file
                    raise InputError(f"{file}: the positions of {name!r} are out of range; download it again")
            for _, start, base, value, checksum in chunks:
                if checksum and entry.base_xxh3 not in (None, checksum):
                    raise WrongBaseError(name)
                if value is None:
                    continue
                if entry.stored == "difference":
                    value += base.to(value.dtype)
                if positions is not None:
                    bounds = torch.tensor([start, start + len(value)], dtype=positions.dtype)
                    low, high = torch.searchsorted(positions, bounds)
                    value[positions[low:high].long() - start] = exact[low:high]
                elif exact is not None:
                    value = exact.read(start, start + len(value))
                writer.put(name, value, start)


if __name__ == "__main__":
    main()
