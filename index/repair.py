"""Tell apart the items of a published index that share one, without the embeddings it was made from.

python -m index.repair ../LC-Rec-data/Games/Games.index.json --output data/Games/Games.index.json

Of the items that share an index the first keeps it. Each of the others keeps all codes but the last, for which it gets
the first code of that level that is free; a code that no item has had yet, only where none is.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from reclingua.datasets.interactions import read_codes
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import write_json


def deduplicate(index: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """item -> code tokens, no two alike; items whose index is theirs alone, or was first, keep it."""
    taken = set(map("".join, index.values()))
    levels: dict[int, list[str]] = {}  # how many codes an index has -> the last codes of such
    for depth in set(map(len, index.values())):
        codes = {codes[-1] for codes in index.values() if len(codes) == depth}
        levels[depth] = sorted(codes, key=lambda code: (len(code), code))
    found, given = {}, set()
    for item, codes in index.items():
        if "".join(codes) in given:
            begin, last = codes[:-1], levels[len(codes)]
            code = next((code for code in last if "".join([*begin, code]) not in taken), None)
            if code is None:
                code = next_after(last[-1])
                last.append(code)
            codes = [*begin, code]
            taken.add("".join(codes))
        given.add("".join(codes))
        found[item] = codes
    return found


def next_after(code: str) -> str:
    """<d_255> -> <d_256>; InputError for a code without a number."""
    if not (number := re.search(r"\d+(?=\D*$)", code)):
        raise InputError(f"the code {code!r} has no number to count on from; give the level more codes")
    return f"{code[: number.start()]}{int(number[0]) + 1}{code[number.end() :]}"


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="index file, D.index.json")
    parser.add_argument("--output", type=Path, required=True, help="where the mended one goes")
    args = one_line_errors(parser).parse_args()
    index = read_codes(args.index)
    mended = deduplicate(index)
    write_json(args.output, mended)
    changed = sum(mended[item] != codes for item, codes in index.items())
    print(f"{changed:,} of {len(index):,} items got another last code -> {args.output}")


if __name__ == "__main__":
    main()
