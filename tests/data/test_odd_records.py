"""data.prepare on records that people really have: understood, or left out, counted and shown."""

import gzip
import json

import pytest

from data import prepare
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.ratings import open_ratings
from tests.helpers.raw_data import (
    ITEMS,
    ROWS,
    TITLES,
    WHEN,
    json_lines,
    prepare_flags,
    read_output,
    write,
    write_amazon2018,
    write_amazon2023,
    write_csv,
)

MANY = [(f"u{n}", f"i{n % 4 + 1}", 4 + n % 2, WHEN + n) for n in range(300)]


def run(script, tmp_path, source, raw_flags, *more):
    """Return the printed text of a run that succeeds."""
    code, out, error = script(prepare.main, *prepare_flags(tmp_path, source, raw_flags), *more)
    assert code == 0, error
    return out


def table(folder, text, encoding="utf-8", items="item,title\ni1,One\ni2,Two\n"):
    write(folder / "sales.csv", text.encode(encoding))
    write(folder / "goods.csv", items.encode(encoding))
    return "--raw_path", folder / "sales.csv", "--items_path", folder / "goods.csv"


ODD_LINES = {
    "no object": "[1]",
    "cut": '{"user_id": "a", "paren',
    "half a character": '{"user_id": "\\ud83d"}',
    "no user": json.dumps({"user_id": None, "parent_asin": "i1", "rating": 5, "timestamp": WHEN * 1000}),
    "the year 1": json.dumps({"user_id": "a", "parent_asin": "i1", "rating": 5, "timestamp": -62135596800000}),
    "no rating": json.dumps({"user_id": "a", "parent_asin": "i1", "rating": "?", "timestamp": WHEN * 1000}),
    "not in utf-8": b'{"user_id": "caf\xe9"}',
}


@pytest.mark.parametrize("case", ODD_LINES)
def test_one_odd_line_among_many_is_left_out_and_shown(tmp_path, script, refused, case):
    raw_flags = write_amazon2023(tmp_path / "raw", MANY, end=".jsonl")
    path = tmp_path / "raw/D.jsonl"
    lines, odd = path.read_bytes().split(b"\n"), ODD_LINES[case]
    lines.insert(7, odd if isinstance(odd, bytes) else odd.encode())
    path.write_bytes(b"\n".join(lines))
    out = run(script, tmp_path, "amazon2023", raw_flags)
    assert "left out: 1 of 301 lines of D.jsonl; line 8 " in out and "300 ratings read, 300 kept" in out
    error = refused(prepare.main, *prepare_flags(tmp_path, "amazon2023", raw_flags), "--max_bad_share", 0)
    assert "D.jsonl: line 8 " in error and "1 of 301 lines cannot be used, more than --max_bad_share 0" in error


def test_left_out_lines_are_counted_by_reason(tmp_path, script):
    raw_flags = write_csv(tmp_path / "raw", [*MANY, ("", "i1", 5, WHEN), ("a", "i1", 5, "soon"), ("", "", 5, WHEN)])
    out = run(script, tmp_path, "csv", raw_flags, "--max_bad_share", 0.05)
    assert "left out: 2 of 303 lines of sales.csv; line 302 has no user: " in out
    assert "left out: 1 of 303 lines of sales.csv; line 303 has no readable time: " in out


@pytest.mark.parametrize("field", ['"open', 'b"c"d', '"x"y'])
def test_a_stray_quote_costs_one_line(tmp_path, script, field):
    rows = "".join(f'{user},{item},{when},"a ""note""\nof two lines"\n' for user, item, _, when in MANY)
    raw_flags = table(tmp_path / "raw", f"user,item,timestamp,note\n{rows}{field},i1,5\n{rows}")
    out = run(script, tmp_path, "csv", raw_flags)
    assert "left out: 1 of 601 lines of sales.csv; line 602 has" in out


def test_a_line_that_is_too_long_is_left_out(tmp_path, script):
    rows = "".join(f"{user},{item},{when}\n" for user, item, _, when in MANY)
    raw_flags = table(tmp_path / "raw", f"user,item,timestamp\n{rows}{'a' * 2_100_000},i1,5\n")
    out = run(script, tmp_path, "csv", raw_flags)
    assert "left out: 1 of 301 lines of sales.csv; line 302 is longer than 2 MB: 'aaa" in out


# ---- Times ----

TIMES = {
    "ISO": (["2017-07-15", "2017-07-15 10:00:00+02:00", "2017-07-15T10:00", "2017-07-15T10:00:00.5Z"], ()),
    "compact": (["20170715", "20170716", "20170717.0", "20170718"], ()),
    "compact with hour": (["2017071510", "2017071511", "2017071600", "2017071700"], ()),
    "compact with time": (["20170715100000", "20170715100001", "20170716100000", "20170717000000"], ()),
    "day first": (["15/07/2017", "16/07/2017", "17/07/2017", "18/07/2017"], ("--time_format", "%d/%m/%Y")),
    "words": (["Posted July 5, 2017.", "Posted July 6, 2017."] * 2, ("--time_format", "Posted %B %d, %Y.")),
    "micro": ([str(WHEN * 10**6 + n) for n in range(4)], ("--time_unit", "us")),
    "nano": ([str(WHEN * 10**9 + n) for n in range(4)], ("--time_unit", "ns")),
    "positions": (["0", "1", "2", "20170715"], ()),
}


@pytest.mark.parametrize("case", TIMES)
def test_times_are_understood(tmp_path, script, case):
    times, flags = TIMES[case]
    rows = [("Ann", item, 5, time) for item, time in zip(ITEMS, times, strict=True)]
    out = run(script, tmp_path, "csv", write_csv(tmp_path / "raw", rows), *flags)
    order = ["0", "2", "1", "3"] if case == "words" else ["0", "1", "2", "3"]
    assert read_output(tmp_path)[0]["0"] == order
    assert ("read as dates" in out) == case.startswith("compact") and "left out" not in out
    assert ("read as positions in an order" in out) == (case == "positions")
    if case != "positions":
        days = ("--start", "2017-07-01", "--end", "2017-07-31")
        assert "dropped" not in run(script, tmp_path, "csv", write_csv(tmp_path / "raw", rows), *flags, *days)


@pytest.mark.parametrize("window", [("--start", "2017-07-01"), ("--task", "preference")])
def test_positions_have_no_window(tmp_path, refused, window):
    rows = [("Ann", item, 5, 201707 + place) for place, item in enumerate(ITEMS)]
    flags = prepare_flags(tmp_path, "csv", write_csv(tmp_path / "raw", rows), *window)
    assert "small numbers, such as 201708, read as positions in an order; " in refused(prepare.main, *flags)


BAD_TIMES = {
    "ms": (WHEN * 1000, "is it in milliseconds? --time_unit ms"),
    "us": (WHEN * 10**6, "is it in microseconds? --time_unit us"),
    "ns": (WHEN * 10**9, "is it in nanoseconds? --time_unit ns"),
    "day first": ("25/12/2010", 'has no readable time: \'"5";"a";"i1";"25/12/2010"\'; 1 of 301 lines'),
    "the year 1": (-62135596800, "has an implausible time (it is the year 1)"),
    "the year 3000": ("3000-01-01", "has an implausible time (it is the year 3000)"),
    "a date among seconds": (20170715, "is it a date? --time_format %Y%m%d"),
}


@pytest.mark.parametrize("case", BAD_TIMES)
def test_the_hint_fits_the_time(tmp_path, refused, case):
    time, hint = BAD_TIMES[case]
    raw_flags = write_csv(tmp_path / "raw", [*MANY, ("a", "i1", 5, time)])
    error = refused(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags), "--max_bad_share", 0)
    assert "sales.csv: line 302 has " in error and hint in error


def test_a_table_without_times_has_the_order_of_its_lines(tmp_path, script, refused):
    raw_flags = table(tmp_path / "raw", "user,item\n" + "a,i2\na,i1\n" * 3)
    assert "has no column of times" in refused(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags))
    run(script, tmp_path, "csv", raw_flags, "--time_column", "none")
    assert read_output(tmp_path)[0]["0"] == ["1", "0"] * 3
    flags = (*prepare_flags(tmp_path, "csv", raw_flags), "--time_column", "none", "--task", "preference")
    assert "need times" in refused(prepare.main, *flags)


# ---- Encodings, headers, ids, numbers ----


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "gbk"])
def test_encodings(tmp_path, script, refused, encoding):
    name = "上海" if encoding == "gbk" else "Café"
    text = "user,item,timestamp\n" + "".join(f"{name}{n},i{n % 2 + 1},{WHEN + n}\n" for n in range(50))
    raw_flags = table(tmp_path / "raw", text, encoding, f"item,title\ni1,{name}\ni2,b\n")
    assert "--encoding" in refused(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags))
    run(script, tmp_path, "csv", raw_flags, "--encoding", encoding)
    assert read_output(tmp_path)[1]["0"] == name and read_output(tmp_path)[2].startswith(f"{name}0\t")


def test_a_line_in_another_encoding_costs_one_line(tmp_path, script):
    lines = "".join(f"{user},{item},{when}\n" for user, item, _, when in MANY)
    raw_flags = table(tmp_path / "raw", f"user,item,timestamp\n{lines}")
    with (tmp_path / "raw/sales.csv").open("ab") as file:
        file.write(f"Zo\xeb,i1,{WHEN}\n".encode("latin-1"))
    out = run(script, tmp_path, "csv", raw_flags)
    assert "left out: 1 of 301 lines of sales.csv; line 302 is not in utf-8" in out and "300 ratings read" in out


@pytest.mark.parametrize("source", ["csv", "amazon2023"])
def test_gzipped_files_are_known_by_their_content(tmp_path, script, source):
    raw_flags = (write_csv if source == "csv" else write_amazon2023)(tmp_path / "raw")
    expected = run(script, tmp_path, source, raw_flags)
    for path in (tmp_path / "raw").iterdir():
        content = path.read_bytes()
        path.write_bytes(gzip.decompress(content) if path.suffix == ".gz" else gzip.compress(content))
    assert run(script, tmp_path, source, raw_flags).splitlines()[0] == expected.splitlines()[0]


@pytest.mark.parametrize("start, message", [(b"PK\x03\x04", "is a zip archive"), (b"PAR1", "is a parquet file")])
@pytest.mark.parametrize("file", ["sales.csv", "goods.csv"])
def test_files_that_are_no_text_are_named(tmp_path, refused, start, message, file):
    raw_flags = table(tmp_path / "raw", f"user,item,timestamp\na,i1,{WHEN}\n")
    (tmp_path / "raw" / file).write_bytes(start + bytes(60))
    assert f"{file}: {message}" in refused(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags))


def test_headers_and_ids_are_stripped_and_whole_numbers_are_integers(tmp_path, script):
    text = " User , item, rating ,timestamp\n" + "".join(f" {u}.0 , {i}, 5 ,{WHEN}\n" for u in (1, 2) for i in (1, 12))
    items = "item,title\n1.0,One\n1.2e+01,Twelve\n"
    run(script, tmp_path, "csv", table(tmp_path / "raw", "\ufeff" + text, items=items))
    inter, titles, users = read_output(tmp_path)
    assert titles == {"0": "One", "1": "Twelve"} and users == "1\t0\n2\t1\n" and len(inter["0"]) == 2


LABELS = {
    "booleans": (("True", "False"), ()),
    "words": (("yes", "no"), ()),
    "numbers": (("1", "0"), ()),
    "decimal commas": (("4,5", "2,5"), ("--decimal", ",")),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_and_decimal_commas(tmp_path, script, case):
    (liked, disliked), flags = LABELS[case]
    month = 31 * 86400
    rows = [(f"u{n % 6}", f"i{n % 4 + 1}", liked if n % 3 else disliked, WHEN + n // 4 * month) for n in range(12)]
    raw_flags = write_csv(tmp_path / "raw", rows)
    task = ("--task", "preference", "--months", 1, 1, 1, "--start", "2017-07-01", *flags)
    run(script, tmp_path, "csv", raw_flags, *task)
    labels = [label for part in open_ratings(tmp_path / "out", "D").parts.values() for label in part["label"]]
    assert sum(labels) == 8 and len(labels) == 12
    (tmp_path / "out/D/item.json").unlink()
    out = run(script, tmp_path, "csv", raw_flags, *flags)
    assert ("dropped: 4 ratings with label 0" in out) == (case != "decimal commas")


def test_marks_of_missing_values_are_missing(tmp_path, script, refused):
    rows = [("u1", "i1", 5, WHEN), ("NaN", "i1", 5, WHEN), ("u2", "NULL", 5, WHEN), ("-", "i2", 5, WHEN)]
    raw_flags = write_csv(tmp_path / "raw", [*MANY, *rows], TITLES | {"i2": "nan"})
    out = run(script, tmp_path, "csv", raw_flags)
    assert "1 of 304 lines of sales.csv; line 303 has no user" in out and "line 304 has no item" in out
    assert read_output(tmp_path)[1]["1"] == "" and "-\t0" in read_output(tmp_path)[2]
    out = run(script, tmp_path, "csv", raw_flags, "--na_values", "-")
    assert "line 305 has no user" in out and "NaN\t0" in read_output(tmp_path)[2]


def test_a_user_with_a_large_share_is_shown(tmp_path, script):
    rows = [*MANY, *(("anonymous", f"i{n % 4 + 1}", 5, WHEN + n) for n in range(100))]
    out = run(script, tmp_path, "csv", write_csv(tmp_path / "raw", rows))
    assert "user 'anonymous' has 25.0% of all ratings" in out
    assert "of all ratings" not in run(script, tmp_path, "csv", write_csv(tmp_path / "raw"))


# ---- Columns ----


def test_tables_with_other_names_for_the_items(tmp_path, script, refused):
    text = "customer,product_id,timestamp\n" + "".join(f"c{n % 2},p{n // 2 % 2},{WHEN + n}\n" for n in range(9))
    items = "id,name,maker,kind\np0,Lamp,Acme,Light\np1,,Acme,Light\n"
    raw_flags = table(tmp_path / "raw", text, items=items)
    assert "name it with --user_column" in refused(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags))
    columns = ("--user_column", "customer", "--items_id_column", "id", "--brand_column", "maker")
    run(script, tmp_path, "csv", raw_flags, *columns, "--categories_column", "kind")
    items = json.loads((tmp_path / "out/D/D.item.json").read_text())
    assert items["0"] == {"title": "Lamp", "description": "", "brand": "Acme", "categories": "Light"}
    assert open_interactions(tmp_path / "out", "D").title("1") == "Acme"
    flags = (*prepare_flags(tmp_path, "csv", raw_flags), "--user_column", "customer", "--items_id_column", "sku")
    assert "goods.csv: has no column 'sku'; it has id, name, maker, kind" in refused(prepare.main, *flags)


ATOMIC = {  # dataset -> header of .inter, a line, header of .item, a line, more flags, title of the item
    "steam": ("user_id:token play_hours:float product_id:token date:token", "u 3.5 i 2017-07-15",
              "app_name:token_seq id:token tags:token_seq title:token", "Half-Life i Action nan", (), "Half-Life"),
    "yelp": ("review_id:token user_id:token business_id:token stars:float date:float", f"r u i 4 {WHEN}",
             "business_id:token item_name:token_seq categories:token_seq", "i Diner Food", (), "Diner"),
    "lastfm": ("user_id:token artist_id:token weight:float", "u i 13883",
               "artist_id:token name:token_seq url:token", "i ABBA http://x", ("--time_column", "none"), "ABBA"),
    "mind": ("user_id:token item_id:token label:float timestamp:float", f"u i 1 {WHEN}",
             "item_id:token category:token title:token_seq abstract:token_seq", "i news Storm Wind", (), "Storm"),
}  # fmt: skip


@pytest.mark.parametrize("case", ATOMIC)
def test_atomic_files_of_other_datasets(tmp_path, script, case):
    inter_header, inter, item_header, item, flags, title = ATOMIC[case]
    for ending, lines in (("inter", (inter_header, inter)), ("item", (item_header, item))):
        write(tmp_path / f"raw/D.{ending}", "".join(line.replace(" ", "\t") + "\n" for line in lines))
    run(script, tmp_path, "recbole", ("--raw_path", tmp_path / "raw"), *flags)
    assert read_output(tmp_path)[:2] == ({"0": ["0"]}, {"0": title})


def test_impressions_that_were_not_clicked_are_no_history(tmp_path, script):
    rows = "".join(f"u\ti{n}\t{n % 2}\t{WHEN + n}\n" for n in range(6))
    write(tmp_path / "raw/D.inter", "user_id:token\titem_id:token\tlabel:float\ttimestamp:float\n" + rows)
    out = run(script, tmp_path, "recbole", ("--raw_path", tmp_path / "raw"))
    assert "dropped: 3 ratings with label 0" in out and "there is no D.item" in out
    assert json.loads((tmp_path / "out/D/D.inter.json").read_text()) == {"0": ["0", "1", "2"]}


def test_amazon_2014(tmp_path, script):
    """Its metadata are Python dictionaries; nothing in them is run."""
    write_amazon2018(tmp_path / "raw")
    (tmp_path / "raw/D.json").rename(tmp_path / "raw/reviews_D_5.json")
    records = [{"asin": item, "title": f"It's {item}", "categories": [["Office", "Pens"]]} for item in ITEMS[:3]]
    records.append({"asin": "i4", "brand": "Acme", "salesRank": {"Office": 7}})
    attack = f"__import__('pathlib').Path({str(tmp_path / 'hacked')!r}).touch()"
    write(tmp_path / "raw/meta_D.json.gz", "".join(f"{record!r}\n" for record in records * 50) + attack + "\n")
    out = run(script, tmp_path, "amazon2014", ("--raw_path", tmp_path / "raw"))
    assert "left out: 1 of 201 lines of meta_D.json.gz; line 201 is no JSON object" in out
    assert "1 items without a title are named by their brand (1)" in out and not (tmp_path / "hacked").exists()
    items = json.loads((tmp_path / "out/D/D.item.json").read_text())
    assert items["0"] == {"title": "It's i1", "description": "", "brand": "", "categories": "Office, Pens"}


@pytest.mark.parametrize("source, name", [("amazon2014", "ratings_D.csv"), ("amazon2018", "D.csv")])
def test_amazon_ratings_without_reviews(tmp_path, script, source, name):
    write_amazon2018(tmp_path / "raw")
    (tmp_path / "raw/D.json").unlink()
    pairs = [(user, item) if source == "amazon2014" else (item, user) for user, item, _, _ in ROWS]
    lines = [f"{a},{b},{row[2]},{row[3]}\n" for (a, b), row in zip(pairs, ROWS, strict=True)]
    write(tmp_path / "raw" / name, "".join(lines))
    run(script, tmp_path, source, ("--raw_path", tmp_path / "raw"))
    assert read_output(tmp_path)[2] == "Ann\t0\nBob\t1\nCy\t2\n"


def test_json_fields_have_flags_too(tmp_path, script):
    write(tmp_path / "raw/D.jsonl", json_lines({"who": u, "sku": i, "stars": r, "at": t} for u, i, r, t in ROWS))
    write(tmp_path / "raw/meta_D.jsonl", json_lines({"sku": i, "name": t} for i, t in TITLES.items()))
    columns = ("--user_column", "who", "--item_column", "sku", "--rating_column", "stars", "--time_column", "at")
    flags = (*columns, "--title_column", "name", "--time_unit", "s")
    run(script, tmp_path, "amazon2023", ("--raw_path", tmp_path / "raw"), *flags)
    assert read_output(tmp_path)[1]["0"] == "Thing i1 & more"


FLAGS = {
    "format": (("--time_format", "%Q"), "--time_format %Q: is no format like"),
    "encoding": (("--encoding", "latin-99"), "--encoding latin-99: no such encoding"),
    "decimal": (("--decimal", "12"), "--decimal 12: should be one character"),
    "share": (("--max_bad_share", "1"), "--max_bad_share 1: should be from 0 to below 1"),
    "column": (("--time_column", "when"), "has no column 'when'"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_of_values_are_checked(tmp_path, refused, case):
    bad_flags, message = FLAGS[case]
    raw_flags = table(tmp_path / "raw", f"user,item,timestamp\na,i1,{WHEN}\n")
    assert message in refused(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags), *bad_flags)
    assert not (tmp_path / "out").exists()
