"""Datasets as their authors publish them, with their own ids and splits -> files of a dataset folder.

A reader takes the arguments of `data.prepare` and returns a `Publication`; `data.prepare` writes it.
"""

import argparse
import glob
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.cleaning import clean_value, parse_list
from data.columns import Columns
from data.ingestion import LeftOut
from data.raw_files import JsonLines, Table, first_file, header_of, read_records
from reclingua.datasets import interactions
from reclingua.datasets.formats import PICKLE_ENDINGS, pickle_remedy
from reclingua.datasets.ratings import COLUMNS, PARTS, mark_warm, read_items, read_table, row_faults, without_padding
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json

Content = dict[str, Iterable[str] | pa.RecordBatchReader]
CODE = re.compile(r"<[^<>]+>")


@dataclass
class Publication:
    """A dataset that is taken as published: file name -> content, and what there is to say about it.

    Args:
        inputs: files that were read, none of which may be replaced.
    """

    content: Content
    summary: str
    notes: list[str] = field(default_factory=list)
    inputs: list[Path] = field(default_factory=list)

    def check_inputs(self, folder: Path) -> None:
        """Raise InputError if a file of `content`, written to `folder`, would replace one that was read."""
        for path in self.inputs:
            if path.name in self.content and path.resolve() == (folder / path.name).resolve():
                raise InputError(f"{path}: would be replaced by the dataset made of it; give another --data_path")


def _to_json(content: dict) -> list[str]:
    return [json.dumps(content, ensure_ascii=False, indent=1) + "\n"]


# ---- Ratings with the authors' split ----


def read_collm(args: argparse.Namespace) -> Publication:
    """Read the frames of CoLLM and BinLLM, turned from pickle into parquet: `train_ood2.parquet` and so on.

    Histories are padded with zeros; item titles are a column of the frames, or `item.json`.
    """
    tables, titles, inputs = {}, {}, [args.raw_path / "item.json"]
    for part in PARTS:
        path = _find_frame(args.raw_path, part)
        inputs.append(path)
        tables[part] = read_table(path)
        if "title" in tables[part].column_names and "iid" in tables[part].column_names:
            titles |= dict(zip(*(tables[part][name].to_pylist() for name in ("iid", "title")), strict=True))
    if (args.raw_path / "item.json").is_file():
        items = read_items(args.raw_path / "item.json")
    elif titles:
        items = {str(item): {"title": clean_value(titles[item])} for item in sorted(filter(_is_item, titles))}
    else:
        raise InputError(f"{args.raw_path}: the frames have no column 'title', and there is no item.json")
    publication = _to_publication(args, tables, items)
    publication.inputs = [path for path in inputs if path.is_file()]
    return publication


def _is_item(item: object) -> bool:
    return isinstance(item, int | float) and item == item and item > 0 and int(item) == item


def _find_frame(folder: Path, part: str) -> Path:
    names = [f"{part}_ood2.parquet", f"{part}_ood.parquet", f"{part}.parquet"]
    if path := next((folder / name for name in names if (folder / name).is_file()), None):
        return path
    for ending in PICKLE_ENDINGS:
        if pickle := next(iter(sorted(folder.glob(f"{part}*{ending}"))), None):
            raise InputError(pickle_remedy(pickle))
    raise InputError(f"{folder}: has none of {', '.join(names)}; see --raw_path")


def _to_publication(args: argparse.Namespace, tables: dict[str, pa.Table], items: dict[str, dict]) -> Publication:
    """Return the files of a ratings dataset; rows that cannot be used are left out."""
    notes, item_ids = [], np.array([int(item) for item in items])
    zero_based = any((pc.min(table["uid"]).as_py() or 0) == 0 for table in tables.values() if _has(table, "uid"))
    kept = {}
    for part, table in tables.items():
        path = args.raw_path / part
        columns = {name: _to_column(path, table, name) for name in COLUMNS if name != "not_cold"}
        if zero_based:
            columns["uid"] = pc.add(columns["uid"], 1).cast(pa.int32())
        left_out = LeftOut(path)
        left_out.total = len(table)
        is_bad = np.zeros(len(table), bool)
        for fault, rows in row_faults(columns, item_ids).items():
            if (rows & ~is_bad).any():
                row = int((rows & ~is_bad).argmax())
                reason = "has " + fault.partition("{")[0].rstrip(" ,") + (" out of range" if "{" in fault else "")
                text = str({name: column[row].as_py() for name, column in columns.items()})
                left_out.add(reason, row + 1, text, int((rows & ~is_bad).sum()))
                is_bad |= rows
        left_out.check(args.max_bad_share)
        notes += left_out.lines()
        kept[part] = pa.table(columns).filter(pa.array(~is_bad))
        if len(pc.unique(kept[part]["label"])) < 2:
            raise InputError(f"{path}: has not both labels 0 and 1, which AUC needs")
    if zero_based:
        notes.append("users are numbered from 1 instead of 0")
    schema = pa.schema(COLUMNS.items())
    content: Content = {"item.json": _to_json(items)}
    for part, table in mark_warm(kept).items():
        content[f"{part}.parquet"] = table.select(list(COLUMNS)).cast(schema).to_reader()
    sizes = ", ".join(f"{part} {len(table):,}" for part, table in kept.items())
    return Publication(content, f"{sizes} ratings, {len(items):,} items, in the published split", notes)


def _has(table: pa.Table, name: str) -> bool:
    return name in table.column_names and len(table) > 0


def _to_column(path: Path, table: pa.Table, name: str) -> pa.Array:
    if name == "timestamp" and name not in table.column_names:
        return pa.array(np.arange(len(table)), pa.int64())
    if name not in table.column_names:
        raise InputError(f"{path}: has no column {name!r}; it has {', '.join(table.column_names)}")
    values, kind = table[name].combine_chunks(), COLUMNS[name]
    try:
        if pa.types.is_floating(values.type):
            values = pc.fill_null(values, -1)  # outside of every range, so that the row is left out
        values = values.cast(kind)
        return without_padding(pc.fill_null(values, [])) if name == "his" else pc.fill_null(values, -1)
    except pa.ArrowException as error:
        raise InputError(f"{path}: column {name!r} should be {kind}, not {table[name].type} ({error})") from None


SECTIONS = ("User Preference:", "User Unpreference:", "Whether the user will like")
QUOTED = re.compile(r'"(.{0,1000}?)"(?=\s*(?:,|\?|$|written by))')


def read_tallrec(args: argparse.Namespace) -> Publication:
    """Read the samples of TALLRec: `train.json`, `valid.json`, `test.json`, lists of instruction, input and output.

    An input names the titles that a user likes and dislikes, and the one in question. Samples with the same titles
    are of one user, since TALLRec publishes no ids. Times are the order of the samples.
    """
    number_of: dict[str, int] = {}
    user_of: dict[str, int] = {}
    tables, notes, earlier = {}, [], 0
    for part in PARTS:
        path = first_file(args.raw_path, [f"{part}.json"])
        samples, left_out, rows = _read_samples(path), LeftOut(path), []
        left_out.total = len(samples)
        for position, sample in enumerate(samples, start=1):
            parsed = _parse_sample(sample)
            if parsed is None:
                left_out.add("is no sample of TALLRec", position, json.dumps(sample))
                continue
            profile, liked, title, label = parsed
            his = [number_of.setdefault(name, len(number_of) + 1) for name in liked]
            item = number_of.setdefault(title, len(number_of) + 1)
            user = user_of.setdefault(profile, len(user_of) + 1)
            rows.append({"uid": user, "iid": item, "label": label, "timestamp": earlier + position, "his": his})
        earlier += len(samples)
        left_out.check(args.max_bad_share)
        notes += left_out.lines()
        schema = pa.schema({name: kind for name, kind in COLUMNS.items() if name != "not_cold"})
        tables[part] = pa.Table.from_pylist(rows, schema)
    items = {str(number): {"title": clean_value(title)} for title, number in number_of.items()}
    publication = _to_publication(args, tables, items)
    publication.notes += notes
    return publication


def _read_samples(path: Path) -> list:
    try:
        samples = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); get the file again") from None
    if not isinstance(samples, list) or not samples:
        raise InputError(f"{path}: should be a list of objects with instruction, input and output")
    return samples


def _parse_sample(sample: object) -> tuple[str, list[str], str, int] | None:
    """Return (what tells users apart, liked titles, title in question, label), None for anything else."""
    if not isinstance(sample, dict) or not all(isinstance(sample.get(key), str) for key in ("input", "output")):
        return None
    preference, unpreference, question = SECTIONS
    before, has_question, asked = sample["input"].partition(question)
    liked, has_dislikes, _ = before.partition(unpreference)
    book = asked.partition('"')[2].rstrip().removesuffix("?").rstrip()
    if book.startswith('"') and book.endswith('"') and '" written by ' in book:
        asked = book[:-1]  # the book in question has quotes around title and author
    titles, answer = QUOTED.findall(asked), sample["output"].strip().strip('".').casefold()
    if not (has_question and has_dislikes and preference in liked and titles and answer in ("yes", "no")):
        return None
    return before, QUOTED.findall(liked.partition(preference)[2]), titles[0], int(answer == "yes")


# ---- Histories ----


def read_minionerec(args: argparse.Namespace) -> Publication:
    """Read MiniOneRec: `train/D*.csv`, `valid/D*.csv`, `test/D*.csv` and `info/D*.txt`, or train.csv, ..., info.txt.

    A row of a table is a history and the item after it; the rows of a user overlap and are joined to one history. A
    line of `info` has the semantic ID (if any), title and id of an item, separated by tabs.
    """
    folder, name = args.raw_path, args.dataset
    items, index, notes = _read_info(_find_file(folder, name, "info", "txt"), args)
    histories: dict[str, list[str]] = {}
    num_gaps = 0
    for part in PARTS:
        path = _find_file(folder, name, part, "csv")
        columns = Columns(path, header_of(path, ",", quoted=True, encoding=args.encoding)[","], args)
        user, item, history = (columns.names.index(key) if key in columns.names else None for key in WINDOW_COLUMNS)
        if user is None or item is None or history is None:
            raise InputError(f"{path}: should have the columns {', '.join(WINDOW_COLUMNS)}; see --source")
        left_out = LeftOut(path)
        for record in read_records(Table(path, len(columns.names), ",", quoted=True, encoding=args.encoding)):
            left_out.total += 1
            window = record.fields and _parse_window(record.fields[history], record.fields[item])
            if not record.fields or not window or any(number not in items for number in window):
                reason = record.fault or "has no list of items that info names"
                left_out.add(reason, record.line, record.text)
                continue
            num_gaps += not append_window(histories.setdefault(record.fields[user], []), window)
        left_out.check(args.max_bad_share)
        notes += left_out.lines()
    if num_gaps:
        notes.append(f"{num_gaps:,} histories do not continue the earlier one of their user")
    content: Content = {f"{name}.inter.json": _to_json(histories), f"{name}.item.json": _to_json(items)}
    if index:
        if (args.data_path / name / f"{name}.index.json").exists():
            raise InputError(f"{args.data_path / name / f'{name}.index.json'}: exists; move it, then run again")
        content[f"{name}.index.json"] = _to_json(index)
    notes.append("the test item is the last of each user (leave-one-out), not one of MiniOneRec's test rows")
    return Publication(content, f"{len(histories):,} users, {len(items):,} items", notes)


WINDOW_COLUMNS = ("user_id", "item_id", "history_item_id")


def _find_file(folder: Path, name: str, part: str, ending: str) -> Path:
    start = glob.escape(name)
    patterns = (f"{part}/{start}*.{ending}", f"{part}/*.{ending}", f"{part}.{ending}", f"{start}*{part}*.{ending}")
    for pattern in patterns:
        paths = sorted(folder.glob(pattern))
        if len(paths) > 1:
            raise InputError(
                f"{folder}: {pattern} fits {', '.join(path.name for path in paths)[:200]}; leave one there"
            )
        if paths:
            return paths[0]
    raise InputError(f"{folder}: has none of {', '.join(patterns)}; see --raw_path, --dataset")


def _read_info(path: Path, args: argparse.Namespace) -> tuple[dict[str, dict], dict[str, list[str]], list[str]]:
    """Return the items, with titles, their semantic IDs if all of them have one, and what was left out."""
    items, index, left_out = {}, {}, LeftOut(path)
    for record in read_records(Table(path, 1, "\n", header=False, encoding=args.encoding)):
        left_out.total += 1
        cells = record.text.split("\t")
        if record.fault or len(cells) < 2 or not cells[-1].strip():
            reason = record.fault or "should have a semantic ID, a title and an id, separated by tabs"
            left_out.add(reason, record.line, record.text)
            continue
        item = cells[-1].strip()
        items[item] = {"title": clean_value(cells[-2])}
        if len(cells) > 2 and (codes := CODE.findall(cells[0])):
            index[item] = codes
    left_out.check(args.max_bad_share)
    if not items:
        raise InputError(f"{path}: is empty; it should have a line for each item")
    return items, index if len(index) == len(items) else {}, left_out.lines()


def _parse_window(history: str, item: str) -> list[str] | None:
    """Return the items of a row, oldest first, None if the history is no list."""
    text = history.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    items = parse_list(text)
    if items is None:  # numbers
        items = [part.strip() for part in text[1:-1].split(",") if part.strip()]
    return [*map(str, items), item.strip()] if item.strip() else None


def append_window(sequence: list[str], window: list[str]) -> bool:
    """Append the items of `window` that `sequence` does not end with; return whether the two overlap.

    sequence a b c d     window c d e     ->  a b c d e
    """
    overlap = next((k for k in range(min(len(sequence), len(window)), 0, -1) if sequence[-k:] == window[:k]), 0)
    is_start = not sequence
    sequence += window[overlap:] if overlap or is_start else window[-1:]
    return bool(overlap) or is_start


def read_sequences(args: argparse.Namespace) -> Publication:
    """Read histories as text, `sequential_data.txt` of P5, TIGER and GRLM.

    A line is a user and the items, oldest first. Item texts are those of `D.item.json` beside it (GRLM), or of
    `datamaps.json` and `meta.json(.gz)`, a Python dictionary a line (P5).
    """
    path, name = first_file(args.raw_path, ["sequential_data.txt", f"{args.dataset}.txt"]), args.dataset
    histories, left_out = {}, LeftOut(path)
    for record in read_records(Table(path, 1, "\n", header=False, encoding=args.encoding)):
        left_out.total += 1
        user, *items = record.text.split() or [""]
        if record.fault or not items or user in histories:
            reason = record.fault or ("has no items" if not items else "has a user of an earlier line")
            left_out.add(reason, record.line, record.text)
        else:
            histories[user] = items
    left_out.check(args.max_bad_share)
    content: Content = {f"{name}.inter.json": _to_json(histories)}
    notes, used = left_out.lines(), {item for history in histories.values() for item in history}
    texts, remark = _sequence_texts(path.parent, sorted(used, key=lambda item: (len(item), item)), args)
    if texts:
        content[f"{name}.item.json"] = _to_json(texts)
    notes += [remark] if remark else []
    inputs = [path.with_name(f"{name}.item.json")]
    return Publication(content, f"{len(histories):,} users, {len(used):,} items", notes, inputs)


def _sequence_texts(folder: Path, items: list[str], args: argparse.Namespace) -> tuple[dict[str, dict], str]:
    """Return item -> texts from the files beside `sequential_data.txt`, and a remark; empty without such files."""
    separators = {"title": " ", "description": " ", "brand": " ", "categories": ", "}
    texts: dict[str, dict] = {item: {"title": "", "description": ""} for item in items}
    path = folder / f"{args.dataset}.item.json"
    metas = [folder / file for file in ("meta.json.gz", "meta.json") if (folder / file).is_file()]
    if path.is_file():
        records: Iterable[tuple[object, dict]] = interactions.read_items(path).items()
    elif metas and (folder / "datamaps.json").is_file():
        path, numbers = metas[0], read_json(folder / "datamaps.json", "id maps of P5").get("item2id")
        if not isinstance(numbers, dict):
            raise InputError(f"{folder / 'datamaps.json'}: should have an object item2id, raw id -> number")
        rows = (record.fields for record in read_records(JsonLines(path, (), encoding=args.encoding)))
        records = ((numbers.get(str(row.get("asin"))), row) for row in rows if isinstance(row, dict))
    else:
        return {}, f"there is no {path.name}, or datamaps.json and meta.json: the dataset has no texts"
    known = set()
    for item, row in records:
        if str(item) in texts:
            texts[str(item)] = {key: clean_value(row.get(key), separator) for key, separator in separators.items()}
            known.add(str(item))
    if not known:
        raise InputError(f"{path}: has none of the {len(items):,} items of the histories; give files of one dataset")
    missing = len(items) - len(known)
    return texts, f"{missing:,} items are not in {path.name}: they have no texts" if missing else ""


PUBLISHED: dict[str, Callable[[argparse.Namespace], Publication]] = {
    "collm": read_collm,
    "tallrec": read_tallrec,
    "minionerec": read_minionerec,
    "sequences": read_sequences,
}
