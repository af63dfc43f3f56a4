"""Local chat model: answers do not depend on the batch; an endpoint whose response never ends."""

import time

import pytest
import torch
from transformers import AutoTokenizer

from data import chat, intentions
from data.chat import Endpoint, LocalChat, Question, Sampling
from reclingua.datasets.interactions import open_interactions
from reclingua.utils.errors import InputError
from tests.helpers.chat_server import Handler, answer_from_prompt, run_server
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


def collect_answers(model, questions):
    answers = {}
    model.ask(questions, lambda index, answer: answers.update({questions[index]: answer}))
    return answers


def test_an_answer_does_not_depend_on_its_batch(tiny):
    questions = [Question("A user had these items. " * (1 + i % 3) + str(i), attempt=i % 2) for i in range(9)]
    sampling = Sampling(max_new_tokens=12)
    together = collect_answers(LocalChat(tiny, sampling, batch_size=4), questions)
    assert together == collect_answers(LocalChat(tiny, sampling, batch_size=1), questions[::-1])
    assert len(together) == 9 and len({answer.text for answer in together.values()}) > 5


def test_only_seed_and_attempt_change_a_sampled_answer(tiny):
    model = LocalChat(tiny, Sampling(max_new_tokens=12))
    questions = [Question("A user had these items.", attempt) for attempt in range(3)]
    first = collect_answers(model, questions)
    torch.manual_seed(7)
    assert first == collect_answers(model, questions) and len({answer.text for answer in first.values()}) == 3
    model.sampling = Sampling(max_new_tokens=12, seed=1)
    other = collect_answers(model, questions)
    assert other[questions[0]] == first[questions[0]] and other[questions[1]] != first[questions[1]]


def test_answers_are_marked_as_complete_or_cut_off(tiny):
    model = LocalChat(tiny, Sampling(max_new_tokens=6))
    question = Question("A user had these items.")
    assert not collect_answers(model, [question])[question].is_complete
    prompt = torch.tensor([model._encode(question.prompt)])
    model.model.generation_config.eos_token_id = [
        2, model.model.generate(prompt, attention_mask=prompt * 0 + 1, max_new_tokens=6, do_sample=False)[0, -2].item()
    ]  # fmt: skip
    assert collect_answers(model, [question])[question].is_complete


def test_samples_follow_the_probabilities_of_the_model():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    scores = probabilities.log().repeat(4000, 1)
    sampler = chat._GumbelSampler([(1.0, seed) for seed in range(4000)])
    samples = sampler(torch.zeros(4000, 1, dtype=torch.long), scores).argmax(dim=1)
    shares = torch.bincount(samples, minlength=4) / 4000
    # The least likely token is outside the nucleus of 0.9.
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03) and shares[3] == 0
    scores = probabilities.log().repeat(2, 1)
    greedy = chat._GumbelSampler([(0.0, 1), (0.0, 2)])
    assert torch.equal(greedy(torch.zeros(2, 1, dtype=torch.long), scores.clone()), scores)


def test_slow_response_times_out():
    class SlowHandler(Handler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            while not self.server.released.wait(0.05):
                self.wfile.write(b" ")

    with run_server(answer_from_prompt) as server:
        server.RequestHandlerClass = SlowHandler
        started = time.monotonic()
        with pytest.raises(InputError, match="no response within 0.3 seconds"):
            Endpoint(server.url, "m", Sampling(), timeout=0.3, retries=0).ask([Question("x")], print)
        assert time.monotonic() - started < 3


def test_long_texts_and_histories_are_truncated_to_the_context(toy, edit, tiny):
    edit("item", lambda item: {i: {"title": f"Toy {i} " * 50, "description": "x" * 5000} for i in item})
    dataset = open_interactions(toy, "toy", ["items"])
    prompts = intentions.read_prompts(intentions.LCREC_PROMPT_FILE, intentions.FIELDS)
    planner = intentions.Planner(dataset, prompts, LocalChat(tiny, Sampling()), 20)
    requests = [request for section in planner.plan(["0", "1"]).values() for request in section]
    assert all(len(planner.chat._encode(request.prompt)) + 64 <= 512 for request in requests)
    assert 0 < planner.num_truncated <= len(requests)
    planner.chat.context_length = 80
    with pytest.raises(InputError, match="'general' exceeds the model's context"):
        planner.plan(["0"])


def test_invalid_responses_are_handled(script, toy, tiny, tmp_path):
    paths = ("--dataset", "toy", "--data_path", toy, "--output", tmp_path / "toy.user.json")
    code, out, error = script(intentions.main, *paths, "--model", tiny, "--users", 2, "--max_his_len", 3)
    assert code in (0, 2) and "Traceback" not in error
    assert " texts for 2 users" in out
    assert code == 0 or "no answer of" in error


def test_a_model_without_a_chat_template_is_rejected(workshop):
    with pytest.raises(InputError, match="has no chat template"):
        LocalChat(workshop / "base", Sampling())


def test_a_chat_template_that_fails_is_rejected(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="chat template accepts no user message"):
        LocalChat(tmp_path, Sampling())
