"""Searching for many users: batches that do not fit into memory, and batches shared among processes."""

import json
import shutil

import pytest
import torch

import test_ddp
from reclingua import Recommender
from reclingua.datasets.tasks import held_out_samples
from reclingua.inference import recommender as module
from reclingua.utils.errors import InputError
from tests.helpers.scripts import ROOT, run_processes, torchrun


@pytest.fixture
def recommender(workshop, tuned):
    return Recommender.from_pretrained(tuned, workshop / "datasets")


@pytest.fixture
def search(recommender):
    """search(batch_size): the lists of the toy's test users."""
    samples = held_out_samples(recommender.dataset, "test", recommender.task, 3)

    def run(batch_size):
        return recommender.recommend(samples, 4, num_beams=4, batch_size=batch_size)

    return run


def out_of_memory_above(limit, monkeypatch):
    """Make every search of more than `limit` users run out of memory; returns (users, beams) of each."""
    tried, real = [], module.beam_search

    def beam_search(model, input_ids, *args, num_beams, **kwargs):
        tried.append((len(input_ids), num_beams))
        if len(input_ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
        return real(model, input_ids, *args, num_beams=num_beams, **kwargs)

    monkeypatch.setattr(module, "beam_search", beam_search)
    return tried


def test_a_batch_that_does_not_fit_is_halved_and_done_again(search, monkeypatch, capsys):
    want = search(60)
    tried = out_of_memory_above(7, monkeypatch)
    found = search(24)
    assert [[r.item for r in row] for row in found] == [[r.item for r in row] for row in want]
    assert [size for size, _ in tried[:3]] == [24, 12, 6] and max(size for size, _ in tried[3:]) == 6
    assert sum(size for size, _ in tried if size <= 7) == 60
    assert {beams for _, beams in tried} == {4}
    assert "12 users in a batch: retrying with 6" in capsys.readouterr().err


def test_histories_get_what_a_dataset_part_gets(recommender, search):
    """Plain lists of item ids, long ones cut as in training; seen and further items are left out on request."""
    dataset = recommender.dataset
    histories = [dataset.split(user, "test")[0] for user in dataset.test_users]
    assert recommender.recommend(histories, 4, num_beams=4) == search(60)
    top = recommender.recommend(histories[:9], k=2)
    assert [len(ranked) for ranked in top] == [2] * 9
    best = [[ranked[0].item] for ranked in top]
    unseen = recommender.recommend(histories[:9], k=9, exclude_seen=True, excluded=best)
    for history, ranked, first in zip(histories[:9], unseen, best, strict=True):
        assert not {scored.item for scored in ranked} & {*history, *first}
        assert len(ranked) == 9 - len({*history, *first})


def test_what_is_no_history_is_refused(recommender, workshop, studio):
    with pytest.raises(InputError, match="history 1: is empty"):
        recommender.recommend([["1"], []])
    with pytest.raises(InputError, match="history 0: item 'x' is not in toy"):
        recommender.recommend([["1", "x"]])
    with pytest.raises(InputError, match="use Scorer"):
        Recommender.from_pretrained(studio / "tallrec", studio)
    with pytest.raises(InputError, match="not the text '12'"):
        recommender.recommend(["12"])
    samples = held_out_samples(recommender.dataset, "test", recommender.task, 3)
    for options, message in (
        ({"k": 5, "num_beams": 4}, "k should be from 1 to num_beams"),
        ({"k": 0}, "k should be from 1 to num_beams"),
        ({"batch_size": 0}, "batch_size 0: should be 1 at least"),
        ({"prompt_id": 99}, "prompt_id 99: should be one of 0, 1"),
        ({"excluded": [["1"]]}, "60 histories, 1 lists of excluded items"),
        ({"exclude_seen": True}, "samples hold the end of a history only"),
    ):
        with pytest.raises(InputError, match=message):
            recommender.recommend(samples, **options)
    assert recommender.recommend([]) == []


def test_items_have_the_scores_of_the_search(recommender, search, monkeypatch):
    """Whatever the batch; also of items that the search did not find, and of none."""
    samples = held_out_samples(recommender.dataset, "test", recommender.task, 3)
    lists = search(60)
    items = [[scored.item for scored in reversed(ranked)][: row % 4] for row, ranked in enumerate(lists)]
    for batch_size in (7, 60):
        scores = recommender.score(samples, items, batch_size=batch_size)
        for row, ranked in enumerate(lists):
            expected = [scored.score for scored in reversed(ranked)][: row % 4]
            assert scores[row].tolist() == pytest.approx(expected, abs=1e-4)
    everything = sorted(recommender.dataset.index)
    (scores,) = recommender.score([["1", "2"]], [everything])
    (ranked,) = recommender.recommend([["1", "2"]], k=9)
    assert [everything[number] for number in (-scores).argsort()] == [scored.item for scored in ranked]


def test_items_that_cannot_be_scored_are_refused(recommender):
    for items, message in (
        ([["1"], ["1", "x"]], "row 1: item 'x' has no semantic ID in toy"),
        ([["1"]], "2 histories, 1 lists of items"),
    ):
        with pytest.raises(InputError, match=message):
            recommender.score([["1"], ["2"]], items)
    with pytest.raises(InputError, match="history 1: is empty"):
        recommender.score([["1"], []], [["1"], ["1"]])


def test_memory_for_not_even_one(search, monkeypatch):
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(InputError, match="one user in the batch; take fewer beams"):
        search(4)


def arguments(workshop, ckpt, folder):
    files = ("--results_file", folder / "results.json", "--predictions_file", folder / "lines.jsonl")
    return ("--ckpt_path", ckpt, "--data_path", workshop / "datasets", "--num_beams", 10, "--exclude_seen", *files)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("processes, batch_size", [(2, 7), (3, 50)])
def test_many_processes_measure_what_one_does(script, workshop, tuned, tmp_path, request, processes, batch_size):
    """Also where a process has nothing to do: sixty users make two batches of fifty, for three processes."""
    import test as test_script

    ckpt = shutil.copytree(tuned, tmp_path / "ckpt")
    flags = (*arguments(workshop, ckpt, tmp_path), "--test_batch_size", batch_size, "--test_prompt_ids", "0,2")
    flags = (*flags, "--fuse", "ease")
    torch.set_num_threads(2)  # and one in each of the others
    request.addfinalizer(lambda: torch.set_num_threads(1))
    code, said_alone, error = script(test_script.main, *flags)
    assert code == 0, error
    alone, lines = json.loads((tmp_path / "results.json").read_text()), read_lines(tmp_path / "lines.jsonl")
    fused = json.loads((ckpt / "fusion.json").read_text())
    for made in (tmp_path / "results.json", ckpt / "fusion.json"):
        made.unlink()
    details = (tmp_path / "results/details.json").read_text()
    shutil.rmtree(tmp_path / "results")
    together = run_processes(processes, test_ddp.main, *flags)
    assert together.returncode == 0, together.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    del alone["seconds"], results["seconds"]
    assert json.loads((ckpt / "fusion.json").read_text()) == fused
    assert results == alone and results["users"] == 60
    assert (tmp_path / "results/details.json").read_text() == details and (tmp_path / "results/report.html").exists()
    for line, want in zip(read_lines(tmp_path / "lines.jsonl"), lines, strict=True):
        assert line.pop("scores") == pytest.approx(want.pop("scores"), abs=1e-5)  # the last bit follows the threads
        assert line == want
    assert together.stdout == said_alone


def test_bad_input_is_said_once(workshop, tuned, tmp_path):
    result = torchrun(2, "test_ddp.py", *arguments(workshop, tuned, tmp_path), "--index_file", ".none.json")
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1 and "toy.none.json: no such file" in result.stderr


def test_a_failing_process_ends_the_run_with_its_message(workshop, tuned, tmp_path):
    script = tmp_path / "breaks.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport test_ddp\n"
        "from reclingua.inference import recommender as recommend\n"
        "def breaks(*args, **kwargs):\n    raise ValueError('this one is broken')\n"
        "if os.environ['RANK'] == '1':\n    recommend.beam_search = breaks\n"
        "test_ddp.main()\n"
    )
    result = torchrun(2, script, *arguments(workshop, tuned, tmp_path))
    assert result.returncode != 0 and "ValueError: this one is broken" in result.stderr
    assert not (tmp_path / "results.json").exists()


def test_without_torchrun(refused):
    assert "torchrun --nproc_per_node" in refused(test_ddp.main, "--ckpt_path", "any")


def test_help_without_torchrun(script):
    code, out, _ = script(test_ddp.main, "--help")
    assert code == 0 and "--num_beams" in out
