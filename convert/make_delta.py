"""Make of a tuned model what must be added to its base model: a delta, to be published instead of the weights.

python -m convert.make_delta --base-model-path ~/llama-7b --target-model-path ckpt/Games/lcrec --delta-path games-delta
python -m convert.make_delta ... --push_to_hub me/games-lcrec-delta

The delta of a tensor is target - base, in the target's dtype; a tensor that has grown with the vocabulary is stored
whole. Anyone can add it to the base, LC-Rec's way, and has the target up to rounding. `convert.merge_delta` gives the
target to the last bit: wherever addition would not, the exact value stands in a file beside the delta.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch

from convert.deltas import BITS, CORRECTIONS, DELTA, FORMAT, Entry, entries
from convert.folders import atomic_folder, copy_rest, model_folder, public_name
from convert.publish import add_flags, push, validated_metrics, write_card
from convert.shards import PIECE, Piece, Spec, StoredTensor, Writer, paired_chunks, shard_layout_like
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import write_json


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = {"type": Path, "required": True, "metavar": "FOLDER"}
    parser.add_argument("--base-model-path", "--base_model_path", help="the model that was tuned", **folder)
    parser.add_argument("--target-model-path", "--target_model_path", help="what it was tuned to", **folder)
    parser.add_argument("--delta-path", "--delta_path", help="where the delta goes", **folder)
    add_flags(parser)
    args = one_line_errors(parser).parse_args()
    base, target = model_folder(args.base_model_path), model_folder(args.target_model_path)
    metrics = validated_metrics(args, target)
    if base.resolve() == target.resolve():
        raise InputError(f"{base}: is base and target in one; name two folders")

    found, pairs = entries(base, target)
    with atomic_folder(args.delta_path) as folder:
        write_delta(folder, found, pairs)
        record = {"format": FORMAT, "base": public_name(base)}
        record["tensors"] = {name: asdict(entry) for name, entry in found.items()}
        write_json(folder / DELTA, record, indent=1)
        copy_rest(target, folder)
        write_card(folder, "delta", args.push_to_hub or args.delta_path, public_name(base), metrics)

    differences = [name for name, entry in found.items() if entry.stored == "difference"]
    elements = sum(pairs[name][1].numel for name in differences)
    corrected = sum(found[name].corrected for name in differences)
    beside = sum(file.stat().st_size for file in args.delta_path.glob(f"{CORRECTIONS}*"))
    print(f"{len(differences):,} tensors as differences, {len(found) - len(differences):,} whole")
    print(
        f"{corrected:,} of {elements:,} elements ({corrected / max(1, elements):.3%}) do not come back by addition: "
        f"{beside / 1e6:,.1f} MB beside the delta"
    )
    print(f"what makes {target} of {base} -> {args.delta_path}/")
    push(args.push_to_hub, args.delta_path)


def write_delta(
    folder: Path, found: dict[str, Entry], pairs: dict[str, tuple[StoredTensor | None, StoredTensor]]
) -> None:
    """Write the delta's weights and corrections, file by file as the target has them, and complete the entries."""
    files = shard_layout_like({name: target for name, (_, target) in pairs.items()})
    with Writer(folder, files) as writer:
        for file, tensors in files.items():
            beside: dict[str, torch.Tensor | StoredTensor] = {}
            pieces = paired_chunks({name: pairs[name] for name in tensors})
            for name, of_tensor in groupby(pieces, attrgetter("name")):
                beside |= subtract(of_tensor, found[name], pairs[name][1], writer)
            if beside:
                write_corrections(folder, file.replace("model", CORRECTIONS), beside)


def subtract(
    pieces: Iterable[Piece], entry: Entry, target: StoredTensor, writer: Writer
) -> dict[str, torch.Tensor | StoredTensor]:
    """Write a tensor's delta, complete its entry, and return what goes beside it.

    That are the `values`, in the target's dtype, which addition does not give back, and their `positions` in the flat
    tensor, int32 or int64; or, where this takes less room, all values; nothing where addition gives all back.
    """
    at = torch.int32 if target.numel < 2**31 else torch.int64
    positions, values, room = [], [], target.nbytes
    for name, start, base, value, checksum in pieces:
        entry.base_xxh3 = checksum  # that of the last piece stays
        if value is None:
            continue
        if entry.stored == "difference":
            base = base.to(target.dtype)
            delta = value - base
            # Which NaN a sum is depends on the processor.
            lost = ((bitwise_view(base + delta) != bitwise_view(value)) | value.isnan()).nonzero().flatten()
            entry.corrected += len(lost)
            if (room := room - len(lost) * (at.itemsize + target.dtype.itemsize)) > 0:
                positions.append((lost + start).to(at))
                values.append(value[lost])
        writer.put(name, value if entry.stored == "whole" else delta, start)
    if room <= 0 < target.nbytes:
        entry.corrected = target.numel
        return {f"{name}:values": target}
    return {f"{name}:positions": torch.cat(positions), f"{name}:values": torch.cat(values)} if entry.corrected else {}


def bitwise_view(values: torch.Tensor) -> torch.Tensor:
    """To be compared: as floating-point numbers NaN is never NaN, and -0 is 0."""
    return values.view(BITS[values.dtype.itemsize])


def write_corrections(folder: Path, file: str, beside: dict[str, torch.Tensor | StoredTensor]) -> None:
    wide_first = sorted(beside, key=lambda name: -beside[name].dtype.itemsize)  # or some would stand at odd places
    specs = {name: Spec(beside[name].dtype, tuple(beside[name].shape)) for name in wide_first}
    with Writer(folder, {file: specs}) as writer:
        for name, tensor in beside.items():
            if isinstance(tensor, StoredTensor):
                for start in range(0, tensor.numel, PIECE):
                    writer.put(name, tensor.read(start, start + PIECE), start)
            else:
                writer.put(name, tensor)


if __name__ == "__main__":
    main()
