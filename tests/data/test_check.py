"""data.check and data.clean: reports of sound and odd folders, and clean copies that open."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import check, clean
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.ratings import open_ratings
from tests.helpers.toys import write_preferences


def report_of(script, folder, name):
    code, out, error = script(check.main, "--dataset", name, "--data_path", folder)
    assert code == 0, error
    return out


def test_a_sound_folder_has_no_findings_of_records(toy, script):
    out = report_of(script, toy, "toy")
    assert "toy: next-item dataset in" in out and "users 12   items 9   interactions 84" in out
    assert "interactions per user: min 6, median 7, mean 7.0, max 8" in out
    assert "repeated items: 0.0%" in out and "toy.index.json: 9 semantic IDs of 2 codes" in out
    assert "refuse" not in out and "HTML" not in out


def test_odd_records_of_a_next_item_dataset_are_counted(toy, script, edit):
    edit("inter", lambda x: x | {"0": [0, 0, 1, 99], "1": [], "2": [3], "big": [1, 2] * 100, "3": [4, None, 5, 6]})
    edit("item", lambda x: x.update({"7": {"title": "AT&amp;T", "description": "['<b>a</b>', 'b']"}, "8": {}}))
    edit("index", lambda x: x.update({"4": x["5"], "unknown": ["<a_9>"]}) or {k: v for k, v in x.items() if k != "6"})
    out = report_of(script, toy, "toy")
    for finding in (
        "1 users without interactions: left out",
        "1 interactions with an item that is no id: commands refuse the dataset",
        "1 users with fewer than 3 interactions",
        "1 interactions with 1 items that toy.item.json lacks, such as '99'",
        "1 interactions repeat the item just before",
        "user 'big' has ",
        "1 of 9 titles contain HTML, entities or lists, such as 'AT&amp;T' of item '7'",
        "1 of 9 descriptions contain HTML",
        "1 items have neither title nor description",
        "1 items without a title are named by their id (1)",
        "2 items share a semantic ID of toy.index.json",
        "1 items have no semantic ID in toy.index.json",
        "1 semantic IDs of toy.index.json are of no item",
    ):
        assert finding in out


def test_a_clean_copy_opens(toy, tmp_path, script, refused, edit):
    edit("inter", lambda x: x | {"0": [0, 1, 2, 99], "empty": []})
    edit("item", lambda x: x.update({"7": {"title": "AT&amp;T", "description": "['<b>a</b>', 'b']", "price": 3}}))
    flags = ("--dataset", "toy", "--data_path", toy, "--output_path", tmp_path / "clean")
    assert "1 of 82 interactions would be left out" in refused(clean.main, *flags, "--max_bad_share", 0)
    assert list((tmp_path / "clean").iterdir()) == []
    (toy / "toy/toy.emb-minilm-td.npy").write_bytes(b"")
    code, out, error = script(clean.main, *flags, "--max_bad_share", 0.02)
    assert code == 0 and "1 of 9 items with a cleaned" in out and "1 of 82 interactions left out" in out, error
    dataset = open_interactions(tmp_path / "clean", "toy", ["items", "index"])
    assert dataset.items["7"] == {"title": "AT&T", "description": "a b", "price": 3}
    assert dataset.histories["0"] == ["0", "1", "2"] and "empty" not in dataset.histories
    assert not list((tmp_path / "clean/toy").glob("*.npy")) and "embeddings are not copied" in out
    assert "exists; choose another --output_path" in refused(clean.main, *flags)
    assert "HTML" not in report_of(script, tmp_path / "clean", "toy")


def test_odd_rows_of_a_ratings_dataset_are_counted_and_cleaned(tmp_path, script):
    write_preferences(tmp_path)
    path = tmp_path / "liked/test.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["iid"], rows[1]["uid"] = 99, None
    rows[2] = rows[3] | {"his": [0, 0, *rows[3]["his"], rows[3]["iid"]]}
    pq.write_table(pa.Table.from_pylist(rows), path)
    items = json.loads((tmp_path / "liked/item.json").read_text())
    (tmp_path / "liked/item.json").write_text(json.dumps(items | {"1": {"title": "R&amp;D"}}))
    out = report_of(script, tmp_path, "liked")
    for line in (
        "liked: ratings dataset in",
        "users 40   items 30   ratings ",
        "test.parquet: histories are padded with zeros",
        "1 rows of test.parquet have no uid: commands refuse the dataset",
        "1 rows of test.parquet have item 99, which is not in item.json",
        "1 rows of test repeat a user and an item",
        "1 rows have the item in question in their history",
        "1 of 30 titles contain HTML",
    ):
        assert line in out
    flags = ("--dataset", "liked", "--data_path", tmp_path, "--output_path", tmp_path / "clean")
    code, out, error = script(clean.main, *flags)
    assert code == 0 and "2 of 240 rows of test left out" in out, error
    dataset = open_ratings(tmp_path / "clean", "liked")
    assert dataset.items["1"]["title"] == "R&D" and len(dataset.parts["test"]) == 238


def test_unreadable_folders_are_refused(toy, tmp_path, refused):
    flags = ("--dataset", "toy", "--data_path", toy)
    assert "no such dataset folder" in refused(check.main, "--dataset", "none", "--data_path", toy)
    (toy / "toy/toy.inter.json").write_text("{")
    assert "not valid JSON" in refused(check.main, *flags)
    assert "not valid JSON" in refused(clean.main, *flags, "--output_path", tmp_path / "clean")
    (toy / "toy/toy.inter.json").unlink()
    (toy / "toy/toy.inter").touch()
    for command in (check, clean):
        more = () if command is check else ("--output_path", tmp_path / "clean")
        assert "--source recbole" in refused(command.main, *flags, *more)


@pytest.mark.parametrize("name, line", [
    ("Industrial", "86 of 3,541 titles contain HTML"),
    ("Instruments", "48 items share a semantic ID"),
    ("ml-1m", "the top 10%"),
])  # fmt: skip
def test_reports_of_published_datasets(shared, script, name, line):
    assert line in report_of(script, shared / "data", name)
