"""index.report: statistics compared with pairs counted one by one, files with collisions, bad input."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from index import report
from index.report import read_categories
from reclingua.metrics.index import index_statistics

PNG = b"\x89PNG\r\n\x1a\n"


def test_shares_equal_those_of_pairs_counted_one_by_one():
    rng = np.random.default_rng(0)
    index = {str(i): tuple(f"<{letter}_{rng.integers(3)}>" for letter in "abc") for i in range(60)}
    categories = {item: set(rng.choice(["x", "y", "z", "w"], rng.integers(0, 3), replace=False)) for item in index}
    statistics = index_statistics(index, categories)
    pairs = list(itertools.combinations(index, 2))
    for prefix in statistics["prefixes"]:
        length = prefix["length"]
        same_prefix = [index[a][:length] == index[b][:length] for a, b in pairs]
        common = [len(categories[a] & categories[b]) for a, b in pairs]
        both = sum(count for count, same in zip(common, same_prefix, strict=True) if same)
        assert prefix["share_of_all_pairs"] == pytest.approx(np.mean(same_prefix))
        assert prefix["share_of_category_pairs"] == pytest.approx(both / sum(common))
        assert prefix["lift"] == pytest.approx(both / sum(common) / np.mean(same_prefix))
        assert prefix["groups"] == len({codes[:length] for codes in index.values()})
    semantic_ids = list(index.values())
    assert statistics["colliding_items"] == sum(semantic_ids.count(codes) > 1 for codes in semantic_ids) > 0
    assert statistics["indices"] == len(set(semantic_ids))


def test_codes_used_perplexity_and_groups():
    index = {
        "1": ("<a_1>", "<b_1>"),
        "2": ("<a_1>", "<b_2>"),
        "3": ("<a_2>", "<b_3>", "<c_1>"),
        "4": ("<a_2>", "<b_3>"),
    }
    statistics = index_statistics(index)
    assert [level["codes_used"] for level in statistics["levels"]] == [2, 3, 1]
    assert statistics["levels"][0]["perplexity"] == pytest.approx(2)
    assert statistics["levels"][1]["perplexity"] == pytest.approx(2**1.5)
    assert statistics["colliding_items"] == 0  # one semantic ID is a prefix of another
    assert statistics["prefixes"][1]["largest"][0] == {"prefix": "<a_2><b_3>", "items": 2}
    assert statistics["prefixes"][1]["share_of_all_pairs"] == pytest.approx(1 / 6)
    assert statistics["prefixes"][2]["share_of_all_pairs"] == 0 and "lift" not in statistics["prefixes"][2]


@pytest.mark.parametrize(
    "records, key, categories",
    [
        ([{"class": "A B"}, {"class": "B"}, {}, {"class": None}], "class", [{"B"}, {"B"}, set(), set()]),
        ([{"brand": "A B, Inc."}, {"brand": "A B, Inc."}, {}, {}], "brand", [{"A B, Inc."}] * 2 + [set()] * 2),
        ([{"categories": ["All", "x"]}, {"categories": ["All", "x"]}] + [{"categories": "All, y"}] * 2,
         "categories", [{"x"}, {"x"}, {"y"}, {"y"}]),
        ([{"categories": "", "brand": 3}] * 2 + [{"categories": "", "brand": 4}] * 2,
         "brand", [{"3"}, {"3"}, {"4"}, {"4"}]),
    ],
)  # fmt: skip
def test_categories_are_read(tmp_path, records, key, categories):
    path = tmp_path / "D.item.json"
    path.write_text(json.dumps(dict(enumerate(records))))
    assert read_categories(path, None) == (key, dict(zip("0123", categories, strict=True)))


def test_report_of_two_files(toy, tmp_path, script):
    """Items of one kind have equal numbers modulo 3; the toy index groups items by order."""
    other = tmp_path / "kind.index.json"
    other.write_text(json.dumps({str(i): [f"<a_{i % 3}>", "<b_0>"] for i in range(9)}))
    item = tmp_path / "toy.item.json"
    item.write_text(json.dumps({str(i): {"title": f"Toy {i}", "kind": f"rest {i % 3}"} for i in range(9)}))
    flags = ("--item", item, "--category_key", "kind", "--output", tmp_path / "out")
    code, out, error = script(report.main, toy / "toy/toy.index.json", other, *flags)
    assert code == 0, error
    assert out.splitlines()[0].split() == ["toy", "kind"]
    content = json.loads((tmp_path / "out/report.json").read_text())
    toys, kinds = content["indices"]["toy"], content["indices"]["kind"]
    assert content["category_key"] == "kind" and content["arguments"]["category_key"] == "kind"
    assert (toys["colliding_items"], kinds["colliding_items"]) == (0, 9)
    assert toys["prefixes"][0]["lift"] == 0 and kinds["prefixes"][0]["lift"] == pytest.approx(4)
    assert (tmp_path / "out/report.png").read_bytes().startswith(PNG)
    code, out, error = script(report.main, other, "--output", tmp_path / "plain")
    assert code == 0 and "category" not in out and (tmp_path / "plain/report.png").exists()


def test_files_of_one_name_are_distinguished_by_their_folders():
    paths = [Path("/x/a/D.index.json"), Path("y/b/D.json"), Path("b/E.json")]
    assert report.unique_names(paths) == ["a/D", "b/D", "b/E"]
    assert report.unique_names(paths[1:]) == ["D", "E"]
    assert report.unique_names([Path("D.json"), Path("D.index.json")]) == ["D.json", "D.index.json"]


def test_published_index_files(shared, tmp_path, script):
    files = [shared / f"data/{name}/{name}.index.json" for name in ("Industrial", "Instruments")]
    item = ("--item", shared / "data/Industrial/Industrial.item.json")
    assert script(report.main, *files, "--output", tmp_path)[0] == 0
    statistics = json.loads((tmp_path / "report.json").read_text())["indices"]["Instruments"]
    assert (statistics["items"], statistics["indices"]) == (9_922, 9_897)
    assert script(report.main, files[0], *item, "--output", tmp_path)[0] == 0
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["category_key"] == "brand"  # its categories are empty
    assert content["indices"]["Industrial"]["prefixes"][0]["lift"] > 5


@pytest.mark.parametrize("flags", [(), ("--category_key", "title")])
def test_items_without_a_common_category_get_a_report_without_lifts(toy, tmp_path, script, flags):
    index, item = toy / "toy/toy.index.json", toy / "toy/toy.item.json"
    code, out, error = script(report.main, index, "--item", item, *flags, "--output", tmp_path / "out")
    assert code == 0 and "no lifts: no category in" in out and "colliding items" in out, error
    content = json.loads((tmp_path / "out/report.json").read_text())
    assert content["category_key"] is None and "lift" not in content["indices"]["toy"]["prefixes"][0]


def test_bad_input(toy, tmp_path, refused):
    index, item = toy / "toy/toy.index.json", toy / "toy/toy.item.json"
    out = ("--output", tmp_path / "out")
    assert "no such file" in refused(report.main, tmp_path / "no.json", *out)
    assert "cannot be read" in refused(report.main, toy, *out)
    assert "given twice" in refused(report.main, index, index, *out)
    assert "--category_key needs --item" in refused(report.main, index, "--category_key", "brand", *out)
    assert "no item has the key 'kind'" in refused(report.main, index, "--item", item, "--category_key", "kind", *out)
    broken = tmp_path / "broken.index.json"
    for content, message in (
        ("{", "not valid JSON"),
        ("[1]", "contains a list"),
        ("{}", "is empty"),
        ('{"1": "<a_1>"}', "item '1' should have a list of code tokens"),
        ('{"1": []}', "item '1' should have a list of code tokens"),
        ('{"1": [1]}', "item '1' should have a list of code tokens"),
        ('{"1": ["a"], "1": ["b"]}', "the key '1' occurs twice"),
    ):
        broken.write_text(content)
        assert message in refused(report.main, index, broken, *out)
    kinds = tmp_path / "kinds.item.json"
    kinds.write_text(json.dumps({str(i): {"class": f"k{i % 3}"} for i in range(8)}))
    assert "item '8' is not in" in refused(report.main, index, "--item", kinds, *out)
    kinds.write_text(json.dumps({str(i): {"class": f"k{i % 3}"} for i in range(10)}))
    assert "item '9' of" in refused(report.main, index, "--item", kinds, *out)
    kinds.write_text('{"0": 3}')
    assert "item '0' should be an object" in refused(report.main, index, "--item", kinds, *out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("")
    assert "cannot be written" in refused(report.main, index, *out)
