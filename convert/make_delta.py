"""Make a delta, fine-tuned minus base weights, for base models whose licence forbids redistribution.

python -m convert.make_delta --base-model-path ~/llama-7b --target-model-path ckpt/Games/lcrec --delta-path games-delta
python -m convert.make_delta ... --push_to_hub me/games-lcrec-delta

The delta of a tensor is target - base, in the dtype of the target; a tensor that has grown with the vocabulary is
stored whole. Adding it to the base, as LC-Rec does, restores the target up to rounding. `convert.merge_delta` restores
it bit by bit: a second file contains the exact values of the elements that addition does not restore.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch

from convert.deltas import CORRECTIONS, DELTA, FORMAT, INTEGER_DTYPES, Entry, pair_tensors
from convert.folders import copy_rest, model_folder, public_name
from convert.model_card import add_flags, push, validated_metrics, write_card
from convert.shards import CHUNK_SIZE, Chunk, Spec, StoredTensor, Writer, paired_chunks, shard_layout_like
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_folder, write_json


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = {"type": Path, "required": True, "metavar": "FOLDER"}
    parser.add_argument("--base-model-path", "--base_model_path", help="base model", **folder)
    parser.add_argument("--target-model-path", "--target_model_path", help="fine-tuned model", **folder)
    parser.add_argument("--delta-path", "--delta_path", help="output folder", **folder)
    add_flags(parser)
    args = one_line_errors(parser).parse_args()
    base, target = model_folder(args.base_model_path), model_folder(args.target_model_path)
    metrics = validated_metrics(args, target)
    if base.resolve() == target.resolve():
        raise InputError(f"{base}: is both base and target; name two folders")

    entries, pairs = pair_tensors(base, target)
    with atomic_folder(args.delta_path) as folder:
        write_delta(folder, entries, pairs)
        tensors = {name: asdict(entry) for name, entry in entries.items()}
        write_json(folder / DELTA, {"format": FORMAT, "base": public_name(base), "tensors": tensors}, indent=1)
        copy_rest(target, folder)
        write_card(folder, "delta", args.push_to_hub or args.delta_path, public_name(base), metrics)

    differences = [name for name, entry in entries.items() if entry.stored == "difference"]
    num_elements = sum(pairs[name][1].numel for name in differences)
    num_corrected = sum(entries[name].corrected for name in differences)
    size = sum(file.stat().st_size for file in args.delta_path.glob(f"{CORRECTIONS}*"))
    print(f"{len(differences):,} tensors as differences, {len(entries) - len(differences):,} whole")
    share = num_corrected / max(1, num_elements)
    print(
        f"{num_corrected:,} of {num_elements:,} elements ({share:.3%}) are not restored by addition: "
        f"{size / 1e6:,.1f} MB of corrections"
    )
    print(f"{target} minus {base} -> {args.delta_path}/")
    push(args.push_to_hub, args.delta_path)


def write_delta(
    folder: Path, entries: dict[str, Entry], pairs: dict[str, tuple[StoredTensor | None, StoredTensor]]
) -> None:
    """Write weights and corrections of the delta in the shard layout of the target, and complete the entries."""
    files = shard_layout_like({name: target for name, (_, target) in pairs.items()})
    with Writer(folder, files) as writer:
        for file, tensors in files.items():
            corrections: dict[str, torch.Tensor | StoredTensor] = {}
            chunks = paired_chunks({name: pairs[name] for name in tensors})
            for name, tensor_chunks in groupby(chunks, attrgetter("name")):
                corrections |= subtract(tensor_chunks, entries[name], pairs[name][1], writer)
            if corrections:
                write_corrections(folder, file.replace("model", CORRECTIONS), corrections)


def subtract(
    chunks: Iterable[Chunk], entry: Entry, target: StoredTensor, writer: Writer
) -> dict[str, torch.Tensor | StoredTensor]:
    """Write the delta of a tensor and complete its entry.

    base + (target - base) differs from the target where the subtraction rounds; these elements need a correction.

    Returns:
        corrections of the tensor: the `values` that addition does not restore, in the dtype of the target, and their
        `positions` in the flat tensor, int32 or int64; all values if that is smaller; {} if addition restores all.
    """
    position_dtype = torch.int32 if target.numel < 2**31 else torch.int64
    positions, values = [], []
    bytes_left = target.nbytes  # above 0: positions and values are smaller than the whole tensor
    for name, start, base, value, checksum in chunks:
        entry.base_xxh3 = checksum  # the last chunk has it
        if value is None:
            continue
        if entry.stored == "difference":
            base = base.to(target.dtype)
            delta = value - base
            # The payload of a NaN sum depends on the processor: NaNs are always corrected.
            inexact = ((bitwise_view(base + delta) != bitwise_view(value)) | value.isnan()).nonzero().flatten()
            entry.corrected += len(inexact)
            bytes_left -= len(inexact) * (position_dtype.itemsize + target.dtype.itemsize)
            if bytes_left > 0:
                positions.append((inexact + start).to(position_dtype))
                values.append(value[inexact])
        writer.put(name, value if entry.stored == "whole" else delta, start)
    if bytes_left <= 0 < target.nbytes:
        entry.corrected = target.numel
        return {f"{name}:values": target}
    return {f"{name}:positions": torch.cat(positions), f"{name}:values": torch.cat(values)} if entry.corrected else {}


def bitwise_view(values: torch.Tensor) -> torch.Tensor:
    """View floating-point values as integers, for bitwise comparison: NaN != NaN and -0 == 0 as numbers."""
    return values.view(INTEGER_DTYPES[values.dtype.itemsize])


def write_corrections(folder: Path, file: str, corrections: dict[str, torch.Tensor | StoredTensor]) -> None:
    """Write corrections as a safetensors file, the widest dtypes first, so that every tensor is aligned."""
    names = sorted(corrections, key=lambda name: -corrections[name].dtype.itemsize)
    specs = {name: Spec(corrections[name].dtype, tuple(corrections[name].shape)) for name in names}
    with Writer(folder, {file: specs}) as writer:
        for name, tensor in corrections.items():
            if isinstance(tensor, StoredTensor):
                for start in range(0, tensor.numel, CHUNK_SIZE):
                    writer.put(name, tensor.read(start, start + CHUNK_SIZE), start)
            else:
                writer.put(name, tensor)


if __name__ == "__main__":
    main()
