"""Datasets as their authors publish them: read by data.prepare --source."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import prepare
from data.published import append_window
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.ratings import PARTS, open_ratings
from tests.helpers.raw_data import write
from tests.helpers.toys import write_preferences


def flags(tmp_path, source):
    return "--source", source, "--dataset", "D", "--raw_path", tmp_path / "raw", "--data_path", tmp_path / "out"


# ---- CoLLM ----


def write_frames(tmp_path, change=lambda row: row):
    """Frames as CoLLM's authors have them: padded histories, titles in a column, users from 0."""
    write_preferences(tmp_path, name="toy")
    (tmp_path / "raw").mkdir()
    for part in PARTS:
        rows = pq.read_table(tmp_path / f"toy/{part}.parquet").to_pylist()
        padded = {"his": [[0] * (30 - len(row["his"])) + row["his"] for row in rows]}
        rows = [
            {**row, "uid": row["uid"] - 1, "his": padded["his"][n], "title": f"Thing {row['iid']}"}
            for n, row in enumerate(rows)
        ]
        pq.write_table(pa.Table.from_pylist([change(row) for row in rows]), tmp_path / f"raw/{part}_ood2.parquet")
    return open_ratings(tmp_path, "toy")


def test_frames_of_collm(tmp_path, script):
    expected = write_frames(tmp_path)
    code, out, error = script(prepare.main, *flags(tmp_path, "collm"))
    assert code == 0 and "users are numbered from 1 instead of 0" in out, error
    dataset = open_ratings(tmp_path / "out", "D")
    for part, rows in expected.parts.items():
        assert dataset.parts[part].data.table.equals(rows.data.table)
    assert dataset.items["7"]["title"] == "Thing 7"


def test_rows_of_frames_that_cannot_be_used_are_left_out(tmp_path, script, refused):
    write_frames(tmp_path, lambda row: row | {"label": 3 if (row["uid"], row["iid"]) == (3, 5) else row["label"]})
    code, out, error = script(prepare.main, *flags(tmp_path, "collm"))
    assert code == 0 and "left out: 1 of " in out and "has label out of range" in out, error
    assert sum(map(len, open_ratings(tmp_path / "out", "D").parts.values())) == 40 * 30 - 4 * 18 - 1
    assert "more than --max_bad_share 0" in refused(prepare.main, *flags(tmp_path, "collm"), "--max_bad_share", 0)


def test_pickles_are_not_loaded(tmp_path, refused):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/train_ood2.pkl").write_bytes(b"cposix\nsystem\n")
    error = refused(prepare.main, *flags(tmp_path, "collm"))
    assert "train_ood2.pkl is a pickle" in error and "read_pickle" in error and "to_parquet" in error


# ---- TALLRec ----


def write_samples(tmp_path, odd=()):
    for part in PARTS:
        samples = [
            {
                "instruction": "Given the user's preference and unpreference, identify whether ...",
                "input": f'User Preference: "Heat, The", "It"\nUser Unpreference: {dislikes}\nWhether the user will '
                f'like the target movie "Film {n} "again""?',
                "output": "Yes." if n % 2 else "No.",
            }
            for n, dislikes in enumerate(['"Jaws"', '"Up"', ""] * 50)
        ]
        write(tmp_path / f"raw/{part}.json", json.dumps([*samples, *odd]))


def test_samples_of_tallrec(tmp_path, script):
    write_samples(tmp_path, [{"input": "Hello", "output": "Yes."}])
    code, out, error = script(prepare.main, *flags(tmp_path, "tallrec"))
    assert code == 0 and "left out: 1 of 151 lines of train.json; line 151 is no sample of TALLRec" in out, error
    dataset = open_ratings(tmp_path / "out", "D")
    test = dataset.parts["test"]
    assert [dataset.items[str(item)]["title"] for item in test["his"][0]] == ["Heat, The", "It"]
    assert dataset.items[str(test["iid"][3])]["title"] == 'Film 3 "again"' and test["label"][:4] == [0, 1, 0, 1]
    assert test["uid"][:4] == [1, 2, 3, 1]


def test_books_of_tallrec_have_authors(tmp_path, script):
    """The book in question stands in quotes together with its author, those of the user do not."""
    books = [f'"Book, {n}: It\'s" written by Ann Lee, Bo Ek' for n in range(4)]
    for part in PARTS:
        samples = [
            {
                "input": f"User Preference: {books[n - 1]}, {books[n - 2]}\nUser Unpreference: \nWhether the user "
                f'will like the target book "{books[n]}"?',
                "output": "Yes." if n % 2 else "No.",
            }
            for n in range(4)
        ]
        write(tmp_path / f"raw/{part}.json", json.dumps(samples))
    code, out, error = script(prepare.main, *flags(tmp_path, "tallrec"))
    assert code == 0 and "4 items" in out, error
    dataset = open_ratings(tmp_path / "out", "D")
    assert {item["title"] for item in dataset.items.values()} == {f"Book, {n}: It's" for n in range(4)}
    assert dataset.parts["train"]["timestamp"][3] < dataset.parts["valid"]["timestamp"][0]


# ---- MiniOneRec ----


def write_minionerec(tmp_path, history=lambda items: str(items), users=40):
    items = {str(n): (f"<a_{n // 3}><b_{n % 3}>", f"Thing {n}, the &amp; 'other'") for n in range(9)}
    info = "".join(f"{sid}\t{title}\t{item}\n" for item, (sid, title) in items.items())
    write(tmp_path / "raw/info/D_5_2016.txt", info)
    for part, lengths in (("train", range(1, 5)), ("valid", [5]), ("test", [6])):
        path = tmp_path / f"raw/{part}/D_5_2016.csv"
        path.parent.mkdir()
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["user_id", "history_item_title", "item_title", "history_item_id", "item_id", "item_sid"])
            for length in lengths:
                for user in range(users):
                    ids = [(user + step) % 9 for step in range(length + 1)][-4:]
                    titles = [items[str(n)][1] for n in ids]
                    rows.writerow([f"A{user}", str(titles[:-1]), titles[-1], history(ids[:-1]), ids[-1], "<a_0>"])


def test_tables_of_minionerec(tmp_path, script):
    write_minionerec(tmp_path)
    code, out, error = script(prepare.main, *flags(tmp_path, "minionerec"))
    assert code == 0 and "40 users, 9 items" in out, error
    dataset = open_interactions(tmp_path / "out", "D", ["items", "index"])
    assert dataset.histories["A1"] == [str((1 + step) % 9) for step in range(7)]
    assert dataset.title("4") == "Thing 4, the & 'other'" and dataset.index["4"] == ["<a_1>", "<b_1>"]
    assert "exists; move it" in script(prepare.main, *flags(tmp_path, "minionerec"))[2]


def test_bad_tables_of_minionerec(tmp_path, refused):
    write_minionerec(tmp_path, history=lambda items: "none")
    assert "has no list of items" in refused(prepare.main, *flags(tmp_path, "minionerec"))
    (tmp_path / "raw/info/D_5_2016.txt").write_text("no tabs\n")
    assert "D_5_2016.txt: line 1 should have" in refused(prepare.main, *flags(tmp_path, "minionerec"))
    assert not (tmp_path / "out").exists()


def test_one_odd_line_of_info_is_left_out(tmp_path, script):
    write_minionerec(tmp_path)
    path = tmp_path / "raw/info/D_5_2016.txt"
    unused = "".join(f"<x_{n}>\tSpare \u2028 part\tx{n}\n" for n in range(200))  # U+2028 ends no line
    path.write_text(path.read_text() + unused + "no tabs\n")
    code, out, error = script(prepare.main, *flags(tmp_path, "minionerec"))
    assert code == 0 and "left out: 1 of 210 lines of D_5_2016.txt; line 210 should have a semantic ID" in out, error
    assert open_interactions(tmp_path / "out", "D", ["items", "index"]).title("x7") == "Spare part"


def test_windows_are_joined():
    sequence = []
    for window in (["a", "b"], ["a", "b", "c"], ["b", "c", "d"], ["c", "d", "c"], ["d", "c", "e"]):
        assert append_window(sequence, window)
    assert sequence == ["a", "b", "c", "d", "c", "e"]
    assert not append_window(sequence, ["x", "y"]) and sequence[-2:] == ["e", "y"]


# ---- Sequences ----


def test_sequences_with_texts(tmp_path, script):
    lines = "".join(
        f"{user} " + " ".join(str((user + step) % 5 + 1) for step in range(4)) + "\n" for user in range(200)
    )
    write(tmp_path / "raw/sequential_data.txt", lines + "alone\n")
    write(tmp_path / "raw/datamaps.json", json.dumps({"item2id": {f"B{n}": str(n) for n in range(1, 6)}}))
    records = [{"asin": f"B{n}", "title": f"It's {n} &amp; more", "categories": [["Office"]]} for n in range(1, 5)]
    write(tmp_path / "raw/meta.json.gz", "".join(f"{record!r}\n" for record in records))
    code, out, error = script(prepare.main, *flags(tmp_path, "sequences"))
    assert code == 0 and "line 201 has no items: 'alone'" in out, error
    dataset = open_interactions(tmp_path / "out", "D", ["items"])
    assert dataset.histories["1"] == ["2", "3", "4", "5"] and dataset.title("4") == "It's 4 & more"
    assert dataset.untitled == {"5": "id"}


def write_sequences(tmp_path):
    write(tmp_path / "raw/sequential_data.txt", "".join(f"{user} 1 2 3 4\n" for user in range(9)))
    items = {str(n): {"title": f"T{n} &amp; co", "categories": "Beauty > Hair", "sid": "<s_a_9>"} for n in range(1, 4)}
    write(tmp_path / "raw/D.item.json", json.dumps(items))


def test_sequences_of_grlm_with_texts(tmp_path, script, refused):
    write_sequences(tmp_path)
    code, out, error = script(prepare.main, *flags(tmp_path, "sequences"))
    assert code == 0 and "1 items are not in D.item.json: they have no texts" in out, error
    dataset = open_interactions(tmp_path / "out", "D", ["items"])
    assert dataset.title("1") == "T1 & co" and dataset.items["1"]["categories"] == "Beauty > Hair"
    (tmp_path / "raw/D.item.json").write_text('{"x": {}}')
    assert "has none of the 4 items of the histories" in refused(prepare.main, *flags(tmp_path, "sequences"))


@pytest.mark.parametrize("write_raw, source", [(write_sequences, "sequences"), (write_frames, "collm")])
def test_files_that_are_read_are_not_replaced(tmp_path, refused, write_raw, source):
    write_raw(tmp_path)
    (tmp_path / "raw").rename(tmp_path / "D")
    for path in (tmp_path / "D").glob("*_ood2.parquet"):
        path.rename(path.with_name(path.name.replace("_ood2", "")))
    before = {path: path.read_bytes() for path in (tmp_path / "D").iterdir()}
    places = ("--raw_path", tmp_path / "D", "--data_path", tmp_path)
    assert "would be replaced" in refused(prepare.main, "--source", source, "--dataset", "D", *places)
    assert before == {path: path.read_bytes() for path in (tmp_path / "D").iterdir()}


def test_id_maps_that_are_none(tmp_path, refused):
    write(tmp_path / "raw/sequential_data.txt", "1 1 2 3\n")
    write(tmp_path / "raw/meta.json", "{}\n")
    write(tmp_path / "raw/datamaps.json", '{"item2id": [1]}')
    assert "should have an object item2id" in refused(prepare.main, *flags(tmp_path, "sequences"))


@pytest.mark.parametrize("source", ["collm", "tallrec", "minionerec", "sequences"])
def test_missing_files_and_flags_without_effect(tmp_path, refused, source):
    (tmp_path / "raw").mkdir()
    assert "has none of" in refused(prepare.main, *flags(tmp_path, source))
    error = refused(prepare.main, *flags(tmp_path, source), "--min_interactions", 5)
    assert f"--min_interactions has no effect with --source {source}" in error
