"""Dataset folders: what they give and what is refused."""

import json
import os

import pytest

from reclingua.datasets.interactions import open_interactions as open_folder
from reclingua.datasets.interactions import read_embeddings
from reclingua.utils.errors import InputError
from reclingua.utils.files import atomic_write, output_folder, write_json


def open_toy(toy, *needs, **kwargs):
    return open_folder(toy, "toy", needs, **kwargs)


def test_split_is_leave_one_out(toy):
    dataset = open_toy(toy)
    assert dataset.histories["1"] == ["1", "2", "3", "4", "5", "6", "7"]
    assert dataset.train_history("1") == ["1", "2", "3", "4", "5"]
    assert dataset.split("1", "valid") == (["1", "2", "3", "4", "5"], "6")
    assert dataset.split("1", "test") == (["1", "2", "3", "4", "5", "6"], "7")


def test_users_too_short_to_split_only_train(toy, edit):
    edit("inter", lambda inter: inter.update({"short": [1, 2]}))
    dataset = open_toy(toy)
    assert dataset.too_short == ["short"] and "short" not in dataset.test_users
    assert dataset.train_history("short") == ["1", "2"]


def test_items_come_in_numeric_order(toy, edit):
    edit("item", lambda item: dict(reversed(item.items())))
    assert open_toy(toy, "items").item_ids == [str(i) for i in range(9)]


def test_a_dataset_without_texts_opens_by_its_index(toy):
    (toy / "toy/toy.item.json").unlink()
    dataset = open_toy(toy, "index")
    assert dataset.title("3") == "item 3" and len(dataset.item_ids) == 9


BAD = {
    "unknown item": ("inter", lambda x: x["0"].append(99), "user '0' has item '99'"),
    "id that is a boolean": ("inter", lambda x: x["0"].append(True), "user '0' should have a list of item ids"),
    "id that is a fraction": ("inter", lambda x: x["0"].append(1.5), "oldest first, not '1.5'"),
    "long id in a history": ("inter", lambda x: x["0"].append("7" * 5000), "has 5,000 characters"),
    "long id of an item": ("item", lambda x: x.update({"7" * 5000: {"title": "A"}}), "has 5,000 characters"),
    "long id in the index": ("index", lambda x: x.update({"7" * 5000: ["<a_1>"]}), "has 5,000 characters"),
    "half a character": ("item", lambda x: x.update({"4": {"title": "\ud83d"}}), "entry '4' contains half a char"),
    "half a character in an id": ("inter", lambda x: x.update({"\ud83d": [1]}), "entry '\\\\ud83d' contains half"),
    "no text at all": ("item", lambda x: {item: {"title": ""} for item in x}, "no item has a title, description"),
    "history not a list": ("inter", lambda x: x.update({"0": {"1": 2}}), "user '0' should have a list"),
    "nested history": ("inter", lambda x: x.update({"0": [[1]]}), "user '0' should have a list"),
    "empty dataset": ("inter", lambda x: {}, "is empty"),
    "all users too short": ("inter", lambda x: {"0": [1, 2]}, "no user has the three interactions"),
    "list, not object": ("inter", lambda x: [1, 2], "contains a list"),
    "item not an object": ("item", lambda x: x.update({"4": "Toy"}), "item '4' should be an object"),
    "item without index": ("index", lambda x: x.pop("8") and None, "'8'"),
    "index of no item": ("index", lambda x: x.update({"77": ["<a_9>"]}), "item '77' is not in toy.item.json"),
    "two items, one index": (
        "index",
        lambda x: x.update({"4": x["5"]}),
        "items '4' and '5' share the index <a_1><b_2>",
    ),
    "index not a list": ("index", lambda x: x.update({"4": "<a_1>"}), "item '4' should have a list of code tokens"),
    "empty code": ("index", lambda x: x.update({"4": ["<a_1>", ""]}), "item '4' should have a list of code tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(toy, edit, case):
    name, change, message = BAD[case]
    edit(name, change)
    with pytest.raises(InputError) as raised:
        open_toy(toy, "items", "index")
    assert message in str(raised.value) and "toy." in str(raised.value)


def test_items_without_a_title_are_named_by_their_other_texts(toy, edit):
    records = {
        "1": {"title": " ", "description": "Long " * 30},
        "2": {"title": None, "brand": "Acme", "categories": "Pens"},
        "3": {"categories": ["Office", ["Pens", "Ink"]]},
        "4": {"title": "", "description": ""},
        "5": {"title": ["Two", "parts"], "description": ["Good", "pen"]},
    }
    edit("item", lambda item: item.update(records))
    dataset = open_toy(toy, "items", "index")
    assert dataset.untitled == {"1": "description", "2": "brand", "3": "categories", "4": "id"}
    assert dataset.title("1") == " ".join(["Long"] * 16) + " …" and dataset.text("1") == "Long " * 29 + "Long"
    assert [dataset.title(item) for item in "2345"] == ["Acme", "Office, Pens, Ink", "item 4", "Two parts"]
    assert dataset.text("3") == "Office, Pens, Ink" and dataset.text("5") == "Two parts. Good pen"
    fields = ("title", "brand", "categories")
    assert [dataset.text(item, fields) for item in "234"] == ["Acme. Pens", "Office, Pens, Ink", "item 4"]
    assert dataset.remarks[0].startswith("4 items without a title are named by their description (1), brand (1)")


def test_users_without_interactions_are_left_out(toy, edit):
    edit("inter", lambda inter: inter.update({"empty": [], "1": [1.0, 2.0, 3.0]}))
    dataset = open_toy(toy)
    assert "empty" not in dataset.histories and dataset.remarks == ["1 users without interactions are left out"]
    assert dataset.histories["1"] == ["1", "2", "3"]


def test_duplicate_keys_are_found_in_linear_time(toy):
    """16,000 keys, all of them twice: a key is compared with others only by its hash."""
    text = ", ".join(f'"{n}": [1]' for n in range(16_000))
    (toy / "toy/toy.inter.json").write_text("{" + text + ", " + ", ".join(reversed(text.split(", "))) + "}")
    with pytest.raises(InputError, match="the key '15999' occurs twice; keep one"):
        open_toy(toy)


FOREIGN = {
    "toy.inter": "--source recbole",
    "train_ood2.pkl": "read_pickle",
    "train_ood2.parquet": "--source collm",
    "train.parquet valid.parquet test.parquet": "the folder holds a ratings dataset",
    "other.inter.json": "the folder holds other.inter.json: rename",
    "info/toy.txt": "--source minionerec",
    "train.json test.json": "--source tallrec",
    "toy.jsonl.gz meta_toy.jsonl.gz": "--source amazon2023",
    "toy.json.gz meta_toy.json.gz": "--source amazon2018",
    "reviews_toy.json.gz meta_toy.json.gz": "--source amazon2014",
    "sequential_data.txt": "--source sequences",
    "ratings.dat": "--source movielens",
}


@pytest.mark.parametrize("files", FOREIGN)
def test_the_command_for_a_folder_of_another_format_is_named(toy, files):
    (toy / "toy/toy.inter.json").unlink()
    for file in files.split():
        (toy / "toy" / file).parent.mkdir(exist_ok=True)
        (toy / "toy" / file).touch()
    with pytest.raises(InputError) as raised:
        open_toy(toy)
    assert FOREIGN[files] in str(raised.value)


@pytest.mark.parametrize("name", ["inter", "item", "index"])
def test_missing_and_malformed_files_are_named(toy, name):
    path = toy / "toy" / f"toy.{name}.json"
    path.write_text('{"0": [1, 2,')
    with pytest.raises(InputError, match=f"toy.{name}.json: not valid JSON at line 1"):
        open_toy(toy, "items", "index")
    for content in (b"\xff\xfe\x00", b'{"0": [' + b"7" * 5000 + b"]}"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"toy.{name}.json: cannot be read"):
            open_toy(toy, "items", "index")
    path.unlink()
    with pytest.raises(InputError, match=f"toy.{name}.json: no such file"):
        open_toy(toy, "items", "index")


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match="no such dataset folder"):
        open_folder(tmp_path, "nothing")


def test_index_file_by_suffix_or_path(toy, tmp_path):
    index = json.loads((toy / "toy/toy.index.json").read_text())
    other = {item: ["<x_0>", *codes] for item, codes in index.items()}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert open_toy(toy, "index", index_file=str(tmp_path / "other.json")).index == other
    (toy / "toy/toy.v2.json").write_text(json.dumps(other))
    assert open_toy(toy, "index", index_file=".v2.json").index == other


def test_a_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_unwritable_output_folder():
    with pytest.raises(InputError, match="cannot be written"):
        output_folder("/proc/self/nothing")
    with pytest.raises(InputError, match="cannot be written"):
        write_json("/proc/self/nothing/x.json", {})


def test_embedding_files_are_checked(tmp_path):
    import numpy as np

    path = tmp_path / "x.npy"
    with pytest.raises(InputError, match="no such file"):
        read_embeddings(path, 3)
    path.write_bytes(b"not numpy")
    with pytest.raises(InputError, match="not a readable"):
        read_embeddings(path, 3)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not a readable"):
        read_embeddings(path, 3)
    np.save(path, np.ones((4, 2)))
    with pytest.raises(InputError, match=r"shape \[4, 2\].*each of 3 items"):
        read_embeddings(path, 3)
    np.save(path, np.full((3, 2), np.nan))
    with pytest.raises(InputError, match="not finite"):
        read_embeddings(path, 3)
    np.save(path, np.ones((3, 2)))
    assert read_embeddings(path, 3).dtype == np.float32


def test_ml_100k_has_the_known_size(ml_100k):
    dataset = open_folder(ml_100k, "ml-100k", ["items"])
    sizes = len(dataset.histories), len(dataset.item_ids), sum(map(len, dataset.histories.values()))
    assert sizes == (943, 1349, 99_287) and not dataset.too_short


@pytest.mark.parametrize("name, users, items", [("Industrial", 3285, 3541), ("Instruments", 24772, 9922)])
def test_published_datasets_open(shared, name, users, items):
    dataset = open_folder(shared / "data", name, ["items"] if name == "Industrial" else [])
    assert len(dataset.histories) == users and len(dataset.item_ids) == items


def test_published_index_with_duplicates_is_refused(shared):
    with pytest.raises(InputError, match="share the index"):
        open_folder(shared / "data", "Instruments", ["index"])
