"""data.split_cold: hidden items are in no training history, and the two datasets fit together."""

import json

from data import split_cold
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.training_histories import count_trained_targets, training_fingerprints


def test_hidden_items_are_test_targets_alone(toy, script):
    where = ("--dataset", "toy", "--data_path", toy)
    (toy / "toy/toy.item2id").write_text("B000\t0\n")
    code, out, error = script(split_cold.main, *where, "--share", 0.3, "--seed", 1)
    assert code == 0 and "toy: 3 of 9 items hidden, seed 1" in out, error
    full, warm, cold = (open_interactions(toy, name, ["items"]) for name in ("toy", "toy-warm", "toy-cold"))
    hidden = full.items.keys() - warm.items.keys()
    assert len(hidden) == 3 and cold.items == full.items
    assert not {item for history in warm.histories.values() for item in history} & hidden
    assert not {item for history in cold.histories.values() for item in history[:-1]} & hidden
    targets = {user: cold.split(user, "test")[1] for user in cold.test_users}
    assert targets == {user: full.split(user, "test")[1] for user in cold.test_users}
    assert any(item in hidden for item in targets.values()) and any(item not in hidden for item in targets.values())
    assert count_trained_targets(cold, cold.test_users, training_fingerprints(warm)) == 0
    assert not any(item in hidden for history in cold.train_histories.values() for item in history)
    assert (toy / "toy-cold/toy-cold.item2id").read_text() == "B000\t0\n"


def test_bad_input_of_split_cold(toy, tmp_path, refused, script, edit):
    where = ("--dataset", "toy", "--data_path", toy)
    assert "--share 1.0: should be between 0 and 1" in refused(split_cold.main, *where, "--share", 1)
    assert "hide at least one item" in refused(split_cold.main, *where, "--share", 0.01)
    assert "no user is left with three interactions" in refused(split_cold.main, *where, "--share", 0.9)
    assert "no such dataset folder" in refused(split_cold.main, "--dataset", "none", "--data_path", toy)
    assert script(split_cold.main, *where, "--output_path", tmp_path / "split")[0] == 0
    before = json.loads((tmp_path / "split/toy-warm/toy-warm.inter.json").read_text())
    assert "exists and is not empty" in refused(split_cold.main, *where, "--output_path", tmp_path / "split")
    assert json.loads((tmp_path / "split/toy-warm/toy-warm.inter.json").read_text()) == before
    edit("inter", lambda inter: {user: [*history, 0] for user, history in inter.items()})
    assert "no test target is hidden" in refused(split_cold.main, *where, "--share", 0.1, "--seed", 1)
    assert not list(toy.glob("toy-*")) and not list(toy.glob(".*"))
