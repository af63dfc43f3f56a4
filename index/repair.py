"""Make the semantic IDs of a published index file unique, without the embeddings it was made from.

python -m index.repair ~/datasets/Games/Games.index.json --output data/Games/Games.index.json

Of the items that share a semantic ID the first keeps it. The others keep all codes but the last, which becomes the
first free code of that level; a new code is added to the level only if none is free.
"""

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from reclingua.datasets.interactions import read_codes
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_write, check_outputs, write_json
from reclingua.utils.metadata import run_metadata
from reclingua.utils.provenance import check_replaceable, file_sha256, read_record, write_record


def deduplicate(index: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return item -> codes without duplicates; the first item of each semantic ID keeps it."""
    occupied = set(map("".join, index.values()))
    last_codes: dict[int, list[str]] = {}  # depth of a semantic ID -> codes of the last level
    for depth in set(map(len, index.values())):
        distinct = {codes[-1] for codes in index.values() if len(codes) == depth}
        last_codes[depth] = sorted(distinct, key=lambda code: (len(code), code))
    repaired: dict[str, list[str]] = {}
    assigned: set[str] = set()
    # Position in the level before which all codes after a prefix are occupied: they never become free again.
    positions: dict[tuple[str, ...], int] = defaultdict(int)
    for item, codes in index.items():
        if "".join(codes) in assigned:
            prefix, level = codes[:-1], last_codes[len(codes)]
            position = positions[*prefix]
            while position < len(level) and "".join([*prefix, level[position]]) in occupied:
                position += 1
            if position == len(level):
                level.append(next_code(level[-1]))
            positions[*prefix] = position + 1
            codes = [*prefix, level[position]]
            occupied.add("".join(codes))
        assigned.add("".join(codes))
        repaired[item] = codes
    return repaired


def next_code(code: str) -> str:
    """Return the code after a code: <d_255> -> <d_256>; InputError for a code without a number."""
    if not (number := re.search(r"\d+(?=\D*$)", code)):
        raise InputError(f"the code {code!r} has no number to increment; give the level more codes")
    return f"{code[: number.start()]}{int(number[0]) + 1}{code[number.end() :]}"


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="index file, D.index.json")
    parser.add_argument("--output", type=Path, required=True, help="repaired index file")
    parser.add_argument("--force", action="store_true", help="replace an index that was made from another one")
    args = one_line_errors(parser).parse_args()
    started = time.monotonic()
    check_outputs({"--output": args.output}, {"the index to repair": args.index})
    index = read_codes(args.index)
    made_with = {"index_sha256": file_sha256(args.index)}
    if texts := (read_record(args.index) or {}).get("texts"):
        made_with["texts"] = texts  # the items that the index was made for
    check_replaceable(args.output, made_with, args.force)
    repaired = deduplicate(index)
    with atomic_write(args.output) as temporary:
        write_json(temporary, repaired)
        write_record(args.output, made_with, run_metadata(vars(args), started), written=temporary)
    num_changed = sum(repaired[item] != codes for item, codes in index.items())
    print(f"{num_changed:,} of {len(index):,} items have a new last code -> {args.output}")


if __name__ == "__main__":
    main()
