"""A chat model that runs here: answers that depend on the question alone; an endpoint that never ends its reply."""

import time

import pytest
import torch
from transformers import AutoTokenizer

from data import chat, intentions
from data.chat import Endpoint, LocalChat, Question, Sampling
from reclingua.datasets.interactions import open_dataset
from reclingua.utils.errors import InputError
from tests.helpers.chat_server import Handler, serving, wise
from tests.helpers.models import make_model, make_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A chat model with random weights and a context of 512 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}Response:"
    tokenizer.save_pretrained(folder)
    make_model("llama", len(tokenizer), spread=4).save_pretrained(folder)
    return folder


def answers_of(model, questions):
    found = {}
    model.ask(questions, lambda at, answer: found.update({questions[at]: answer}))
    return found


def test_an_answer_does_not_depend_on_what_shares_its_batch(tiny):
    questions = [Question("A user had these items. " * (1 + i % 3) + str(i), attempt=i % 2) for i in range(9)]
    sampling = Sampling(max_new_tokens=12)
    together = answers_of(LocalChat(tiny, sampling, batch_size=4), questions)
    assert together == answers_of(LocalChat(tiny, sampling, batch_size=1), questions[::-1])
    assert len(together) == 9 and len({answer.text for answer in together.values()}) > 5


def test_seeds_and_attempts_change_the_draw_and_nothing_else_does(tiny):
    model = LocalChat(tiny, Sampling(max_new_tokens=12))
    questions = [Question("A user had these items.", attempt) for attempt in range(3)]
    first = answers_of(model, questions)
    torch.manual_seed(7)
    assert first == answers_of(model, questions) and len({answer.text for answer in first.values()}) == 3
    model.sampling = Sampling(max_new_tokens=12, seed=1)
    other = answers_of(model, questions)
    assert other[questions[0]] == first[questions[0]] and other[questions[1]] != first[questions[1]]


def test_whether_an_answer_is_complete_is_known(tiny):
    model = LocalChat(tiny, Sampling(max_new_tokens=6))
    question = Question("A user had these items.")
    assert not answers_of(model, [question])[question].complete
    prompt = torch.tensor([model._encode(question.prompt)])
    model.model.generation_config.eos_token_id = [
        2, model.model.generate(prompt, attention_mask=prompt * 0 + 1, max_new_tokens=6, do_sample=False)[0, -2].item()
    ]  # fmt: skip
    assert answers_of(model, [question])[question].complete


def test_draws_follow_the_models_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    scores = probabilities.log().repeat(4000, 1)
    drawn = chat._Draw([(1.0, seed) for seed in range(4000)])(torch.zeros(4000, 1, dtype=torch.long), scores)
    shares = torch.bincount(drawn.argmax(dim=1), minlength=4) / 4000
    # The least likely is beyond nine tenths.
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03) and shares[3] == 0
    scores = probabilities.log().repeat(2, 1)
    assert torch.equal(chat._Draw([(0.0, 1), (0.0, 2)])(torch.zeros(2, 1, dtype=torch.long), scores.clone()), scores)


def test_a_reply_that_drips_is_given_up():
    class Drips(Handler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            while not self.server.released.wait(0.05):
                self.wfile.write(b" ")

    with serving(wise) as server:
        server.RequestHandlerClass = Drips
        begun = time.monotonic()
        with pytest.raises(InputError, match="no reply within 0.3 seconds"):
            Endpoint(server.url, "m", Sampling(), timeout=0.3, retries=0).ask([Question("x")], print)
        assert time.monotonic() - begun < 3


def test_long_texts_and_histories_are_cut_to_the_models_context(toy, edit, tiny):
    edit("item", lambda item: {i: {"title": f"Toy {i} " * 50, "description": "x" * 5000} for i in item})
    dataset = open_dataset(toy, "toy", ["items"])
    prompts = intentions.read_prompts(intentions.LCREC_PROMPT_FILE, intentions.FIELDS)
    planner = intentions.Planner(dataset, prompts, LocalChat(tiny, Sampling()), 20)
    requests = [request for asked in planner.plan(["0", "1"]).values() for request in asked]
    assert all(len(planner.chat._encode(request.prompt)) + 64 <= 512 for request in requests)
    assert 0 < planner.cut <= len(requests)
    planner.chat.context = 80
    with pytest.raises(InputError, match="the phrasing of 'general' leaves no room"):
        planner.plan(["0"])


def test_a_model_that_talks_nonsense_is_survived(script, toy, tiny, tmp_path):
    where = ("--dataset", "toy", "--data_path", toy, "--output", tmp_path / "toy.user.json")
    code, out, error = script(intentions.main, *where, "--model", tiny, "--users", 2, "--max_his_len", 3)
    assert code in (0, 2) and "Traceback" not in error
    assert " texts for 2 users" in out
    assert code == 0 or "no answer of" in error


def test_a_model_without_a_chat_template_is_refused(workshop):
    with pytest.raises(InputError, match="has no chat template"):
        LocalChat(workshop / "base", Sampling())


def test_a_template_that_fails_is_refused(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its chat template takes no message of a user"):
        LocalChat(tmp_path, Sampling())
