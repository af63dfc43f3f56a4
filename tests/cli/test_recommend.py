"""recommend.py: lists equal to those of Recommender and test.py, whatever the shards and processes; bad input."""

import csv
import json
import shutil
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import recommend
import test as test_script
from reclingua import Recommender, Scorer
from reclingua.inference.fusion import load_fusion
from reclingua.inference.rating_fusion import RatingFusion, save_rating_fusion
from reclingua.inference.request_files import count_histories, read_histories, read_pairs
from reclingua.inference.shards import ShardedOutput
from reclingua.inference.user_lists import UserLists, liked_items, most_popular
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import CheckpointMetadata
from tests.helpers.scripts import run_processes, torchrun


@pytest.fixture
def write(script, workshop, tuned, tmp_path):
    """write("lists.parquet", *flags): run recommend.py; returns the rows and what it printed."""

    def run(name, *more, ckpt=tuned):
        where = ("--ckpt_path", ckpt, "--data_path", workshop / "datasets")
        code, out, error = script(recommend.main, *where, "--output", tmp_path / name, *more)
        assert code == 0, error
        assert not (tmp_path / f"{name}.parts").exists()
        return read(tmp_path / name), out

    return run


@pytest.fixture
def refuse(refused, workshop, tuned, tmp_path):
    """refuse(*flags): recommend.py ends with one line, and nothing is written."""

    def run(*more, output="lists.csv", ckpt=tuned):
        where = ("--ckpt_path", ckpt, "--data_path", workshop / "datasets")
        line = refused(recommend.main, *where, "--output", tmp_path / output, *more)
        assert not list(tmp_path.glob("lists.*"))
        return line

    return run


@pytest.fixture(scope="module")
def recommender(workshop, tuned):
    return Recommender.from_pretrained(tuned, workshop / "datasets")


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(newline="") as file:
        return [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(csv.DictReader(file))


def lists_of(rows, key="user", item="item"):
    """user -> [(item, score)], the ranks checked."""
    lists = {}
    for row in rows:
        lists.setdefault(row[key], []).append((row[item], row["score"]))
        assert int(row["rank"]) == len(lists[row[key]])
    return lists


def rounded(ranked):
    return [(entry.item, round(entry.score, 6)) for entry in ranked]


# ---- Lists ----


def test_all_users_get_the_lists_of_recommender(write, recommender):
    rows, out = write("lists.parquet", "--k", 4, "--num_beams", 6)
    users, histories = zip(*recommender.dataset.histories.items(), strict=True)
    expected = recommender.recommend(list(histories), 4, num_beams=6)
    assert list(rows[0]) == ["user", "rank", "item", "score", "title", "source"]
    assert lists_of(rows) == {user: rounded(ranked) for user, ranked in zip(users, expected, strict=True)}
    assert list(lists_of(rows)) == list(users)
    assert all(row["title"] == f"Toy number {row['item']}" and row["source"] == "model" for row in rows)
    assert "240 rows for 60 users in" in out and len(out.splitlines()) == 1


def test_lists_are_those_of_the_predictions_file(script, write, workshop, tuned, recommender, tmp_path):
    """On the histories of a test, which hold out the last item; jsonl with the same numbers."""
    where = ("--ckpt_path", tuned, "--data_path", workshop / "datasets", "--results_file", tmp_path / "r.json")
    more = ("--num_beams", 5, "--metrics", "hit@5", "--exclude_seen", "--predictions_file", tmp_path / "p.jsonl")
    with mock.patch.object(test_script, "write_report"):
        assert script(test_script.main, *where, *more)[0] == 0
    lines = read(tmp_path / "p.jsonl")
    histories = {line["user"]: recommender.dataset.split(line["user"], "test")[0] for line in lines}
    save_histories(tmp_path / "users.jsonl", histories)
    rows, out = write(
        "lists.jsonl", "--histories", tmp_path / "users.jsonl", "--k", 5, "--num_beams", 5, "--exclude_seen"
    )
    lists = lists_of(rows)
    assert lists == {
        line["user"]: list(zip(line["items"], line["scores"], strict=True)) for line in lines if line["items"]
    }
    short = sum(len(line["items"]) < 5 for line in lines)
    assert (f"{short} users have fewer than 5 items left" in out) == bool(short)


def save_histories(path, histories):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"user": list(histories), "items": list(histories.values())}), path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps({"user": user, "items": items}) for user, items in histories.items()]
        path.write_text("\n".join(lines) + "\n")
    else:
        lines = [f"{user},{' '.join(map(str, items))}" for user, items in histories.items()]
        path.write_text("user,items\n" + "\n".join(lines) + "\n")


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_other_users_unknown_items_and_empty_histories(write, recommender, tmp_path, ending):
    histories = {"7": [1, 2], "new": [99, 3, 77], "none": [], "strange": [99]}
    save_histories(tmp_path / f"users.{ending}", histories)
    rows, out = write(f"lists.{ending}", "--histories", tmp_path / f"users.{ending}", "--k", 3)
    lists = lists_of([row | {"score": float(row["score"])} for row in rows])
    first, second = recommender.recommend([["1", "2"], ["3"]], 3)
    popular = [(entry.item, entry.score) for entry in most_popular(recommender.dataset, recommender.token_ids)[:3]]
    assert lists == {"7": rounded(first), "new": rounded(second), "none": popular, "strange": popular}
    assert [row["source"] for row in rows] == ["model"] * 6 + ["popularity"] * 6
    counts = [sum(history.count(item) for history in recommender.dataset.histories.values()) for item, _ in popular]
    assert counts == [score for _, score in popular] == sorted(counts, reverse=True)
    assert "3 interactions with unknown items were dropped; 2 users without a known item got" in out


def test_candidates_and_excluded_items(write, recommender, tmp_path):
    (tmp_path / "few.txt").write_text("1\n2\n5\n\n6\n99\n")
    (tmp_path / "not.txt").write_text("6\n")
    more = ("--candidates", tmp_path / "few.txt", "--exclude_items", tmp_path / "not.txt", "--exclude_seen")
    rows, out = write("lists.csv", *more)
    others = [[item for item in recommender.dataset.index if item not in ("1", "2", "5")]] * 60
    histories = list(recommender.dataset.histories.values())
    expected = recommender.recommend(histories, 20, exclude_seen=True, excluded=others)
    lists = lists_of([row | {"score": float(row["score"])} for row in rows])
    assert list(lists.values()) == [rounded(ranked) for ranked in expected if ranked]
    assert "1 items of --candidates are unknown; 60 users have fewer than 20 items left" in out


def test_popularity_obeys_candidates(write, tmp_path):
    (tmp_path / "few.txt").write_text("8\n2\n")
    save_histories(tmp_path / "users.csv", {"none": []})
    rows, _ = write("lists.csv", "--histories", tmp_path / "users.csv", "--candidates", tmp_path / "few.txt")
    assert {row["item"] for row in rows} == {"2", "8"}


def test_fused_lists(write, script, refuse, workshop, tuned, tmp_path):
    ckpt = shutil.copytree(tuned, tmp_path / "ckpt")
    where = ("--ckpt_path", ckpt, "--data_path", workshop / "datasets", "--results_file", tmp_path / "r.json")
    with mock.patch.object(test_script, "write_report"):
        few = ("--num_beams", 5, "--metrics", "hit@1", "--exclude_seen")
        code, _, error = script(test_script.main, *where, *few, "--fuse", "ease")
    assert code == 0, error
    (tmp_path / "few.txt").write_text("1\n2\n3\n4\n")
    assert "holds no fusion without --exclude_seen" in refuse("--fuse", ckpt=ckpt)
    asked = ("--k", 3, "--fuse", "--exclude_seen")
    rows, _ = write("lists.parquet", *asked, ckpt=ckpt)
    some, _ = write("some.parquet", *asked, "--candidates", tmp_path / "few.txt", ckpt=ckpt)
    recommender = Recommender.from_pretrained(ckpt, workshop / "datasets")
    histories = list(recommender.dataset.histories.values())
    fused = load_fusion(ckpt, recommender)
    expected = fused.recommend(histories, 3, exclude_seen=True)
    assert list(lists_of(rows).values()) == [rounded(ranked) for ranked in expected]
    assert {row["item"] for row in some} <= {"1", "2", "3", "4"} and 0 < len(some) <= 180


def test_neighbours_of_items(write, recommender):
    rows, _ = write("near.jsonl", "--item_to_item", "--k", 2)
    expected = recommender.recommend([[item] for item in recommender.dataset.item_ids], 2, exclude_seen=True)
    lists = lists_of(rows, "item", "neighbour")
    assert lists == dict(zip(recommender.dataset.item_ids, map(rounded, expected), strict=True))
    assert all(item not in dict(neighbours) for item, neighbours in lists.items())
    assert lists["3"][0][0] == "4"  # the ring


def test_popularity_counts_all_interactions(recommender):
    (first, *_), total = most_popular(recommender.dataset, {"3", "4"}), recommender.dataset.histories.values()
    assert first.score == max(sum(history.count(item) for history in total) for item in "34")


# ---- Shards, processes ----


def test_a_killed_run_resumes_with_the_same_command_only(write, script, refused, workshop, tuned, tmp_path):
    """Killed in the fourth of eight shards, whose temporary file is left; the shards before it are not asked again."""
    flags = ("--ckpt_path", tuned, "--data_path", workshop / "datasets", "--output", tmp_path / "lists.csv")
    flags, asked, real = (*flags, "--batch_size", 2, "--k", 3), [], UserLists.rows

    def rows(self, users):
        asked.append(len(users))
        if len(asked) == 4:
            (tmp_path / "lists.csv.parts/.000003.parquet.0.tmp").touch()
            raise KeyboardInterrupt
        return real(self, users)

    with mock.patch.object(UserLists, "rows", rows):
        assert script(recommend.main, *flags)[0] == 130
        assert not (tmp_path / "lists.csv").exists()
        shards = sorted(path.name for path in (tmp_path / "lists.csv.parts").glob("0*"))
        assert shards == ["000000.parquet", "000001.parquet", "000002.parquet"]
        line = refused(recommend.main, *flags, "--exclude_seen")
        assert "shards made with another --exclude_seen (False, now True); delete it to start again" in line
        code, out, error = script(recommend.main, *flags)
    assert code == 0 and "resuming: 3 of 8 shards are written" in out, error
    assert asked == [8] * 4 + [8, 8, 8, 8, 4]
    assert not (tmp_path / "lists.csv.parts").exists()
    write("whole.csv", "--batch_size", 2, "--k", 3)
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "lists.csv").read_bytes()
    write("one.csv", "--k", 3)  # in one shard
    one, eight = (lists_of(read(tmp_path / name)) for name in ("one.csv", "lists.csv"))
    assert {user: [item for item, _ in ranked] for user, ranked in one.items()} == {
        user: [item for item, _ in ranked] for user, ranked in eight.items()
    }


def test_a_broken_shard_is_named(script, refused, workshop, tuned, tmp_path):
    flags = ("--ckpt_path", tuned, "--data_path", workshop / "datasets", "--output", tmp_path / "lists.csv")
    with mock.patch.object(ShardedOutput, "join", side_effect=KeyboardInterrupt):
        assert script(recommend.main, *flags)[0] == 130
    (tmp_path / "lists.csv.parts/000000.parquet").write_text("torn")
    assert "000000.parquet: cannot be read" in refused(recommend.main, *flags)
    assert not (tmp_path / "lists.csv").exists()
    (tmp_path / "lists.csv.parts/000000.parquet").unlink()
    assert script(recommend.main, *flags)[0] == 0 and len(read(tmp_path / "lists.csv")) == 540


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_users(write, workshop, tuned, tmp_path, processes):
    """Three processes for two shards: one has nothing to do."""
    size = 2 if processes == 2 else 8
    write("alone.parquet", "--batch_size", size)
    where = ("--ckpt_path", tuned, "--data_path", workshop / "datasets", "--output", tmp_path / "shared.parquet")
    done = run_processes(processes, recommend.main, *where, "--batch_size", size)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("540 rows for 60 users") == 1
    assert (tmp_path / "shared.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()
    assert not (tmp_path / "shared.parquet.parts").exists()


@pytest.mark.slow
def test_torchrun(workshop, tuned, tmp_path):
    where = ("--data_path", workshop / "datasets", "--output", tmp_path / "lists.csv")
    done = torchrun(2, "recommend.py", "--ckpt_path", tuned, *where, "--batch_size", 2)
    assert done.returncode == 0 and len(read(tmp_path / "lists.csv")) == 540, done.stderr


# ---- Pairs ----


@pytest.mark.parametrize("kind", ["tallrec", "mf", "sasrec"])
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_pairs_have_the_scores_of_scorer(write, studio, tmp_path, kind, ending):
    pairs = [("1", "3"), ("2", "3"), ("stranger", "5"), ("1", "999"), ("1", "3"), ("40", "7")]
    path = tmp_path / f"pairs.{ending}"
    if ending == "csv":
        path.write_text("item,user,time\n" + "".join(f"{item},{user},0\n" for user, item in pairs))
    else:
        pq.write_table(pa.table(dict(zip(("user", "item"), map(list, zip(*pairs, strict=True)), strict=True))), path)
    where = ("--data_path", studio, "--pairs", path)
    rows, out = write(f"scores.{ending}", *where, ckpt=studio / kind)
    scorer = Scorer.from_pretrained(studio / kind, studio)
    liked = liked_items(scorer.dataset)
    known = [pair for pair in pairs if pair[1] != "999"]
    histories = [[other for other in liked.get(user, []) if other != item] for user, item in known]
    users = [user if user != "stranger" else None for user, _ in known]
    scores = scorer.score(histories, [item for _, item in known], users)
    assert [(row["user"], row["item"]) for row in rows] == known
    np.testing.assert_allclose([float(row["score"]) for row in rows], scores, rtol=1e-5)
    assert kind == "tallrec" or [float(row["score"]) for row in rows] == scores.tolist()  # not rounded
    assert "1 pairs with unknown items were dropped; 1 pairs are of users without ratings" in out


def test_pairs_are_scored_by_the_fusion_of_the_checkpoint(write, studio, tmp_path, refused):
    copied = shutil.copytree(studio / "mf", tmp_path / "mf")
    (tmp_path / "pairs.csv").write_text("user,item\n1,3\n2,5\n")
    where = ("--data_path", studio, "--pairs", tmp_path / "pairs.csv", "--fuse")
    none = ("--ckpt_path", copied, "--output", tmp_path / "none.csv")
    assert "holds no fusion; fit one" in refused(recommend.main, *none, *where)
    scorer = Scorer.from_pretrained(copied, studio)
    save_rating_fusion(copied, scorer.dataset, RatingFusion({"mf": 2, "item like-rate": 0, "user like-rate": 0}, 1))
    rows, _ = write("fused.csv", *where, ckpt=copied)
    alone, _ = write("alone.csv", *where[:-1], ckpt=copied)
    odds = scorer.model.log_odds(np.array([float(row["score"]) for row in alone]))
    np.testing.assert_allclose([float(row["score"]) for row in rows], 2 * odds + 1, rtol=1e-5)


def test_histories_of_pairs_hold_all_that_was_liked(studio):
    """Whatever part a rating is in: as in the last row of a user, with the item of that row itself."""
    dataset = Scorer.from_pretrained(studio / "mf", studio).dataset
    liked = liked_items(dataset)
    last = {row["uid"]: row for part in dataset.parts.values() for row in part}
    assert len(last) == len(liked) == 40
    for user, row in last.items():
        assert liked[str(user)] == [str(item) for item in row["his"] + [row["iid"]] * row["label"]]


# ---- Bad input ----


def test_bad_flags(refuse, workshop, studio, tmp_path):
    (tmp_path / "none.txt").write_text("99\n")
    (tmp_path / "empty.txt").write_text("\n")
    assert "should end in .parquet, .jsonl, .csv" in refuse(output="lists.txt")
    assert "--k 0" in refuse("--k", 0)
    assert "--num_beams 3: should be --k (5) at least" in refuse("--k", 5, "--num_beams", 3)
    assert "leave no item to recommend" in refuse("--candidates", tmp_path / "none.txt")
    assert "has no items" in refuse("--candidates", tmp_path / "empty.txt")
    assert "no such file" in refuse("--exclude_items", tmp_path / "missing.txt")
    assert "no such file" in refuse("--histories", tmp_path / "missing.csv")
    assert "holds no fusion" in refuse("--fuse")
    assert "as its weights were chosen" in refuse("--fuse", "--num_beams", 20)
    assert "--k 51" in refuse("--fuse", "--k", 51)
    assert "give one of them" in refuse("--item_to_item", "--histories", tmp_path / "x.csv")
    assert "it scores no pairs" in refuse("--pairs", tmp_path / "x.csv")
    assert "--exclude_seen has no effect" in refuse("--pairs", tmp_path / "x.csv", "--exclude_seen")
    assert "it makes no lists; give --pairs" in refuse("--data_path", studio, ckpt=studio / "mf")
    (tmp_path / "sasrec").mkdir()
    CheckpointMetadata("sasrec", "toy", tasks=["next_item"]).save(tmp_path / "sasrec")
    assert "is a baseline of next items" in refuse(ckpt=tmp_path / "sasrec")
    assert "no such dataset folder" in refuse("--dataset", "nothing")
    assert "no such file" in refuse(ckpt=tmp_path)
    assert "cannot be written" in refuse(output="/proc/self/lists.csv")
    (tmp_path / "users.csv").write_text("user,items\nx,1\n")
    same = refuse("--histories", tmp_path / "users.csv", output="users.csv")
    assert "is both --histories and --output" in same


BAD_HISTORIES = {
    "jsonl": [
        ("", "has no users"),
        ("[1]", "line 1 should be an object with user and items"),
        ('{"user": 1}', "line 1: has no 'items'"),
        ('{"user": 1, "items": [1, NaN]}', "NaN is no id"),
        ('{"user": 1, "items": null}', "line 1: items should be a list of item ids, not None"),
        ('{"user": 1, "items": [[1]]}', "line 1: item [1] is no id"),
        ('{"user": 1, "items": [1.5]}', "item 1.5 is no id"),
        ('{"user": true, "items": [1]}', "user True is no id"),
        ('{"user": "\\ud83d", "items": [1]}', "is no id"),
        ('{"user": "a\\nb", "items": [1]}', "is no id"),
        ('{"user": 1, "items": [1]}\n{"user": "1", "items": [2]}', "user '1' occurs twice"),
        ('{"user": 1, "items": [1]', "line 1 is not valid JSON"),
        ('{"user": 1, "items": ' + "[" * 100_000, "is not valid JSON"),
        (json.dumps({"user": 1, "items": [1] * 10_000}), "has 10,000 items; give the latest 9,999 at most"),
    ],
    "csv": [
        ("user,items\n1,2,3\n", "line 2: should have 2 values"),
        ("user,item\n1,2\n", "has no 'items'; it has user, item"),
        ("user,items\n,2\n", "user '' is no id"),
        ('user,items\n1,"2\n', "cannot be read"),
        ("", "has no 'user'; it has nothing"),
    ],
    "parquet": [("no parquet", "cannot be read")],
}


@pytest.mark.parametrize(
    "ending, content, message", [(ending, *case) for ending, cases in BAD_HISTORIES.items() for case in cases]
)
def test_bad_histories(tmp_path, ending, content, message):
    path = tmp_path / f"users.{ending}"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        count_histories(read_histories(path), {"1"}, path)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "items, message",
    [
        ([[1.0, float("nan")]], "row 0: item 1.0 is no id"),
        ([[[1]]], "row 0: item [1] is no id"),
        ([None], "row 0: items should be a list"),
        (["1 2"], "row 0: items should be a list"),
    ],
)
def test_bad_parquet(tmp_path, items, message):
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user": ["a"] * len(items), "items": items}), path)
    with pytest.raises(InputError, match="row 0") as error:
        count_histories(read_histories(path), {"1"}, path)
    assert message in str(error.value)
    with pytest.raises(InputError, match="has no 'item'; it has user, items"):
        list(read_pairs(path))


def test_a_bad_row_leaves_nothing(refuse, tmp_path):
    (tmp_path / "users.csv").write_text("user,items\na,1\na,2\n")
    assert "user 'a' occurs twice" in refuse("--histories", tmp_path / "users.csv")
    (tmp_path / "users.txt").write_text("user,items\na,1\n")
    assert "should end in .parquet, .jsonl, .csv" in refuse("--histories", tmp_path / "users.txt")


def test_a_folder_of_something_else_is_left_alone(script, refused, workshop, tuned, tmp_path):
    (tmp_path / "a.csv.parts").mkdir()
    (tmp_path / "a.csv.parts/mine").touch()
    where = ("--ckpt_path", tuned, "--data_path", workshop / "datasets", "--output", tmp_path / "a.csv")
    assert "holds other files than shards" in refused(recommend.main, *where)
    assert [path.name for path in (tmp_path / "a.csv.parts").iterdir()] == ["mine"]
    (tmp_path / "a.csv.parts/mine").rename(tmp_path / "a.csv.parts/.run.json.0.tmp")  # of a run killed at its start
    assert script(recommend.main, *where)[0] == 0 and not (tmp_path / "a.csv.parts").exists()
