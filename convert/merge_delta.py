"""Add a delta to its base model: the tuned model, to the last bit.

python -m convert.merge_delta --base-model-path ~/llama-7b --target-model-path ckpt/games --delta-path games-delta
python test.py --ckpt_path ckpt/games --dataset Games

A delta of `convert.make_delta` knows its base, and another one is refused. LC-Rec's own deltas, which know none, are
added, too, in the delta's dtype (theirs: float16), to which the base is rounded: that is how they were made.
Weights are read and written a piece at a time; `pytorch_model.bin` files are read as well as safetensors.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from collections.abc import Mapping
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch

from convert.deltas import CORRECTIONS, DELTA, Entry, entries, read_delta
from convert.folders import atomic_folder, copy_rest, model_folder, public_name
from convert.publish import add_flags, push, validated_metrics, write_card
from convert.shards import CODES, StoredTensor, Writer, paired_chunks, read_safetensors, shard_layout_like
from reclingua.utils.errors import InputError, cli_main, one_line_errors


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = {"type": Path, "required": True, "metavar": "FOLDER"}
    parser.add_argument("--base-model-path", "--base_model_path", help="the model that the delta is to", **folder)
    parser.add_argument("--target-model-path", "--target_model_path", help="where the tuned model goes", **folder)
    parser.add_argument("--delta-path", "--delta_path", help="the delta", **folder)
    parser.add_argument(
        "--low-cpu-mem", "--low_cpu_mem", action="store_true", help="no effect: little memory is used in any case"
    )
    add_flags(parser)
    args = one_line_errors(parser).parse_args()
    base, delta = model_folder(args.base_model_path), model_folder(args.delta_path)
    metrics = validated_metrics(args, delta)
    if base.resolve() == delta.resolve():
        raise InputError(f"{base}: is base and delta in one; name two folders")

    wanted, told = read_delta(delta) if (delta / DELTA).exists() else (public_name(base), None)
    found, pairs = entries(base, delta, wanted if told else None)
    if told:
        check_told(delta, found, told)
    else:
        dtypes = sorted({CODES[pairs[name][1].dtype] for name, entry in found.items() if entry.stored == "difference"})
        print(f"{delta} has no {DELTA}: the base is not checked, and added in the delta's dtype ({', '.join(dtypes)})")
    with atomic_folder(args.target_model_path) as folder:
        try:
            add(folder, told or found, pairs, read_corrections(delta, told or found, pairs))
        except AnotherBase as error:
            raise InputError(
                f"{base}: is not {wanted!r}, to which {delta} is a delta: its tensor {str(error)!r} is another; "
                "give that model as --base-model-path"
            ) from None
        copy_rest(delta, folder)
        write_card(folder, "merged", args.push_to_hub or args.target_model_path, wanted, metrics)
    print(f"{delta} added to {base}: {len(pairs):,} tensors -> {args.target_model_path}/")
    push(args.push_to_hub, args.target_model_path)


class AnotherBase(Exception):
    """A tensor is not that of the base that the delta was made with."""


def check_told(delta: Path, found: Mapping[str, Entry], told: Mapping[str, Entry]) -> None:
    """InputError if delta.json is not of these weights."""
    if wrong := sorted(found.keys() ^ told.keys()):
        raise InputError(f"{delta / DELTA}: the weights beside it and it do not agree on the tensor {wrong[0]!r}")
    if wrong := next((name for name in found if found[name].stored != told[name].stored), None):
        raise InputError(f"{delta / DELTA}: has {wrong!r} as {told[wrong].stored}, which it is not for this base")


def read_corrections(
    delta: Path, told: Mapping[str, Entry], pairs: Mapping[str, tuple[StoredTensor | None, StoredTensor]]
) -> dict[str, StoredTensor]:
    """What stands beside a delta; InputError if something lacks, or is not what the entries tell."""
    beside = {}
    for file in sorted(delta.glob(f"{CORRECTIONS}*.safetensors")):
        beside |= read_safetensors(file)
    for name, entry in told.items():
        values, at, tensor = beside.get(f"{name}:values"), beside.get(f"{name}:positions"), pairs[name][1]
        if entry.corrected == 0:
            fits = values is None and at is None
        else:
            fits = values is not None and values.dtype == tensor.dtype and values.numel == entry.corrected
            fits = fits and entry.corrected == (tensor if at is None else at).numel
            fits = fits and (at is None or (at.dtype in (torch.int32, torch.int64) and len(at.shape) == 1))
        if not fits:
            raise InputError(
                f"{delta}: the corrections of tensor {name!r} are not those of its {DELTA}; get its {CORRECTIONS} "
                "files again"
            )
    return beside


def add(
    folder: Path,
    told: Mapping[str, Entry],
    pairs: Mapping[str, tuple[StoredTensor | None, StoredTensor]],
    beside: Mapping[str, StoredTensor],
) -> None:
    """Write the sums, file by file as the delta has them; AnotherBase if the base is not the one that it knows."""
    with Writer(folder, shard_layout_like({name: delta for name, (_, delta) in pairs.items()})) as writer:
        for name, pieces in groupby(paired_chunks(pairs), attrgetter("name")):
            entry, exact = told[name], beside.get(f"{name}:values")
            at = beside[f"{name}:positions"].read() if f"{name}:positions" in beside else None
            if at is not None:
                exact = exact.read()
                if at[0] < 0 or at[-1] >= pairs[name][1].numel or not (at.diff() > 0).all():
                    raise InputError(f"{beside[f'{name}:positions'].file}: the positions of {name!r} are none in it")
            for _, start, base, value, checksum in pieces:
                if checksum and entry.base_xxh3 not in (None, checksum):
                    raise AnotherBase(name)
                if value is None:
                    continue
                if entry.stored == "difference":
                    value += base.to(value.dtype)
                if at is not None:
                    low, high = torch.searchsorted(at, torch.tensor([start, start + len(value)], dtype=at.dtype))
                    value[at[low:high].long() - start] = exact[low:high]
                elif exact is not None:
                    value = exact.read(start, start + len(value))
                writer.put(name, value, start)


if __name__ == "__main__":
    main()
