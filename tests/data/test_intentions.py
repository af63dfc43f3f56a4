"""User texts by a chat model: prompts, accepted answers, a local model, bad input."""

import json

import pytest

from data import intentions
from data.chat import Endpoint, Sampling
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.user_texts import read_user_texts
from tests.helpers.chat_server import (
    answer_from_prompt,
    body,
    completion,
    run_server,
    sent_prompts,
)
from tests.helpers.intentions import KEY, endpoint_flags, output_files

pytestmark = pytest.mark.usefixtures("fast_retries")


# ---- Prompts and texts ----


def test_every_user_gets_preferences_and_intentions(script, paths, toy):
    with run_server(answer_from_prompt) as server:
        code, out, error = script(intentions.main, *paths, *endpoint_flags(server))
    assert code == 0, error
    dataset = open_interactions(toy, "toy")
    texts = read_user_texts(dataset, paths[-1])
    assert list(texts.preferences) == list(dataset.histories)
    assert all(len(set(preferences)) == 3 for preferences in texts.preferences.values())
    assert list(texts.intentions["train"]) == list(texts.intentions["test"]) == list(dataset.histories)
    intention = texts.intentions["test"]["0"]
    assert intention.item == "5" and intention.history == ["0", "1", "2", "3", "4"]
    assert intention.of_user != intention.of_item
    assert output_files(paths) == ["toy.user.json", "toy.user.run.json"]
    assert "preferences: 12 users, 0 without" in out and "user 0 was looking for: Somebody wishes" in out
    assert len(set(sent_prompts(server))) == len(server.requests)  # equal requests of two users are sent once
    run = json.loads((paths[-1].parent / "toy.user.run.json").read_text())
    assert run["answers"] == len(server.requests) and run["arguments"]["model"] == "chatty"


def test_nothing_is_asked_again_if_the_output_is_complete(script, refused, paths):
    with run_server(answer_from_prompt) as server:
        script(intentions.main, *paths, *endpoint_flags(server))
        num_requests, content = len(server.requests), paths[-1].read_bytes()
        code, out, _ = script(intentions.main, *paths, *endpoint_flags(server))
        assert code == 0 and "nothing to do" in out and len(server.requests) == num_requests
        for other in (("--users", 2), ("--seed", 1), ("--model", "other")):
            assert "was not made with these settings" in refused(
                intentions.main, *paths, *endpoint_flags(server), *other
            )
    assert paths[-1].read_bytes() == content


def test_an_unknown_file_is_not_replaced(refused, paths):
    paths[-1].parent.mkdir()
    paths[-1].write_text("mine")
    assert "was not made with these settings" in refused(
        intentions.main, *paths, "--endpoint", "http://h/v1", "--model", "m"
    )
    assert paths[-1].read_text() == "mine"


def test_training_prompts_contain_no_held_out_item(script, paths, toy, edit):
    names = ["apple", "pear", "plum", "fig", "grape", "cherry", "lemon", "lime", "melon"]
    edit(
        "item",
        lambda item: {i: {"title": f"Fruit {name}", "description": f"of {name}"} for i, name in enumerate(names)},
    )
    # User 0 has 0 to 5; user 1 has its valid item, 4, and its test item, 2, in the training history as well.
    edit("inter", lambda inter: {"0": inter["0"], "1": [2, 4, 6, 7, 4, 2]})
    for user, before, train, test in (("0", {0, 1, 2}, 3, 5), ("1", {2, 4, 6}, 7, 2)):
        content = json.loads((toy / "toy/toy.inter.json").read_text())
        edit("inter", lambda inter, user=user: {user: inter[user]})
        with run_server(answer_from_prompt) as server:
            code, _, error = script(
                intentions.main, *paths[:-1], paths[-1].with_name(f"{user}.user.json"), *endpoint_flags(server)
            )
        assert code == 0, error
        items = [{i for i, name in enumerate(names) if name in prompt} for prompt in sent_prompts(server)]
        assert sorted(items, key=sorted) == sorted([before] * 3 + [{train}] * 2 + [{test}] * 2, key=sorted)
        edit("inter", lambda inter, content=content: content)


def test_prompts_of_a_published_dataset_contain_no_held_out_title(shared):
    dataset = open_interactions(shared / "data", "Industrial", ["items"])
    planner = intentions.Planner(
        dataset,
        intentions.read_prompts(intentions.LCREC_PROMPT_FILE, intentions.FIELDS),
        Endpoint("http://h/v1", "m", Sampling()),
        20,
    )
    users = list(dataset.histories)[:300]
    num_checked = 0
    for (section, user), requests in planner.plan(users).items():
        history = dataset.train_history(user) if section == "train" else dataset.train_history(user)[:-1]
        allowed = " ".join(dataset.text(item) for item in history)
        for item in dataset.histories[user][-3:]:
            if section != "test" and dataset.title(item)[:60] not in allowed:
                num_checked += 1
                assert not any(dataset.title(item)[:60] in request.prompt for request in requests)
    assert num_checked > 1000


def test_users_with_short_histories_get_fewer_texts(script, paths, toy, edit):
    edit("inter", lambda inter: inter.update({"short": [1, 2], "shorter": [1], "three": [1, 2, 3]}))
    with run_server(answer_from_prompt) as server:
        assert script(intentions.main, *paths, *endpoint_flags(server))[0] == 0
    texts = read_user_texts(open_interactions(toy, "toy"), paths[-1])
    assert texts.intentions["train"]["short"].item == "2" and "short" not in texts.intentions["test"]
    assert "short" in texts.preferences and not {"shorter", "three"} & set(texts.preferences)
    assert texts.intentions["train"]["three"].history == [] and texts.intentions["test"]["three"].item == "3"


def test_users_flag_limits_the_users(script, paths, toy):
    with run_server(answer_from_prompt) as server:
        assert script(intentions.main, *paths, *endpoint_flags(server), "--users", 2)[0] == 0
    assert list(read_user_texts(open_interactions(toy, "toy"), paths[-1]).preferences) == ["0", "1"]


def test_users_take_turns_with_prompt_templates(script, paths, tmp_path):
    prompts = {task: [{"prompt": f"{task} {{history}}"}] for task in ("general", "lasting")}
    prompts |= {"recent": [{"prompt": "recent {recent}"}], "of_item": [{"prompt": "of_item {item}"}]}
    prompts["of_user"] = [{"prompt": "first {item}"}, {"prompt": "second {item}"}]
    (tmp_path / "prompts.yaml").write_text(json.dumps(prompts))  # JSON is YAML
    with run_server(answer_from_prompt) as server:
        code, _, error = script(
            intentions.main, *paths, *endpoint_flags(server), "--prompt_file", tmp_path / "prompts.yaml"
        )
    assert code == 0, error
    first_words = {prompt.split()[0] for prompt in sent_prompts(server)}
    assert first_words == {"general", "lasting", "recent", "of_item", "first", "second"}


def test_rejected_answers_are_retried_and_then_left_out(script, paths, toy):
    def names_item_five(number, request):
        prompt = request["messages"][0]["content"]
        if prompt.startswith("Product: Toy number 5."):
            return completion("I want the Toy number 5, please.")
        # The first answer to every prompt is empty.
        return answer_from_prompt(number, request) if request["temperature"] else completion("")

    with run_server(names_item_five) as server:
        code, out, error = script(intentions.main, *paths, *endpoint_flags(server))
    assert code == 0, error
    texts = read_user_texts(open_interactions(toy, "toy"), paths[-1])
    missing = {user for user, history in open_interactions(toy, "toy").histories.items() if history[-1] == "5"}
    assert missing and set(texts.intentions["test"]).isdisjoint(missing)
    assert len(texts.intentions["test"]) == 12 - len(missing) and len(texts.preferences) == 12
    assert f"test intentions: {12 - len(missing)} users, {len(missing)} without" in out
    assert "names the item" in out and "empty or too short" in out
    assert "Toy number 5" not in json.dumps([paths[-1].read_text()])
    seeds_of = {}
    for request in server.requests:
        seeds_of.setdefault(request["messages"][0]["content"], []).append(request.get("seed"))
    assert all(seeds[0] is None and len(set(seeds)) == len(seeds) <= 3 for seeds in seeds_of.values())


def test_a_model_without_a_valid_answer_is_rejected(refused, paths):
    with run_server(body(completion("")[1])) as server:
        message = refused(intentions.main, *paths, *endpoint_flags(server), "--users", 1)
    assert "no answer of chatty was accepted (21 empty or too short)" in message and not paths[-1].exists()


# ---- Local model ----


def test_with_smollm2(script, paths, smollm2, shared):
    """The default model, one user of a published dataset."""
    data = ("--dataset", "Industrial", "--data_path", shared / "data", "--output", paths[-1], "--users", 1)
    brief = ("--max_his_len", 2, "--max_new_tokens", 24, "--attempts", 2)
    code, out, error = script(intentions.main, *data, "--model", smollm2, *brief)
    assert code == 0, error
    assert "7 texts for 1 users" in out
    texts = read_user_texts(open_interactions(shared / "data", "Industrial"), paths[-1])
    assert all(10 <= len(text) <= 500 for text in texts.preferences["0"])


# ---- Bad input ----


def bad_prompts(change):
    def flags(toy, tmp_path):
        prompts = intentions.read_prompts(intentions.LCREC_PROMPT_FILE, intentions.FIELDS)
        content = {task: [{"prompt": t.prompt} for t in templates] for task, templates in prompts.items()}
        change(content)
        (tmp_path / "prompts.yaml").write_text(json.dumps(content))
        return "--endpoint", "http://h/v1", "--model", "m", "--prompt_file", tmp_path / "prompts.yaml"

    return flags


def without_texts(toy, tmp_path):
    (toy / "toy/toy.item.json").unlink()
    return REMOTE


REMOTE = ("--endpoint", "http://h/v1", "--model", "m")
BAD = {
    "endpoint without model": (("--endpoint", "http://h/v1"), "--endpoint needs --model"),
    "no such model": (("--model", "./no/model"), "./no/model: no such folder"),
    "no default model": ((), "python -m convert.smollm2 --output_dir ckpt/base/SmolLM2-135M-Instruct"),
    "no such dataset": (("--dataset", "none"), "no such dataset folder"),
    "no item texts": (without_texts, "toy.item.json: no such file"),
    "no scheme": (("--endpoint", "host:80/v1", "--model", "m"), "should be like http://host:port/v1"),
    "a bad port": (("--endpoint", "http://h:port/v1", "--model", "m"), "should be like http://host:port/v1"),
    "a password": (("--endpoint", "http://me:pw@h/v1", "--model", "m"), "should contain no password"),
    "a query": (("--endpoint", "http://h/v1?key=pw", "--model", "m"), "should be like http://host:port/v1"),
    "key for a variable": ((*REMOTE, "--api_key_env", KEY), "--api_key_env: no such environment variable"),
    "no users": ((*REMOTE, "--users", 0), "--users 0: should be at least 1"),
    "concurrency": ((*REMOTE, "--concurrency", 0), "--concurrency 0: should be at least 1"),
    "timeout": ((*REMOTE, "--timeout", "nan"), "--timeout nan: should be above 0"),
    "temperature": ((*REMOTE, "--temperature", 3), "--temperature should be between 0 and 2"),
    "retries": ((*REMOTE, "--retries", -1), "--retries at least 0"),
    "batches at an endpoint": ((*REMOTE, "--batch_size", 4), "--batch_size has no effect with --endpoint"),
    "requests of a local model": (("--concurrency", 4), "--concurrency has no effect without --endpoint"),
    "no prompt file": ((*REMOTE, "--prompt_file", "none.yaml"), "none.yaml: no such prompt file"),
    "task missing": (bad_prompts(lambda c: c.pop("recent")), "task 'recent' has no prompt template"),
    "unknown field": (bad_prompts(lambda c: c["of_item"][0].update(prompt="{item} {user}")), "unknown field {user}"),
    "missing field": (bad_prompts(lambda c: c["general"][0].update(prompt="Hi")), "lacks the field {history} or"),
    "held out": (bad_prompts(lambda c: c["general"][0].update(prompt="{history}{item}")), "unknown field {item}"),
    "output a folder": ((*REMOTE, "--output", "."), "is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(refused, paths, toy, tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, message = BAD[case]
    error = refused(intentions.main, *paths, *(flags(toy, tmp_path) if callable(flags) else flags))
    assert message in error and "pw" not in error and KEY not in error


def test_a_folder_that_cannot_be_written_needs_another_output(refused, paths, toy, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(intentions.main, *paths[:-1], tmp_path / "file" / "x.user.json", *REMOTE)
    assert "cannot be written" in message
