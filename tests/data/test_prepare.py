"""Raw files of every source -> dataset: reading, filtering, bad input, and fuzzing."""

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare
from data.cleaning import clean_text, natural_title
from data.filtering import filter_core
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.ratings import open_ratings

# ---- RecBole files ----


def write_atomic(folder, ratings, items):
    folder.mkdir(exist_ok=True)
    rows = "".join(f"{u}\t{i}\t4\t{t}\n" for u, i, t in ratings)
    (folder / "mini.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + rows)
    rows = "".join(f"{i}\t{title}\t{year}\t{kind}\n" for i, title, year, kind in items)
    head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    (folder / "mini.item").write_text(head + rows)


MOVIES = [(i, f"Film {i}, The", 1990 + i, "Drama War") for i in range(1, 11)]


def test_prepare_orders_by_time_and_keeps_ties_in_file_order(tmp_path, script):
    ratings = [(u, i, 5) for u in (10, 9) for i in (3, 1, 2)] + [(9, 10, 1), (10, 10, 9)]
    write_atomic(tmp_path / "raw", ratings, MOVIES)
    flags = ("--dataset", "mini", "--raw_path", tmp_path / "raw", "--data_path", tmp_path, "--min_interactions", 2)
    code, out, _ = script(prepare.main, *flags)
    assert code == 0 and "users 2" in out
    inter = json.loads((tmp_path / "mini/mini.inter.json").read_text())
    assert inter == {"0": ["3", "2", "0", "1"], "1": ["2", "0", "1", "3"]}  # raw ids 9, 10 and 1, 2, 3, 10 numbered
    item = json.loads((tmp_path / "mini/mini.item.json").read_text())["3"]
    assert (item["title"], item["description"]) == ("The Film 10", "Released in 2000. Genres: Drama, War")
    assert (tmp_path / "mini/mini.item2id").read_text().splitlines()[-1] == "10\t3"


def test_prepare_replaces_all_files_or_none(tmp_path, script, refused):
    write_atomic(tmp_path / "raw", [(u, i, i) for u in (1, 2) for i in (1, 2, 3)], MOVIES)
    flags = ("--dataset", "mini", "--raw_path", tmp_path / "raw", "--data_path", tmp_path, "--min_interactions", 1)
    assert script(prepare.main, *flags)[0] == 0
    content = (tmp_path / "mini/mini.inter.json").read_bytes()
    (tmp_path / "mini/mini.item2id").unlink()
    (tmp_path / "mini/mini.item2id").mkdir()
    write_atomic(tmp_path / "raw", [(u, i, -i) for u in (1, 2) for i in (1, 2, 3)], MOVIES)
    assert "mini.item2id: is a folder" in refused(prepare.main, *flags)
    assert (tmp_path / "mini/mini.inter.json").read_bytes() == content


def test_bad_raw_files_are_rejected(tmp_path, refused):
    raw = tmp_path / "raw"
    flags = ("--dataset", "mini", "--raw_path", raw, "--data_path", tmp_path / "out", "--min_interactions", 1)
    assert "mini.inter: no such file" in refused(prepare.main, *flags)
    write_atomic(raw, [(1, 1, "yesterday")], MOVIES)
    assert "line 2 has no numeric timestamp" in refused(prepare.main, *flags)
    write_atomic(raw, [(1, 77, 5)], MOVIES)
    assert "item '77' has ratings but no line" in refused(prepare.main, *flags)
    write_atomic(raw, [(1, 1, 5)], MOVIES)
    assert "lower --min_interactions" in refused(prepare.main, *flags[:-1], 9)
    assert not (tmp_path / "out").exists()


# ---- Text ----

TEXTS = {
    "Tom &amp;amp; Jerry": "Tom & Jerry",
    "R&amp;D at Q&A, AT&T": "R&D at Q&A, AT&T",
    "&lt;b&gt;bold&lt;/b&gt;": "bold",
    "one<br/>two<p class='x'>three</p>": "one two three",
    "H<sub>2</sub>O": "H2O",
    "a<script>var x = '<p>';</script>b<style>p {}</style>c": "a b c",
    "x <SCRIPT src='y'>never closed": "x",
    "<!-- no --> yes": "yes",
    "  much\t\n white\u00a0&nbsp;space ": "much white space",
    "I <3 this; 5 < 6 > 4": "I <3 this; 5 < 6 > 4",
    "&#233;&#xe9;&eacute; &bogus; &#0; &#99999999;": "ééé &bogus; \ufffd &#99999999;",
    "": "",
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_cleaned(text):
    assert clean_text(text) == TEXTS[text]


@given(st.text(st.sampled_from("<>&;/!-ab #x1script \n"), max_size=200))
def test_cleaned_text_is_clean(text):
    once = clean_text(text)
    assert once == " ".join(once.split())
    assert "<script>" not in once and "&amp;" not in once


@pytest.mark.parametrize("piece", ["<", "<script", "<!--", "&amp;", "&", "<b ", "</script>", "<!"])
def test_cleaning_long_text_is_fast(piece):
    started = time.monotonic()
    clean_text(piece * 50_000)
    assert time.monotonic() - started < 5


def test_titles_read_naturally():
    assert natural_title("Godfather, The (1972)") == "The Godfather (1972)"
    assert natural_title("Me, Myself") == "Me, Myself" and natural_title("") == ""


# ---- The same ratings in the format of every source ----

USERS, ITEMS = ("Ann", "Bob", "Cy"), ("i1", "i2", "i3", "i4")
WHEN = 1_500_000_000
ROWS = [
    (user, item, 4 + (i + j) % 2, WHEN + 10 * i + j) for i, user in enumerate(USERS) for j, item in enumerate(ITEMS)
]
TITLES = {item: f"Thing {item} &amp;amp; more" for item in ITEMS}


def json_lines(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def quoted(rows, delimiter=","):
    cells = [[f'"{str(cell).replace(chr(34), chr(34) * 2)}"' for cell in row] for row in rows]
    return "".join(delimiter.join(row) + "\n" for row in cells)


def write_recbole(folder, rows=ROWS, titles=TITLES):
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    write(folder / "D.inter", head + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    write(folder / "D.item", "item_id:token\ttitle:token_seq\n" + "".join(f"{i}\t{t}\n" for i, t in titles.items()))
    return "--raw_path", folder


def write_amazon2018(folder, rows=ROWS, titles=TITLES, end=".json"):
    keys = ("reviewerID", "asin", "overall", "unixReviewTime")
    write(folder / f"D{end}", json_lines(dict(zip(keys, row, strict=True)) for row in rows))
    write(folder / f"meta_D{end}", json_lines({"asin": i, "title": t, "description": [t]} for i, t in titles.items()))
    return "--raw_path", folder


def write_amazon2023(folder, rows=ROWS, titles=TITLES, end=".jsonl.gz"):
    keys = ("user_id", "parent_asin", "rating", "timestamp")
    rows = [(*row[:3], row[3] * 1000 + 7 if isinstance(row[3], int) else row[3]) for row in rows]
    write(folder / f"D{end}", json_lines(dict(zip(keys, row, strict=True)) for row in rows))
    more = {"features": ["Red", "<b>big</b>"], "categories": ["A", "B"], "store": None, "description": []}
    write(folder / f"meta_D{end}", json_lines({"parent_asin": i, "title": t, **more} for i, t in titles.items()))
    return "--raw_path", folder


def write_movielens1m(folder, rows=ROWS, titles=TITLES):
    write(folder / "ratings.dat", "".join("::".join(map(str, row)) + "\n" for row in rows))
    write(folder / "movies.dat", "".join(f"{i}::{t}::Drama|War\n" for i, t in titles.items()).encode())
    return "--raw_path", folder


def write_movielens20m(folder, rows=ROWS, titles=TITLES):
    write(
        folder / "ratings.csv",
        "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, r)) + "\n" for r in rows),
    )
    kinds = "(no genres listed)"
    write(folder / "movies.csv", "movieId,title,genres\n" + quoted([(i, t, kinds) for i, t in titles.items()]))
    return "--raw_path", folder


def write_csv(folder, rows=ROWS, titles=TITLES, delimiter=";"):
    write(
        folder / "sales.csv",
        quoted([("stars", "who", "what", "sold"), *((r[2], r[0], r[1], r[3]) for r in rows)], delimiter),
    )
    write(folder / "goods.csv.gz", quoted([("what", "name"), *titles.items()]))
    columns = ("--user_column", "who", "--item_column", "what", "--time_column", "sold", "--rating_column", "stars")
    files = ("--raw_path", folder / "sales.csv", "--items_path", folder / "goods.csv.gz", "--title_column", "name")
    return *files, *columns


WRITERS = {
    "recbole": write_recbole,
    "amazon2018": write_amazon2018,
    "amazon2023": write_amazon2023,
    "movielens": write_movielens1m,
    "movielens csv": write_movielens20m,
    "csv": write_csv,
}


@pytest.fixture(params=WRITERS)
def source(request):
    return request.param


def flags(tmp_path, source, raw_flags, *more):
    start = ("--source", source.split()[0], "--dataset", "D", "--data_path", tmp_path / "out")
    return *start, *raw_flags, "--min_interactions", 1, *more


def read_output(tmp_path):
    folder = tmp_path / "out/D"
    inter, item = (json.loads((folder / f"D.{name}.json").read_text()) for name in ("inter", "item"))
    return inter, {key: record["title"] for key, record in item.items()}, (folder / "D.user2id").read_text()


def test_every_source_gives_the_same(tmp_path, script, source):
    code, out, error = script(prepare.main, *flags(tmp_path, source, WRITERS[source](tmp_path / "raw")))
    assert code == 0, error
    inter, titles, users = read_output(tmp_path)
    assert inter == {str(u): ["0", "1", "2", "3"] for u in range(3)}
    assert titles == {str(i): f"Thing {item} & more" for i, item in enumerate(ITEMS)}
    assert users == "Ann\t0\nBob\t1\nCy\t2\n"
    assert "12 ratings read, 12 kept" in out and "dropped" not in out
    assert "users 3   items 4   density 100.00%" in out and "min 4, median 4, mean 4.0, max 4" in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["D"]
    assert open_interactions(tmp_path / "out", "D", ["items"]).test_users == ["0", "1", "2"]


def test_every_source_gives_preferences(tmp_path, script, source):
    month = 86400 * 31
    rows = [(user, item, 4 + n % 2, WHEN + n // 4 * month) for n, (user, item, _, _) in enumerate(ROWS)]
    again = [(*rows[1][:3], WHEN + month), (*rows[2][:2], 5, WHEN + 2 * month)]
    raw_flags = WRITERS[source](tmp_path / "raw", [*rows, *again])
    task = ("--task", "preference", "--months", 1, 1, 1, "--liked_above", 4, "--start", "2017-07-01")
    code, out, error = script(prepare.main, *flags(tmp_path, source, raw_flags, *task))
    assert code == 0 and "dropped: 2 ratings of items that the user had rated before" in out, error
    parts = open_ratings(tmp_path / "out", "D").parts
    assert {part: rows["label"] for part, rows in parts.items()} == dict.fromkeys(parts, [0, 1, 0, 1])
    assert parts["train"]["his"] == [[], [], [2], [2]] and parts["test"]["not_cold"] == [0] * 4


@pytest.mark.parametrize("shuffle", range(2))
def test_ids_do_not_depend_on_the_order_of_lines(tmp_path, script, source, shuffle):
    rows = random.Random(shuffle).sample(ROWS, len(ROWS))
    titles = dict(reversed(TITLES.items()))
    assert script(prepare.main, *flags(tmp_path, source, WRITERS[source](tmp_path / "raw", rows, titles)))[0] == 0
    inter, titles, _ = read_output(tmp_path)
    assert inter == {str(u): ["0", "1", "2", "3"] for u in range(3)} and titles["3"] == "Thing i4 & more"


def test_duplicates_count_once(tmp_path, script, source):
    again = (*ROWS[0][:3], WHEN + 99)
    raw_flags = WRITERS[source](tmp_path / "raw", [*ROWS, *[ROWS[0]] * 5000, again])
    code, out, error = script(prepare.main, *flags(tmp_path, source, raw_flags))
    assert code == 0 and "dropped: 5,000 ratings with user, item and time of another" in out, error
    assert read_output(tmp_path)[0]["0"] == ["0", "1", "2", "3", "0"]  # the same item at another time is kept


def test_start_and_end_limit_the_window(tmp_path, script, refused, source):
    rows = [(u, i, r, WHEN + 86400 * n) for n, (u, i, r, _) in enumerate(ROWS)]  # from 2017-07-14 on, a day each
    raw_flags = WRITERS[source](tmp_path / "raw", rows)
    window = ("--start", "2017-07-16", "--end", "2017-07-23")
    code, out, error = script(prepare.main, *flags(tmp_path, source, raw_flags, *window))
    assert code == 0 and "dropped: 4 ratings before --start or after --end" in out, error
    assert read_output(tmp_path)[0] == {"0": ["2", "3"], "1": ["0", "1", "2", "3"], "2": ["0", "1"]}
    error = refused(prepare.main, *flags(tmp_path, source, raw_flags, "--start", "2020-01-01"))
    assert "no ratings from --start to --end; the data has 2017-07-14 to 2017-07-25" in error


def test_items_without_a_title(tmp_path, script, refused, source):
    raw_flags = WRITERS[source](tmp_path / "raw", ROWS, {"i1": "One", "i2": "Two", "i3": "<br> "})
    if source in ("recbole", "movielens", "movielens csv"):
        assert "item 'i4' has ratings but no line" in refused(prepare.main, *flags(tmp_path, source, raw_flags))
        assert not (tmp_path / "out").exists()
    else:
        code, out, error = script(prepare.main, *flags(tmp_path, source, raw_flags))
        assert code == 0 and "dropped: 6 ratings of items without a title" in out, error
        assert read_output(tmp_path)[1] == {"0": "One", "1": "Two"}
        raw_flags = WRITERS[source](tmp_path / "raw", ROWS, {"other": "One"})
        assert "has a title for none of the 4 items of" in refused(prepare.main, *flags(tmp_path, source, raw_flags))


UNUSUAL_IDS = [
    "tab\there",
    "new\nline",
    "back\\slash",
    'quo"te',
    "ünï 🎬",
    "x" * 5000,
    " ",
    "a,b;c|d",
    "NULL",
    "'",
    "--",
]


@pytest.mark.parametrize("source", ["amazon2018", "amazon2023", "csv"])
def test_unusual_ids_are_kept(tmp_path, script, source):
    raw_flags = WRITERS[source](tmp_path / "raw*[1]/k=v", [(name, "i1", 5, WHEN) for name in UNUSUAL_IDS])
    code, _, error = script(prepare.main, *flags(tmp_path, source, raw_flags))
    assert code == 0, error
    lines = (tmp_path / "out/D/D.user2id").read_bytes().decode().removesuffix("\n").split("\n")
    unescaped = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
    names = []
    for number, line in enumerate(lines):
        name, number_text = line.split("\t")
        assert number_text == str(number)
        letters = iter(name)
        names.append("".join(unescaped[c + next(letters)] if c == "\\" else c for c in letters))
    assert names == sorted(UNUSUAL_IDS)


# ---- Bad input ----

BAD_ROWS = {
    "no user": (("", "i1", 5, WHEN), "has no user"),
    "no item": (("Ann", "", 5, WHEN), "has no item"),
    "rating": (("Ann", "i1", "good", WHEN), "has no numeric rating"),
    "NaN": (("Ann", "i1", float("nan"), WHEN), "has no numeric rating"),
    "unit": (("Ann", "i1", 5, WHEN * 1_000_000), "is no number of"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_the_line_of_a_bad_row_is_named(tmp_path, refused, source, case):
    row, message = BAD_ROWS[case]
    if source == "recbole" and "rating" in message:
        pytest.skip("ratings are optional in RecBole files")
    raw_flags = WRITERS[source](tmp_path / "raw", [*ROWS, row, *ROWS])
    error = refused(prepare.main, *flags(tmp_path, source, raw_flags))
    line = 13 if source in ("movielens", "amazon2018", "amazon2023") else 14  # after a header
    assert f": line {line}" in error and message in error
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_units_of_time(tmp_path, script, refused):
    raw_flags = write_amazon2023(tmp_path / "raw", [(u, i, r, t / 1000) for u, i, r, t in ROWS])
    assert "is no number of milliseconds since 1970; is it in seconds?" in refused(
        prepare.main, *flags(tmp_path, "amazon2023", raw_flags)
    )
    raw_flags = write_csv(tmp_path / "raw", [(u, i, r, t * 1000) for u, i, r, t in ROWS])
    assert "is it in milliseconds?" in refused(prepare.main, *flags(tmp_path, "csv", raw_flags))
    assert script(prepare.main, *flags(tmp_path, "csv", raw_flags, "--time_unit", "ms"))[0] == 0
    inter = read_output(tmp_path)[0]
    days = [(u, i, r, f"2017-07-{n + 1:02d}" + " 10:00:00" * (n % 2)) for n, (u, i, r, _) in enumerate(ROWS)]
    assert script(prepare.main, *flags(tmp_path, "csv", write_csv(tmp_path / "raw", days)))[0] == 0
    assert read_output(tmp_path)[0] == inter


def test_delimiters_are_detected_by_the_header(tmp_path, script, refused):
    for delimiter in ",;|\t":
        raw_flags = write_csv(tmp_path / "raw", delimiter=delimiter)
        assert script(prepare.main, *flags(tmp_path, "csv", raw_flags))[0] == 0
    error = refused(prepare.main, *flags(tmp_path, "csv", raw_flags, "--user_column", "whom"))
    assert "sales.csv: has no column 'whom'; it has stars, who, what, sold" in error
    write(tmp_path / "raw/sales.csv", "\ufeffwho,what,sold,stars,note\n" + 'a,i1,1,5,"x, ""y""\nz"\n\nb,i1,2,5\n')
    error = refused(prepare.main, *flags(tmp_path, "csv", raw_flags))
    assert "sales.csv: line 5 cannot be read (it has 4 fields, not 5)" in error


def test_a_table_without_texts(tmp_path, script, refused):
    raw_flags = write_csv(tmp_path / "raw")
    assert script(prepare.main, *flags(tmp_path, "csv", raw_flags))[0] == 0
    alone = (*raw_flags[:2], *raw_flags[6:])
    error = refused(prepare.main, *flags(tmp_path, "csv", alone))
    assert "D.item.json: exists, but no --items_path" in error
    (tmp_path / "out/D/D.item.json").unlink()
    assert script(prepare.main, *flags(tmp_path, "csv", alone))[0] == 0
    assert sorted(path.name for path in (tmp_path / "out/D").iterdir()) == ["D.inter.json", "D.item2id", "D.user2id"]
    assert "needs --rating_column and --items_path" in refused(
        prepare.main, *flags(tmp_path, "csv", alone, "--task", "preference")
    )


BAD_LINES = {
    "no object": "[]",
    "no JSON": "{",
    "half an emoji": '{"a": "\\ud83d"}',
    "deep": "[" * 100_000,
    "text": '"x"',
}


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("file", ["D.json", "meta_D.json"])
def test_lines_that_are_no_json_objects(tmp_path, refused, case, file):
    raw_flags = write_amazon2018(tmp_path / "raw")
    with (tmp_path / "raw" / file).open("a") as lines:
        lines.write("\n" + BAD_LINES[case] + "\n{}\n")
    line = 14 if file == "D.json" else 6
    assert f"{file}: line {line} cannot be read" in refused(prepare.main, *flags(tmp_path, "amazon2018", raw_flags))


def test_incomplete_gzip_files(tmp_path, refused):
    raw_flags = write_amazon2023(tmp_path / "raw")
    complete = (tmp_path / "raw/D.jsonl.gz").read_bytes()
    for data in (complete[:-4], complete[: len(complete) // 2], b"", b"plain text\n", complete + b"junk"):
        (tmp_path / "raw/D.jsonl.gz").write_bytes(data)
        assert "D.jsonl.gz: " in refused(prepare.main, *flags(tmp_path, "amazon2023", raw_flags))


def test_gzip_files_can_have_several_members(tmp_path, script):
    raw_flags = write_amazon2023(tmp_path / "raw", ROWS[:7])
    first = (tmp_path / "raw/D.jsonl.gz").read_bytes()
    write_amazon2023(tmp_path / "raw", ROWS[7:])
    (tmp_path / "raw/D.jsonl.gz").write_bytes(first + (tmp_path / "raw/D.jsonl.gz").read_bytes())
    assert "12 ratings read" in script(prepare.main, *flags(tmp_path, "amazon2023", raw_flags))[1]


def test_texts_of_amazon_items(tmp_path, script):
    raw_flags = write_amazon2023(tmp_path / "raw")
    assert script(prepare.main, *flags(tmp_path, "amazon2023", raw_flags))[0] == 0
    item = json.loads((tmp_path / "out/D/D.item.json").read_text())["0"]
    more = {"description": "Red big", "categories": "A, B", "store": ""}
    assert item == {"title": "Thing i1 & more", **more}
    raw_flags = write_amazon2018(tmp_path / "raw", titles=TITLES | {"i4": "var aPageStart = (new Date()).getTime();"})
    assert "3 ratings of items without a title" in script(prepare.main, *flags(tmp_path, "amazon2018", raw_flags))[1]
    item = json.loads((tmp_path / "out/D/D.item.json").read_text())["0"]
    assert item == {"title": "Thing i1 & more", "description": "Thing i1 & more"}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_movies_in_either_encoding(tmp_path, script, encoding):
    raw_flags = write_movielens1m(tmp_path / "raw")
    movies = "".join(f"{item}::Amélie, La (2001)::War\n" for item in ITEMS)
    (tmp_path / "raw/movies.dat").write_bytes(movies.encode(encoding))
    assert script(prepare.main, *flags(tmp_path, "movielens", raw_flags))[0] == 0
    assert read_output(tmp_path)[1]["3"] == "La Amélie (2001)"


def test_empty_files(tmp_path, refused, source):
    raw_flags = WRITERS[source](tmp_path / "raw", [])
    assert "has no ratings" in refused(prepare.main, *flags(tmp_path, source, raw_flags))
    for path in (tmp_path / "raw").iterdir():
        write(path, "")
        error = refused(prepare.main, *flags(tmp_path, source, raw_flags))
        assert any(problem in error for problem in ("no ratings", "no column", "no line", "title for none"))
        WRITERS[source](tmp_path / "raw")


FLAGS = {
    "no folder": (("--source", "csv"), "--source csv needs --raw_path, a file"),
    "end": (("--task", "preference", "--end", "2020-01-01"), "--end has no effect with --task preference"),
    "day": (("--end", "2020-13-01"), "--end 2020-13-01: should be a day"),
    "memory": (("--memory_gb", 0), "--memory_gb 0: should be at least 0.1"),
    "threshold": (("--liked_above", "nan"), "--liked_above nan: should be a number"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_are_checked(refused, case):
    bad_flags, message = FLAGS[case]
    assert message in refused(prepare.main, *bad_flags)


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(heeded, tmp_path):
    rows = [(f"user {n}", f"item {n % 7}", 5, WHEN + n) for n in range(200_000)]
    raw_flags = write_amazon2018(tmp_path / "raw", rows, {f"item {n}": f"Thing {n}" for n in range(7)})
    reviews = tmp_path / "raw" / "D.json"
    reviews.write_bytes(reviews.read_bytes() * 10)  # seconds of work: the signal arrives before the end
    command = [sys.executable, "-m", "data.prepare", *map(str, flags(tmp_path, "amazon2018", raw_flags))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob(".prepare-*/*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130 and error.strip() == "interrupted", error
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


# ---- Fuzzing ----


def check_run(main_flags, root):
    """Run in this process; it must succeed, or end with exit code 2 and leave no files behind."""
    argv, sys.argv = sys.argv, ["prepare", *map(str, main_flags)]
    try:
        prepare.main()
    except SystemExit as stop:
        assert stop.code == 2
        assert not (root / "out").exists()
    else:
        assert json.loads((root / "out/D/D.inter.json").read_text())
    finally:
        sys.argv = argv
    assert not list(root.glob("**/.prepare-*"))


CELLS = st.one_of(
    st.sampled_from(
        ["Ann", "i1", "", " ", "NaN", "inf", "1e999", "-1", "5", str(WHEN), "1_0", "0x1F", "١", "'", '"', "\\"]
    ),
    st.text(max_size=6),
)
VALUES = st.one_of(
    CELLS, st.none(), st.booleans(), st.floats(), st.integers(-(10**25), 10**25), st.lists(CELLS, max_size=2),
    st.dictionaries(CELLS, CELLS, max_size=2),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.data())
@pytest.mark.parametrize("source", WRITERS)
def test_nearly_valid_files(source, data):
    with TemporaryDirectory() as folder:
        root = Path(folder)
        raw_flags = WRITERS[source](root / "raw")
        cells = VALUES if "amazon" in source else CELLS
        rows = data.draw(st.lists(st.tuples(cells, cells, cells, cells), max_size=3))
        titles = data.draw(st.dictionaries(CELLS, cells, max_size=2))
        WRITERS[source](root / "raw", [*ROWS, *rows] if data.draw(st.booleans()) else [*rows, *ROWS], TITLES | titles)
        check_run(flags(root, source, raw_flags), root)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.binary(max_size=60), st.data())
@pytest.mark.parametrize("source", WRITERS)
def test_any_bytes(source, noise, data):
    with TemporaryDirectory() as folder:
        root = Path(folder)
        raw_flags = WRITERS[source](root / "raw")
        path = data.draw(st.sampled_from(sorted((root / "raw").iterdir())))
        content = path.read_bytes()
        start, skip = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 40))
        path.write_bytes(data.draw(st.sampled_from([noise, content[:start] + noise + content[start + skip :]])))
        check_run(flags(root, source, raw_flags), root)


# ---- The k-core ----


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_k_core_is_a_fixed_point(pairs, k):
    left = list(pairs)
    while True:  # the definition, one rating at a time
        rare = next((p for p in left if min(sum(q[side] == p[side] for q in left) for side in (0, 1)) < k), None)
        if rare is None:
            break
        left.remove(rare)
    with duckdb.connect() as con:
        con.execute("CREATE TABLE rated (u INTEGER, i INTEGER)")
        if pairs:
            con.executemany("INSERT INTO rated VALUES (?, ?)", pairs)
        assert filter_core(con, k) == len(pairs) - len(left)
        assert sorted(con.execute("SELECT u, i FROM rated").fetchall()) == sorted(left)
