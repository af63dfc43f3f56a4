"""Write what users prefer and what they were looking for, by a chat model, as D.user.json.

python -m data.intentions --dataset ml-100k                # SmolLM2 on this machine, see python -m convert.smollm2
python -m data.intentions --dataset ml-100k --users 100 --model Qwen/Qwen3-4B-Instruct-2507
python -m data.intentions --dataset ml-100k --endpoint https://api.openai.com/v1 --model gpt-4o-mini   # OPENAI_API_KEY

The training intention is about the last training item, preferences about what came before it: nothing that a model is
to find is told. Each answer is kept in a journal beside the output, so that the command, given again, goes on where it
stopped.
"""

import argparse
import os
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from data.chat import Answer, Endpoint, LocalChat, Question, Sampling
from data.chat_answers import Request, ResponseCache, clean_answer, rejection_reason, to_single_line
from reclingua.datasets.interactions import RecDataset, open_dataset
from reclingua.datasets.prompts import PROMPTS, Fields, PromptTemplate, read_prompts
from reclingua.datasets.user_texts import PARTS, Intention, UserTexts, intention_context, write_users
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import output_file, read_json, write_json
from reclingua.utils.metadata import run_metadata

LCREC_PROMPT_FILE = PROMPTS / "intentions.yaml"
LOCAL_MODEL = "ckpt/base/SmolLM2-135M-Instruct"
PREFERENCES, INTENTIONS = ("general", "lasting", "recent"), ("of_user", "of_item")
FIELDS = {task: Fields([{"history", "recent"}]) for task in PREFERENCES}
FIELDS |= {task: Fields([{"item"}]) for task in INTENTIONS}
RECENT = 4  # items
LINE, ITEM = 120, 600  # characters of an item in a history, and of the item that an intention is about
OF_ANSWERS = ("model", "max_his_len", "attempts", "max_new_tokens", "temperature", "seed")  # flags they depend on
QUIET = 30  # seconds between two lines of progress where there is no terminal

Plan = dict[tuple[str, str], list[Request]]  # ("preferences", "train" or "test"; user) -> what is asked


class Planner:
    """Turns users into requests; texts that are too long for the model are cut.

    An item of a history is given by 120 characters of its text, that of an intention by 600, a history by its newest
    `max_his_len` items; all three are halved, at most five times, until the prompt fits. `cut` counts these prompts.
    """

    def __init__(
        self,
        dataset: RecDataset,
        prompts: dict[str, list[PromptTemplate]],
        chat: LocalChat | Endpoint,
        max_his_len: int,
    ):
        self.dataset, self.prompts, self.chat, self.max_his_len = dataset, prompts, chat, max_his_len
        self.cut = 0

    def plan(self, users: list[str]) -> Plan:
        """What to ask about these users.

        A user who had nothing before the last training item has no preferences, one who is too short to be tested no
        intention of "test".
        """
        plan: Plan = {}
        for number, user in enumerate(users):
            if history := intention_context(self.dataset, user, "train")[0]:
                plan["preferences", user] = [self._request(task, number, history) for task in PREFERENCES]
            for part in PARTS if len(self.dataset.histories[user]) >= 3 else PARTS[:1]:
                item = intention_context(self.dataset, user, part)[1]
                plan[part, user] = [self._request(task, number, item=item) for task in INTENTIONS]
        return plan

    def _request(self, task: str, number: int, history: list[str] = (), item: str | None = None) -> Request:
        """Exactly one of `history` and `item` is what a task is about: no prompt holds more than that."""
        template = self.prompts[task][number % len(self.prompts[task])].prompt
        title = to_single_line(self.dataset.title(item)) if item is not None else ""
        for halvings in range(6):
            lines = [
                f"- {self._text(each, LINE >> halvings)}" for each in history[-max(1, self.max_his_len >> halvings) :]
            ]
            prompt = template.format(
                history="\n".join(lines),
                recent="\n".join(lines[-RECENT:]),
                item=self._text(item, ITEM >> halvings) if item is not None else "",
            )
            if self.chat.fits(prompt):
                self.cut += halvings > 0
                return Request(prompt, template, title)
        raise InputError(f"the phrasing of {task!r} leaves no room in the model's context; shorten it")

    def _text(self, item: str, characters: int) -> str:
        return to_single_line(self.dataset.text(item))[:characters]


def ask_all(chat: LocalChat | Endpoint, requests: list[Request], journal: ResponseCache, attempts: int) -> None:
    """Ask until each request has a text or `attempts` answers to it were refused; every answer goes to the journal.

    Raises:
        InputError: the model cannot be asked; the message says what is kept.
    """
    done = sum(journal.is_done(request, attempts) for request in requests)
    bar = tqdm(total=len(requests), initial=done, desc="ask", unit="text", disable=None)
    said, waiting = time.monotonic(), []

    def keep(at: int, answer: Answer) -> None:
        nonlocal done, said
        request = waiting[at]
        text = clean_answer(answer.text, answer.complete)
        journal.add(request, text, rejection_reason(text, request))
        if journal.is_done(request, attempts):
            done += 1
            bar.update()
        if bar.disable and time.monotonic() - said > QUIET:
            said = time.monotonic()
            print(f"{done:,} of {len(requests):,} texts", flush=True)

    try:
        while waiting := [request for request in requests if not journal.is_done(request, attempts)]:
            chat.ask([Question(request.prompt, journal.refused[request.key]) for request in waiting], keep)
    except InputError as error:
        kept = f"{len(journal):,} answers are kept in {journal.path}: give the command again to go on"
        raise InputError(f"{error}; {kept}" if len(journal) else str(error)) from None
    finally:
        bar.close()


def collect(dataset: RecDataset, plan: Plan, texts: dict[str, str]) -> tuple[UserTexts, Counter[str]]:
    """(the texts of all users, how many users each section had to leave out).

    A user has the preferences that there is a text for, and an intention if there are both of its texts.
    """
    found, left_out = UserTexts(), Counter()
    for (section, user), requests in plan.items():
        given = [texts[request.key] for request in requests if request.key in texts]
        if section == "preferences" and given:
            found.preferences[user] = given
        elif section != "preferences" and len(given) == len(requests):
            history, item = intention_context(dataset, user, section)
            found.intentions[section][user] = Intention(item, history, *given)
        else:
            left_out[section] += 1
    return found, left_out


@cli_main
def main() -> None:
    args = parse_args()
    started = time.monotonic()
    disable_progress_bar()  # of loading weights; asking shows its own

    # ---- Data and prompts; nothing to do? ----
    dataset = open_dataset(args.data_path, args.dataset, needs=["items"])
    prompts = read_prompts(args.prompt_file, FIELDS)
    users = list(dataset.histories)[: args.users]
    output = args.output or dataset.folder / f"{dataset.name}.user.json"
    output_file(output)
    facts, journal_path = output.with_suffix(".run.json"), output.with_suffix(".journal.jsonl")
    made_with = {
        "histories": dataset.sha256("histories"),
        "items": dataset.sha256("items"),
        "prompts": sha256(repr(prompts).encode()).hexdigest(),
        **{flag: getattr(args, flag) for flag in OF_ANSWERS},
    }
    if made_already(output, facts, {**made_with, "users": len(users)}):
        print(f"{output} is there, made with these settings: nothing to do")
        return

    # ---- Ask ----
    chat = chat_of(args, Sampling(args.max_new_tokens, args.temperature, args.seed))
    planner = Planner(dataset, prompts, chat, args.max_his_len)
    plan = planner.plan(users)
    requests = list({request.key: request for asked in plan.values() for request in asked}.values())
    print(
        f"{len(requests):,} texts for {len(users):,} users; {planner.cut:,} prompts cut to fit the model", flush=True
    )
    with ResponseCache(journal_path, made_with) as journal:
        if len(journal):
            print(f"{len(journal):,} answers from {journal_path}")
        ask_all(chat, requests, journal, args.attempts)
    texts, left_out = collect(dataset, plan, journal.texts)
    if not texts.preferences and not any(texts.intentions.values()):
        raise InputError(f"no answer of {args.model} was of use ({counted(journal.faults)}); take another --model")

    # ---- Write ----
    counts = {"preferences": len(texts.preferences)} | {part: len(texts.intentions[part]) for part in PARTS}
    faults = dict(journal.faults.most_common())
    write_json(
        facts,
        {
            "made_with": {**made_with, "users": len(users)},
            "users_with": counts,
            "users_without": dict(left_out),
            "answers": len(journal),
            "answers_refused": faults,
            **run_metadata(vars(args), started),
        },
        indent=1,
    )
    write_users(output, texts)
    journal_path.unlink()

    print(f"{len(journal):,} answers, {sum(faults.values()):,} of them refused ({counted(journal.faults)})")
    for section, count in counts.items():
        name = section if section == "preferences" else f"intentions of {section}"
        print(f"{name}: {count:,} users, {left_out[section]:,} left out for want of a good answer")
    print_examples(dataset, texts)
    print(f"\n-> {output}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="holds <dataset>/ (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="default: <data_path>/<dataset>/<dataset>.user.json")
    parser.add_argument("--users", type=int, help="the first so many users (default: all)")
    parser.add_argument(
        "--prompt_file", type=Path, default=LCREC_PROMPT_FILE, help="the prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--max_his_len", type=int, default=20, help="newest items of a history told (default: %(default)s)"
    )
    parser.add_argument(
        "--model", help=f"folder or hub name of a chat model (default: {LOCAL_MODEL}), or its name at the endpoint"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of an answer (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0,
        help="of sampling; 0: the likeliest answer, and 0.7 where it is refused (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="of sampling (default: %(default)s)")
    parser.add_argument(
        "--attempts",
        type=int,
        default=3,
        help="times that a text is asked for until one is good (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=int, help="questions a batch, of a model that runs here (default: 16)")
    parser.add_argument("--endpoint", help="an OpenAI-compatible server, such as http://localhost:8000/v1")
    parser.add_argument("--api_key_env", help="environment variable that holds its key (default: OPENAI_API_KEY)")
    parser.add_argument("--concurrency", type=int, help="requests under way at a time (default: 8)")
    parser.add_argument("--requests_per_minute", type=float, help="begin no more than so many (default: no limit)")
    parser.add_argument("--timeout", type=float, help="seconds for a reply (default: 60)")
    parser.add_argument("--retries", type=int, help="times that a failed request is sent again (default: 6)")
    args = one_line_errors(parser).parse_args()

    local, remote = ("batch_size",), ("api_key_env", "concurrency", "requests_per_minute", "timeout", "retries")
    for flag in local if args.endpoint else remote:
        if getattr(args, flag) is not None:
            raise InputError(
                f"--{flag} means nothing {'with' if args.endpoint else 'without'} --endpoint; leave it out"
            )
    if args.endpoint and not args.model:
        raise InputError("--endpoint needs the --model that is to answer there")
    for flag in ("users", "max_his_len", "max_new_tokens", "attempts", "batch_size", "concurrency"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: should be 1 at least")
    for flag in ("requests_per_minute", "timeout"):
        if getattr(args, flag) is not None and not 0 < getattr(args, flag) < float("inf"):
            raise InputError(f"--{flag} {getattr(args, flag)}: should be above 0")
    if not 0 <= args.temperature <= 2 or (args.retries or 0) < 0:
        raise InputError("--temperature should be between 0 and 2, --retries 0 at least")
    args.model = args.model or LOCAL_MODEL
    return args


def chat_of(args: argparse.Namespace, sampling: Sampling) -> LocalChat | Endpoint:
    if not args.endpoint:
        if args.model == LOCAL_MODEL and not Path(LOCAL_MODEL).is_dir():
            raise InputError(f"no {LOCAL_MODEL}: python -m convert.smollm2 --output_dir {LOCAL_MODEL} makes it")
        return LocalChat(args.model, sampling, args.batch_size or 16)
    key = os.environ.get(args.api_key_env or "OPENAI_API_KEY")
    if args.api_key_env and not key:
        # Its value is not shown: who took the flag for that of the key would find it in a log.
        raise InputError("--api_key_env: there is no such environment variable; it should hold the key")
    given = {flag: getattr(args, flag) for flag in ("concurrency", "requests_per_minute", "timeout", "retries")}
    given = {flag: value for flag, value in given.items() if value is not None}
    return Endpoint(args.endpoint, args.model, sampling, key, **given)


def made_already(output: Path, facts: Path, made_with: dict) -> bool:
    """Whether `output` is complete; InputError if it is there but made in another way."""
    if not output.exists():
        return False
    if facts.exists() and read_json(facts, "how a user file was made").get("made_with") == made_with:
        return True
    raise InputError(
        f"{output}: is there, but was not made with these settings; move it away, or name another --output"
    )


def counted(faults: Counter[str]) -> str:
    return ", ".join(f"{number:,} {why}" for why, number in faults.most_common()) or "none"


def print_examples(dataset: RecDataset, texts: UserTexts) -> None:
    """A preference, and both texts of an intention, of the first user who has them."""
    for user, (preference, *_) in list(texts.preferences.items())[:1]:
        print(f"\nuser {user} prefers: {preference}")
    part = "test" if texts.intentions["test"] else "train"
    for user, found in list(texts.intentions[part].items())[:1]:
        print(f"user {user} was looking for: {found.of_user}")
        print(f"which was: {found.of_item}\nnamely {dataset.title(found.item)}")


if __name__ == "__main__":
    main()
