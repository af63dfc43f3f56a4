"""Ratings datasets: validation, preparation from raw ratings, and the splits of the papers."""

import gzip
import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import prepare
from reclingua.datasets.ratings import COLUMNS, liked_history, open_ratings, to_numpy
from reclingua.utils.errors import InputError
from tests.helpers.scripts import run_main
from tests.helpers.toys import write_preferences


@pytest.fixture
def liked(tmp_path):
    """Folder with the preference dataset `liked`."""
    write_preferences(tmp_path)
    return tmp_path


def rewrite(folder, part, change):
    path = folder / f"liked/{part}.parquet"
    rows = pq.read_table(path).to_pylist()
    rows = change(rows) or rows
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_opens_and_counts(liked):
    dataset = open_ratings(liked, "liked")
    assert (dataset.num_users, dataset.num_items) == (41, 31)
    assert dataset.parts["train"].column_names == list(COLUMNS)
    assert set(to_numpy(dataset.parts["test"], "label").tolist()) == {0, 1}


def test_frames_of_collm_are_read_as_published(liked):
    """Histories padded with zeros, extra columns, and no `not_cold`."""
    expected = open_ratings(liked, "liked")
    for part in ("train", "valid", "test"):
        rewrite(liked, part, lambda rows: [{k: v for k, v in row.items() if k != "not_cold"} for row in rows])
        rewrite(liked, part, lambda rows: [row | {"his": ([0] * 50 + row["his"])[-50:], "title": "x"} for row in rows])
    dataset = open_ratings(liked, "liked")
    for part, rows in expected.parts.items():
        assert dataset.parts[part].data.table.equals(rows.data.table)


def test_items_without_a_title_are_named_by_their_other_texts(liked):
    items = json.loads((liked / "liked/item.json").read_text())
    items |= {"1": {"title": "", "brand": "Acme"}, "2": {}}
    (liked / "liked/item.json").write_text(json.dumps(items))
    dataset = open_ratings(liked, "liked")
    assert [dataset.items[item]["title"] for item in "12"] == ["Acme", "item 2"]
    assert dataset.remarks == ("2 items without a title are named by their brand (1), id (1)",)


def test_liked_history_is_padded_in_front(liked):
    dataset = open_ratings(liked, "liked")
    test = dataset.parts["test"]
    for part in (
        test,
        dataset.parts["train"].take(7),
        test.select(range(5, 9)),
        test.select([9, 2, 7]),
        test.shuffle(),
    ):
        assert to_numpy(part, "iid").tolist() == part["iid"]
        for length in (1, 3, 50):
            expected = [([0] * length + row)[-length:] for row in part["his"]]
            assert liked_history(part, length).tolist() == expected


def test_liked_history_of_empty_histories(liked):
    rewrite(liked, "valid", lambda rows: [row | {"his": []} for row in rows])
    # A column with only empty lists has no element type in the file.
    assert not liked_history(open_ratings(liked, "liked").parts["valid"], 4).any()


BAD_ROWS = {
    "label": ({"label": 2}, "valid.parquet: row 3 has label 2; it should be 0 or 1"),
    "user": ({"uid": 0}, "row 3 has user 0; ids go from 1"),
    "item": ({"iid": 31}, "row 3 has item 31, which is not in item.json"),
    "negative item": ({"iid": -1}, "row 3 has item -1, which is not in item.json"),
    "history": ({"his": [1, 99]}, "row 3 has a history with an item that is not in item.json"),
    "hole in a history": ({"his": [1, None]}, "row 3 has a history with an item that is not in item.json"),
    "not cold": ({"not_cold": 5}, "row 3 has not_cold 5"),
    "missing": ({"iid": None}, "row 3 has no iid"),
    "missing history": ({"his": None}, "row 3 has no his"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(liked, case):
    changed, message = BAD_ROWS[case]
    rewrite(liked, "valid", lambda rows: rows[3].update(changed))
    with pytest.raises(InputError, match="valid.parquet") as raised:
        open_ratings(liked, "liked")
    assert message in str(raised.value)


BAD_PARTS = {
    "one class": (lambda rows: [row | {"label": 1} for row in rows], "all labels are 1; AUC needs both 0 and 1"),
    "empty": (lambda rows: pq.read_table, "has no rows"),
    "text": (lambda rows: [row | {"uid": "you"} for row in rows], "column 'uid' should be int32, not string"),
    "fraction": (lambda rows: [row | {"label": 0.5} for row in rows], "column 'label' should be int8, not double"),
    "column": (lambda rows: [{k: v for k, v in row.items() if k != "his"} for row in rows], "has no column 'his'"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_parts_are_named(liked, case):
    change, message = BAD_PARTS[case]
    path = liked / "liked/test.parquet"
    if case == "empty":
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    else:
        rewrite(liked, "test", change)
    with pytest.raises(InputError, match="test.parquet") as raised:
        open_ratings(liked, "liked")
    assert message in str(raised.value)


@pytest.mark.parametrize("item", ["0", "01", "1" * 12, "9" * 5000, "²", "-1"])
def test_items_are_numbers_from_1(liked, item):
    (liked / "liked/item.json").write_text(json.dumps({"1": {"title": "A"}, item: {"title": "B"}}))
    with pytest.raises(InputError, match="item.json: item .* should be a number from 1 to 999999999"):
        open_ratings(liked, "liked")


def test_the_fingerprint_is_of_the_training_ratings(liked):
    before = open_ratings(liked, "liked").sha256()
    rewrite(liked, "valid", lambda rows: rows[:50])
    assert open_ratings(liked, "liked").sha256() == before
    rewrite(liked, "train", lambda rows: rows[5].update(label=1 - rows[5]["label"]))
    assert open_ratings(liked, "liked").sha256() != before


def test_bad_files_are_named(liked):
    with pytest.raises(InputError, match="nothing: no such dataset folder"):
        open_ratings(liked, "nothing")
    (liked / "liked/test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="test.parquet: not a readable parquet file"):
        open_ratings(liked, "liked")
    (liked / "liked/test.parquet").unlink()
    with pytest.raises(InputError, match="test.parquet: no such file"):
        open_ratings(liked, "liked")
    for content, message in (({"x": {"title": "X"}}, "item 'x' should be a number"), ({"1": 7}, "with a title")):
        (liked / "liked/item.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            open_ratings(liked, "liked")


# ---- From raw ratings ----

ITEMS = "".join(f"{i}::Film {i}, The ({1950 + i})::Drama|War\n" for i in range(1, 7))


def write_movielens(folder, ratings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ratings))
    (folder / "movies.dat").write_text(ITEMS, encoding="latin-1")


def day(text):
    return int(pd.Timestamp(text).timestamp())


RATINGS = [  # user, item, rating, when
    (7, 2, 4, day("2001-02-10")),
    (7, 3, 3, day("2001-01-05")),
    (9, 3, 5, day("2001-01-05")),
    (9, 1, 5, day("2001-01-05")),
    (9, 2, 1, day("2001-03-02")),
    (7, 5, 5, day("2001-03-31T23:59:59")),
    (7, 1, 2, day("2001-04-01")),
    (8, 2, 5, day("2001-04-02")),
    (9, 4, 1, day("2000-12-31T23:59:59")),
    (9, 4, 1, day("2001-05-01")),
]
WINDOW = ("--start", "2001-01-01", "--months", 2, 1, 1)


def run_prepare(tmp_path, script, *flags):
    """Prepare the output of `write_movielens`; return the result of `script` or `refused`."""
    paths = ("--dataset", "mini", "--raw_path", tmp_path / "raw", "--data_path", tmp_path / "out")
    return script(prepare.main, "--task", "preference", "--source", "movielens", *paths, *flags)


def test_prepare_splits_by_time(tmp_path, script):
    write_movielens(tmp_path / "raw", RATINGS)
    code, out, error = run_prepare(tmp_path, script, *WINDOW)
    assert code == 0, error
    assert "10 ratings read, 8 kept" in out and "train 2001-01-01 to 2001-02-28" in out
    dataset = open_ratings(tmp_path / "out", "mini")
    # Raw users 7, 8, 9 are 1, 2, 3; raw items 1, 2, 3, 5 are 1, 2, 3, 4.
    rows = {
        part: [tuple(row.values()) for row in dataset.parts[part].remove_columns("timestamp")]
        for part in dataset.parts
    }
    assert rows == {
        "train": [(1, 3, 0, [], 1), (1, 2, 1, [], 1), (3, 3, 1, [], 1), (3, 1, 1, [3], 1)],
        "valid": [(1, 4, 1, [2], 0), (3, 2, 0, [3, 1], 1)],
        "test": [(1, 1, 0, [2, 4], 1), (2, 2, 1, [], 0)],
    }
    assert dataset.items["1"]["title"] == "The Film 1 (1951)"
    assert (tmp_path / "out/mini/item2id").read_text().splitlines()[-1] == "5\t4"


def test_prepare_takes_the_last_months_by_default(tmp_path, script):
    write_movielens(tmp_path / "raw", RATINGS[:-1])
    assert "train 2001-01-01 to 2001-02-28" in run_prepare(tmp_path, script, "--months", 2, 1, 1)[1]


def test_prepare_counts_the_first_rating_of_an_item(tmp_path, script):
    again = [(7, 2, 1, day("2001-02-11")), (7, 2, 4, day("2001-02-10")), (9, 3, 5, day("2001-04-09"))]
    write_movielens(tmp_path / "raw", [*RATINGS, *again])
    code, out, _ = run_prepare(tmp_path, script, *WINDOW)
    assert code == 0 and "13 ratings read, 8 kept" in out
    assert "dropped: 3 ratings of items that the user had rated before" in out
    train = open_ratings(tmp_path / "out", "mini").parts["train"]
    assert train["label"] == [0, 1, 1, 1] and train["his"] == [[], [], [], [3]]


def test_prepare_replaces_all_files_or_none(tmp_path, script, refused):
    write_movielens(tmp_path / "raw", RATINGS)
    run_prepare(tmp_path, script, *WINDOW)
    folder = tmp_path / "out/mini"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.move(folder / "item2id", folder / "kept")
    (folder / "item2id").mkdir()
    assert "item2id: is a folder" in run_prepare(tmp_path, refused, *WINDOW, "--liked_above", 4)
    (folder / "item2id").rmdir()
    shutil.move(folder / "kept", folder / "item2id")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_half_months():
    ends = prepare.time_window(0, pd.Timestamp("2017-01-01"), [11, 0.5, 0.5])
    assert [f"{end:%Y-%m-%d %H}" for end in ends] == [
        "2017-01-01 00",
        "2017-12-01 00",
        "2017-12-16 12",
        "2018-01-01 00",
    ]


REJECTED = {
    "no ratings there": (("--start", "1990-01-01"), "no ratings 1990-01-01 to 1991-08-31; the data has 2000-12-31"),
    "empty part": (
        ("--start", "2001-01-01", "--months", 1, 1, 9),
        "valid, 2001-02-01 to 2001-02-28, has only ratings",
    ),
    "threshold": ((*WINDOW, "--liked_above", 5), "has only ratings up to 5"),
    "no day": (("--start", "in May"), "--start in May: should be a day"),
    "months": (("--months", 1, 0, 1), "--months 1 0 1: should be above 0"),
    "half months": (("--months", 1, 0.5, 1), "--months with fractions needs --start"),
    "far day": (("--start", "9999-12-31"), "--start 9999-12-31: should be a day"),
    "core": ((*WINDOW, "--min_interactions", 9), "the 9-core is empty"),
    "k": (("--min_interactions", 0), "--min_interactions 0: should be at least 1"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_bad_input_is_rejected(tmp_path, refused, case):
    flags, message = REJECTED[case]
    write_movielens(tmp_path / "raw", RATINGS)
    error = run_prepare(tmp_path, refused, *flags)
    assert message in error and not (tmp_path / "out").exists()


def test_bad_movielens_lines_are_rejected(tmp_path, refused):
    assert "has none of ratings.dat, ratings.csv" in run_prepare(tmp_path, refused)
    write_movielens(tmp_path / "raw", [*RATINGS, (1, 2)])
    assert "ratings.dat: line 11 has 2 fields, not 4" in run_prepare(tmp_path, refused)
    for rating in ("good", "", "inf"):
        write_movielens(tmp_path / "raw", [*RATINGS, (1, 2, rating, 5)])
        assert "ratings.dat: line 11 has no numeric rating" in run_prepare(tmp_path, refused)
    write_movielens(tmp_path / "raw", [*RATINGS, (1, 2, 5, 981763200000)])
    assert "981763200000 seconds since 1970 is the year 33080; is it in milliseconds? --time_unit ms" in run_prepare(
        tmp_path, refused
    )
    write_movielens(tmp_path / "raw", RATINGS)


def write_amazon(folder, reviews, metadata, compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("Books", reviews), ("meta_Books", metadata)):
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        if compress:
            (folder / f"{name}.json.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.json").write_text(text)


REVIEWS = [
    {"reviewerID": f"A{u}", "asin": f"B{i}", "overall": float(stars), "unixReviewTime": when}
    for u, i, stars, when in RATINGS
]
METADATA = [{"asin": f"B{i}", "title": f"Book {i}", "description": ["A", "book."]} for i in range(1, 6)]
AMAZON = ("--task", "preference", "--source", "amazon2018", "--dataset", "Books", *WINDOW)


def test_ratings_are_optional_for_sequences_only(tmp_path, script, refused):
    (tmp_path / "raw").mkdir()
    rows = "".join(f"{u}\t{i}\t{'' if u == i else 4}\t{i}\n" for u in range(1, 4) for i in range(1, 4))
    (tmp_path / "raw/mini.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + rows)
    (tmp_path / "raw/mini.item").write_text("item_id:token\ttitle:token_seq\n1\tA\n2\tB\n3\tC\n")
    flags = ("--dataset", "mini", "--raw_path", tmp_path / "raw", "--data_path", tmp_path, "--min_interactions", 1)
    assert script(prepare.main, *flags)[0] == 0
    error = refused(prepare.main, *flags, "--task", "preference")
    assert "mini.inter: line 2 has no numeric rating" in error
    (tmp_path / "raw/mini.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n1\t1\t5\n\n1\t2\tx\n")
    assert "mini.inter: line 4 has no readable time" in refused(prepare.main, *flags)


@pytest.mark.parametrize("compress", [True, False])
def test_prepare_reads_amazon_reviews(tmp_path, script, compress):
    write_amazon(tmp_path / "raw", REVIEWS, [*METADATA[:2], *METADATA[3:]], compress)
    code, _, error = script(prepare.main, *AMAZON, "--raw_path", tmp_path / "raw", "--data_path", tmp_path)
    assert code == 2 and "train" in error  # without book 3 train has no dislikes
    code, out, error = script(
        prepare.main, *AMAZON, "--liked_above", 4, "--raw_path", tmp_path / "raw", "--data_path", tmp_path
    )
    assert code == 0 and "2 ratings of items that the items file lacks" in out, error
    dataset = open_ratings(tmp_path, "Books")
    assert [item["title"] for item in dataset.items.values()] == ["Book 1", "Book 2", "Book 5"]
    assert dataset.items["1"]["description"] == "A book."
    assert {part: len(rows) for part, rows in dataset.parts.items()} == {"train": 2, "valid": 2, "test": 2}


def test_bad_amazon_files_are_rejected(tmp_path, refused):
    raw = tmp_path / "raw"
    flags = (*AMAZON, "--raw_path", raw, "--data_path", tmp_path / "out")
    assert "has none of Books.json.gz" in refused(prepare.main, *flags)
    write_amazon(raw, [*REVIEWS, "{"], METADATA)
    assert "Books.json.gz: line 11 is no JSON object" in refused(prepare.main, *flags)
    write_amazon(raw, [*REVIEWS, "[]"], METADATA)
    assert "Books.json.gz: line 11 is no JSON object" in refused(prepare.main, *flags)
    write_amazon(raw, [*REVIEWS, {"asin": "B1", "overall": 5, "unixReviewTime": 1}], METADATA)
    assert "line 11 has no user" in refused(prepare.main, *flags)
    write_amazon(raw, [*REVIEWS, REVIEWS[0] | {"overall": None}], METADATA)
    assert "line 11 has no numeric rating" in refused(prepare.main, *flags)
    write_amazon(raw, REVIEWS, METADATA)
    content = (raw / "Books.json.gz").read_bytes()
    (raw / "Books.json.gz").write_bytes(content[: len(content) // 2])
    assert "Books.json.gz: line" in refused(prepare.main, *flags)
    write_amazon(raw, [*REVIEWS, REVIEWS[0] | {"unixReviewTime": 10**400}], METADATA)
    assert "Books.json.gz: line 11 has no readable time" in refused(prepare.main, *flags)
    write_amazon(raw, [*REVIEWS, "[" * 100_000], METADATA)
    assert "Books.json.gz: line 11 is no JSON object" in refused(prepare.main, *flags)
    write_amazon(raw, REVIEWS, [{"asin": "B77", "title": "Other"}])
    assert "meta_Books.json.gz: has a line for none of the 5 items" in refused(prepare.main, *flags)


def test_the_split_of_the_papers_is_reproduced(shared, tmp_path):
    """Train, valid and test written as one raw file: all rows, histories and cold marks equal the published ones."""
    published = open_ratings(shared / "data", "ml-1m")
    ratings = pd.concat([rows.to_pandas() for rows in published.parts.values()])
    ratings = ratings.sort_values("timestamp", kind="stable")  # ties of a user stay in order
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [f"{u}::{i}::{5 if label else 3}::{when}\n" for u, i, label, when in ratings.iloc[:, :4].to_numpy()]
    (raw / "ratings.dat").write_text("".join(lines))
    movies = [f"{item}::{record['title']}::Drama\n" for item, record in published.items.items()]
    (raw / "movies.dat").write_text("".join(movies), encoding="latin-1", errors="replace")
    flags = ("--task", "preference", "--source", "movielens", "--dataset", "ml-1m", "--raw_path", raw)
    run_main(prepare.main, *flags, "--data_path", tmp_path, "--start", "2001-06-01")
    ours = open_ratings(tmp_path, "ml-1m")
    for part, rows in published.parts.items():
        assert ours.parts[part].data.table.equals(rows.data.table), part
    assert ours.sha256() == published.sha256()


def test_ratings_of_ml_100k(tmp_path):
    window = ("--months", 4, 1.5, 1.5, "--start", "1997-10-01")
    flags = ("--task", "preference", "--dataset", "ml-100k", "--data_path", tmp_path, *window)
    run_main(prepare.main, *flags)
    dataset = open_ratings(tmp_path, "ml-100k")
    assert {part: len(rows) for part, rows in dataset.parts.items()} == {"train": 60290, "valid": 15544, "test": 17462}
    train, test = dataset.parts["train"], dataset.parts["test"]
    warm = np.isin(to_numpy(test, "uid"), to_numpy(train, "uid")) & np.isin(
        to_numpy(test, "iid"), to_numpy(train, "iid")
    )
    assert (to_numpy(test, "not_cold") == warm).all()
