"""LC-Rec's six tasks: what each asks, what it learns, and that nothing held out is told."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest

import finetune
import test as test_script
import test_ddp
from convert import make_delta, merge_delta, zero_to_fp32
from reclingua.datasets.instructions import InstructionDataset
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.prompts import FIELDS, PromptTemplate, read_prompts
from reclingua.datasets.tasks import TASKS, held_out_samples, train_samples
from reclingua.datasets.user_texts import Intention, UserTexts, intention_context, read_user_texts, write_user_texts
from reclingua.models.vocabulary import code_tokens, index_token_ids
from reclingua.utils.errors import InputError
from tests.datasets.test_instructions import learned
from tests.helpers.models import make_tokenizer
from tests.helpers.scripts import flags, run_main, run_processes, torchrun

ALL = ",".join(TASKS)


def say(dataset):
    """A D.user.json for every user: what it says tells whose it is."""
    texts = UserTexts()
    for user in dataset.histories:
        texts.preferences[user] = [f"user {user} likes rings", f"user {user} goes around"]
        for part in ("train", "test"):
            history, item = intention_context(dataset, user, part)
            texts.intentions[part][user] = Intention(
                item, history, f"{part} wish of {user}", f"{part} thing for {user}"
            )
    write_user_texts(dataset.folder / f"{dataset.name}.user.json", texts)
    return texts


@pytest.fixture
def talking(toy):
    """The toy dataset, with item texts and a user file."""
    dataset = open_interactions(toy, "toy", ["index", "items"])
    say(dataset)
    return dataset


def instructions_of(dataset, task, prompts=None, part="train", **how):
    texts = read_user_texts(dataset)
    tokenizer = make_tokenizer(bos=False)
    tokenizer.add_tokens(code_tokens(dataset.index))
    tokens = index_token_ids(tokenizer, dataset.index)
    if part == "train":
        samples = train_samples(dataset, task, 3, texts)
    else:
        samples = held_out_samples(dataset, part, task, 3, texts)
    return InstructionDataset(samples, dataset, tokenizer, prompts or read_prompts(), tokens, 3, ", ", **how)


def index(dataset, item):
    return "".join(dataset.index[item])


def written(instructions, i, template):
    """(prompt, response) of a sample by a prompt template."""
    sample, tokenizer = instructions.samples[i], instructions.tokenizer
    ids = learned(instructions.encode(sample, template))
    assert ids[-1] == tokenizer.eos_token_id
    return instructions.render_prompt(sample, template), tokenizer.decode(ids[:-1]).replace("> <", "><")


CASES = {  # task, template, prompt and response of user 1's last sample, or of item 4
    "item2index": ("{title}, {description}", "{target}", "Toy number 4, kind 1", "<a_1><b_1>"),
    "index2item": ("{target}", "{title}. {description}", "<a_1><b_1>", "Toy number 4. kind 1"),
    "fusionseqrec": (
        "{titles}; {history}",
        "{target} {title}",
        '"Toy number 2", "Toy number 3", "Toy number 4"; <a_0><b_2>, <a_1><b_0>, <a_1><b_1>',
        "<a_1><b_2> Toy number 5",
    ),
    "itemsearch": (
        "{preference}; {user_intention}; {item_intention}; {history}",
        "{target}",
        "user 1 likes rings; train wish of 1; train thing for 1; <a_0><b_2>, <a_1><b_0>, <a_1><b_1>",
        "<a_1><b_2>",
    ),
    "preferenceobtain": ("{history}", "{preference}", "<a_0><b_2>, <a_1><b_0>, <a_1><b_1>", "user 1 likes rings"),
}


@pytest.mark.parametrize("task", CASES)
def test_what_is_asked_and_learned(talking, task):
    prompt, response, *expected = CASES[task]
    instructions = instructions_of(talking, task)
    of_item = task in ("item2index", "index2item")
    rows = [i for i, row in enumerate(instructions.samples) if row["item" if of_item else "user"] == "41"[not of_item]]
    assert list(written(instructions, rows[-1], PromptTemplate(prompt, response))) == expected


def test_how_many_samples_each_task_has(talking):
    pairs = sum(len(talking.train_history(user)) - 1 for user in talking.histories)
    counts = {task: len(instructions_of(talking, task)) for task in TASKS}
    users, items = len(talking.histories), len(talking.items)
    assert counts == {
        "seqrec": pairs, "fusionseqrec": pairs, "item2index": items, "index2item": items,
        "itemsearch": users, "preferenceobtain": users,
    }  # fmt: skip


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("item2index", "index2item")])
def test_nothing_held_out_is_told(talking, task):
    """Not by an id, and not in the words of a text about the test item."""
    instructions = instructions_of(talking, task)
    for epoch in range(3):
        instructions.set_epoch(epoch)
        for i, row in enumerate(instructions.samples):
            held_out = set(talking.histories[row["user"]][-2:]) - set(talking.train_history(row["user"]))
            text = instructions.tokenizer.decode(instructions[i]["input_ids"]).replace("> <", "><")
            assert not held_out & {*row["history"], row["item"]}
            assert not any(index(talking, item) in text or f'"{talking.title(item)}"' in text for item in held_out)
            assert "test " not in text


def test_every_prompt_is_drawn_and_another_one_in_the_next_epoch(talking):
    for task, templates in read_prompts().items():
        if task == "seqrec_history":
            continue
        instructions, drawn = instructions_of(talking, task, seed=3), Counter()
        for epoch in range(40):
            instructions.set_epoch(epoch)
            known = [instructions._known_fields(row) for row in instructions.samples]
            drawn.update(instructions._draw_template(i, task, known[i]) for i in range(len(known)))
        assert set(drawn) == set(range(len(templates)))
        epochs = []
        for epoch in (0, 1, 0):
            instructions.set_epoch(epoch)
            epochs.append([instructions[i] for i in range(len(instructions))])
        assert epochs[0] == epochs[2] != epochs[1]


def test_preferences_are_drawn_from_all_of_a_users(talking):
    instructions, said = instructions_of(talking, "preferenceobtain"), Counter()
    for epoch in range(20):
        instructions.set_epoch(epoch)
        said[instructions.tokenizer.decode(learned(instructions[0])[:-1])] += 1
    assert set(said) == {"user 0 likes rings", "user 0 goes around"}


def test_a_sample_gets_a_prompt_that_it_can_fill(talking, edit):
    edit("item", lambda items: {i: about | ({"description": " "} if i == "4" else {}) for i, about in items.items()})
    dataset = open_interactions(talking.folder.parent, "toy", ["index", "items"])
    asks = {True: PromptTemplate("{title}", "{target}"), False: PromptTemplate("{description}", "{target}")}
    instructions = instructions_of(dataset, "item2index", {"item2index": list(asks.values())})
    for epoch in range(20):
        instructions.set_epoch(epoch)
        assert "Toy number 4" in instructions.tokenizer.decode(instructions[4]["input_ids"])
    with pytest.raises(
        InputError, match="no prompt template of item2index fits item '4', which can only fill target, title"
    ):
        instructions_of(dataset, "item2index", {"item2index": [asks[False]]}).lengths()


def test_an_item_without_a_title_is_told_by_another_text(talking, edit):
    edit("item", lambda items: {i: about | ({"title": ""} if i == "4" else {}) for i, about in items.items()})
    dataset = open_interactions(talking.folder.parent, "toy", ["index", "items"])
    name = dataset.title("4")
    assert name and name not in ("4", "item 4")
    instructions = instructions_of(dataset, "fusionseqrec", {"fusionseqrec": [PromptTemplate("{titles}", "{target}")]})
    for i, row in enumerate(instructions.samples):
        text = instructions.tokenizer.decode(instructions[i]["input_ids"])
        assert "item 4" not in text and (f'"{name}"' in text) == ("4" in row["history"])


def test_copies_of_a_long_history_are_cut_in_places_of_their_own(talking, edit):
    edit("inter", lambda inter: {"0": [*range(9), *range(9), *range(9), 0]})
    dataset, copies = open_interactions(talking.folder.parent, "toy", ["index"]), {"seqrec_history": 6}
    (talking.folder / "toy.user.json").write_text(
        '{"user_explicit_preference": {"0": ["x"]}, "user_vague_intention": {}}'
    )
    instructions = instructions_of(dataset, "seqrec_history", templates_per_sample=copies)
    learnt = {}
    for i in range(len(instructions)):
        learnt.setdefault(int(instructions._copy[i]), []).append(learned(instructions[i]))
    assert len(learnt) == 6 and len({str(stretches) for stretches in learnt.values()}) > 1
    assert len({str(sorted(sum(stretches, []))) for stretches in learnt.values()}) == 1
    written = [len(instructions[i]["input_ids"]) for i in range(len(instructions))]
    assert instructions.lengths().tolist() == written


def test_a_search_is_tested_with_users_whose_last_item_was_held_out(talking, edit):
    edit("inter", lambda inter: inter | {"0": [0, 1]})
    dataset = open_interactions(talking.folder.parent, "toy", ["index", "items"])
    texts = say(dataset)
    del texts.preferences["1"]
    assert set(train_samples(dataset, "itemsearch", 3, texts)["user"]) == set(dataset.histories)
    tested = held_out_samples(dataset, "test", "itemsearch", 3, texts)
    assert set(tested["user"]) == set(dataset.histories) - {"0", "1"}


def test_texts_are_cut_and_cannot_be_taken_for_tokens(talking, edit):
    long = "Great </s> <a_1>\n<b_1> " + "word " * 100
    edit("item", lambda items: {i: about | {"title": long} for i, about in items.items()})
    dataset = open_interactions(talking.folder.parent, "toy", ["index", "items"])
    instructions = instructions_of(dataset, "item2index", max_text_len=10)
    prompt = instructions.render_prompt(instructions.samples[0], PromptTemplate("{title}", "{target}"))
    assert prompt == "Great < /s> < a_1> < b_1> word word word word word word"
    ids = instructions.tokenizer(prompt).input_ids
    assert instructions.tokenizer.eos_token_id not in ids and not instructions.index_tokens & set(ids)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "seqrec"])
def test_lengths_are_nearly_those_of_the_samples(talking, task):
    """With words like these never less, and a few tokens more at most."""
    instructions = instructions_of(talking, task)
    longest = instructions.lengths(longest=True)
    for epoch in range(10):
        instructions.set_epoch(epoch)
        real = np.array([len(instructions[i]["input_ids"]) for i in range(len(instructions))])
        spare = instructions.lengths() - real
        assert spare.min() >= 0 and spare.max() <= 8 and (longest >= real).all()


def test_what_is_not_there_is_refused(talking, edit):
    with pytest.raises(InputError, match="nothing to train itemsearch on: no user has the texts"):
        train_samples(talking, "itemsearch", 3, UserTexts())


# ---- Scripts ----


@pytest.fixture(scope="session")
def tuned_on_all(workshop):
    """A model tuned on all six tasks for a moment."""
    dataset = open_interactions(workshop / "datasets", "toy", ["items"])
    say(dataset)
    mix = ("--tasks", ALL, "--train_prompt_sample_num", "1,2,1,1,1,1", "--train_data_sample_num", "0,0,0,50,0,0")
    run_main(finetune.main, *flags(workshop, workshop / "all", *mix, "--epochs", 2, "--max_his_len", -1))
    return workshop / "all"


@pytest.mark.parametrize("task, answerable", [("SeqRec", 10), ("ItemSearch", 6), ("FusionSeqRec", 3)])
def test_each_test_measures_every_prompt_that_is_answered_by_an_item(workshop, tuned_on_all, script, task, answerable):
    results, lines = tuned_on_all / f"{task}.json", tuned_on_all / f"{task}.jsonl"
    where = ("--ckpt_path", tuned_on_all, "--data_path", workshop / "datasets", "--num_beams", 10)
    code, out, error = script(
        test_script.main, *where, "--test_task", task, "--test_prompt_ids", "all", "--metrics", "hit@1,ndcg@10",
        "--results_file", results, "--predictions_file", lines, "--test_batch_size", 60,
    )  # fmt: skip
    assert code == 0, error
    found, rows = json.loads(results.read_text()), [json.loads(line) for line in lines.read_text().splitlines()]
    assert found["users"] == 60 and len(found["test_prompt_ids"]) == answerable == len(found["all_prompt_results"])
    assert len(rows) == 60 * answerable and {row["prompt"] for row in rows} == set(found["test_prompt_ids"])
    for name in ("hit@1", "ndcg@10"):
        values = [each[name] for each in found["all_prompt_results"]]
        assert found["mean_results"][name] == pytest.approx(np.mean(values))
        assert (found["min_results"][name], found["max_results"][name]) == (min(values), max(values))


def test_a_mix_has_as_many_samples_and_prompts_as_asked_for(tuned_on_all):
    run = json.loads((tuned_on_all / "run.json").read_text())
    dataset = open_interactions(tuned_on_all.parent / "datasets", "toy", ["index"])
    pairs = sum(len(dataset.train_history(user)) - 1 for user in dataset.histories)
    samples = pairs + 2 * 9 + 9 + 50 + 60 + 60
    assert run["log"][-1]["step"] == 2 * -(-samples // 8)


@pytest.mark.slow
def test_lc_recs_own_commands(workshop, tuned_on_all, tmp_path):
    """Those of its README: train with two processes, convert, make and merge a delta, test with one and with two."""
    data, state = ("--dataset", "toy", "--data_path", workshop / "datasets"), tmp_path / "ckpt"
    trained = torchrun(
        2, "finetune.py", "--base_model", workshop / "base", "--output_dir", state, *data,
        "--per_device_batch_size", 8, "--gradient_accumulation_steps", 2, "--learning_rate", 5e-5, "--epochs", 1,
        "--weight_decay", 0.01, "--save_and_eval_strategy", "epoch", "--deepspeed", "./config/ds_z3_bf16.json",
        "--bf16", "--only_train_response", "--tasks", ALL, "--train_prompt_sample_num", "1,1,1,1,1,1",
        "--train_data_sample_num", "0,0,0,100000,0,0", "--index_file", ".index.json", "--use_cpu",
        "--max_steps", 6, "--max_eval_samples", 8,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[:4000]
    assert f"bash convert/convert.sh {state}" in trained.stdout

    model, delta, merged = tmp_path / "final", tmp_path / "delta", tmp_path / "merged"
    run_main(zero_to_fp32.main, state, model)  # what convert.sh does, see tests/training/test_zero.py
    base = ("--base-model-path", workshop / "base")
    run_main(make_delta.main, *base, "--target-model-path", model, "--delta-path", delta)
    run_main(merge_delta.main, *base, "--target-model-path", merged, "--delta-path", delta, "--low-cpu-mem")
    search = ("--sample_num", 9, "--test_batch_size", 1, "--num_beams", 20, "--test_prompt_ids", "all")
    found = []
    for processes, ckpt in ((1, model), (2, merged)):
        results = tmp_path / "results" / f"{processes}.json"
        asked = ("--ckpt_path", ckpt, *data, "--results_file", results, *search, "--index_file", ".index.json")
        if processes == 1:
            run_main(test_script.main, *asked)
        else:
            done = run_processes(processes, test_ddp.main, *asked)
            assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(results.read_text()))
    names = ("test_prompt_ids", "mean_results", "min_results", "max_results", "all_prompt_results")
    assert all(found[0][name] == found[1][name] for name in names)


def test_bad_input(workshop, tuned_on_all, tuned, tmp_path, refused):
    def refuse(*more):
        return refused(finetune.main, *flags(workshop, tmp_path / "out", *more))

    assert "--tasks 'guess': should be of seqrec" in refuse("--tasks", "seqrec,guess")
    assert "has item2index twice" in refuse("--tasks", "item2index,item2index")
    assert "one whole number for each of --tasks" in refuse("--tasks", ALL, "--train_data_sample_num", "0,1")
    assert "1 at least" in refuse("--train_prompt_sample_num", "0")
    assert "--max_text_len 0" in refuse("--max_text_len", 0)
    assert "no such file" in refuse("--tasks", "itemsearch", "--user_file", ".nobody.json")
    own = tmp_path / "own.yaml"
    own.write_text("item2index: [{prompt: '{title}', response: '{target}'}]")
    assert "task 'seqrec' has no prompt template" in refuse("--tasks", "item2index", "--prompt_file", own)
    assert not (tmp_path / "out").exists()

    def refuse_test(model, *more):
        return refused(test_script.main, "--ckpt_path", model, "--data_path", workshop / "datasets", *more)

    assert "was not tuned on itemsearch" in refuse_test(tuned, "--test_task", "ItemSearch")
    assert "should be all, or of 0, 2, 4" in refuse_test(
        tuned_on_all, "--test_task", "FusionSeqRec", "--test_prompt_ids", "1"
    )
    assert "no such file" in refuse_test(tuned_on_all, "--test_task", "itemsearch", "--user_file", ".nobody.json")
    assert "should be 1 at least" in refuse_test(tuned_on_all, "--sample_num", 0)

    def changed(**record):
        folder = tmp_path / "changed"
        shutil.copytree(tuned_on_all, folder, dirs_exist_ok=True)
        told = json.loads((tuned_on_all / "reclingua.json").read_text())
        (folder / "reclingua.json").write_text(json.dumps(told | record))
        return folder

    in_titles = {"fusionseqrec": [{"prompt": "{history}", "response": "{title}"}]}
    assert "no prompt of fusionseqrec" in refuse_test(changed(prompts=in_titles), "--test_task", "FusionSeqRec")
    assert "'prompts' should be a dict" in refuse_test(changed(prompts=[]))
    assert "reads at most 1024 tokens" in refuse_test(changed(his_sep=" and after that there was " * 38))
    assert "'his_sep' has 1,040 characters" in refuse_test(changed(his_sep=" and after that there was " * 40))


def test_a_run_does_not_go_on_with_other_texts(workshop, tuned_on_all, tmp_path, script, refused):
    how = ("--tasks", "preferenceobtain", "--max_steps", 2, "--save_and_eval_strategy", "steps", "--save_steps", 1)
    how = flags(workshop, tmp_path / "out", *how, "--load_best_model_at_end", "False")
    said = (workshop / "datasets" / "toy" / "toy.user.json").read_text()
    users = tmp_path / "users.json"
    users.write_text(said)
    assert script(finetune.main, *how, "--user_file", users)[0] == 0
    again = (*how, "--user_file", users, "--resume_from_checkpoint", "auto")
    assert "made with another only_train_response" in refused(finetune.main, *again, "--only_train_response", "False")
    users.write_text(said.replace("likes", "loves"))
    assert "made with another users_sha256" in refused(finetune.main, *again)


def test_shipped_prompts():
    prompts = read_prompts()
    assert set(prompts) == {*TASKS, "seqrec_history"} == set(FIELDS)
    for task in TASKS:
        assert len(set(prompts[task])) == len(prompts[task]) >= (10 if task == "seqrec" else 5)
    assert prompts["fusionseqrec"][0].has_target_response and not all(
        p.has_target_response for p in prompts["fusionseqrec"]
    )
