"""Generate user texts, preferences and intentions, with a chat model, and write them as D.user.json.

python -m data.intentions --dataset ml-100k                # SmolLM2 on this machine, see python -m convert.smollm2
python -m data.intentions --dataset ml-100k --users 100 --model Qwen/Qwen3-4B-Instruct-2507
python -m data.intentions --dataset ml-100k --endpoint https://api.openai.com/v1 --model gpt-4o-mini   # OPENAI_API_KEY

The training intention describes the last training item; preferences are derived from the items before it, so that no
prompt contains a held-out item of its section. Answers are written to a journal beside the output: after an
interruption, the same command resumes. With --endpoint the server gets histories and item texts of the users, without
ids; see docs/user-texts.md.
"""

import argparse
import os
import sys
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from data.chat import Answer, Endpoint, LocalChat, Question, Sampling
from data.chat_answers import Request, ResponseCache, clean_answer, rejection_reason, to_single_line
from reclingua.datasets.interactions import InteractionDataset, open_interactions
from reclingua.datasets.prompts import PROMPTS, Fields, PromptTemplate, read_prompts
from reclingua.datasets.user_texts import PARTS, Intention, UserTexts, intention_context, write_user_texts
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import check_outputs, output_file, read_json, write_json
from reclingua.utils.hub import TRUST_HELP, trust_remote_code
from reclingua.utils.metadata import run_metadata

LCREC_PROMPT_FILE = PROMPTS / "intentions.yaml"
LOCAL_MODEL = "ckpt/base/SmolLM2-135M-Instruct"
PREFERENCES, INTENTIONS = ("general", "lasting", "recent"), ("of_user", "of_item")
FIELDS = {task: Fields([{"history", "recent"}]) for task in PREFERENCES}
FIELDS |= {task: Fields([{"item"}]) for task in INTENTIONS}
NUM_RECENT = 4  # items
HISTORY_ITEM_LENGTH, ITEM_LENGTH = 120, 600  # characters of an item in a history, and of the item of an intention
ANSWER_FLAGS = ("model", "max_his_len", "attempts", "max_new_tokens", "temperature", "seed")  # change the answers
PROGRESS_INTERVAL = 30  # seconds between two lines of progress without a terminal

Plan = dict[tuple[str, str], list[Request]]  # ("preferences", "train" or "test"; user) -> requests


class Planner:
    """Builder of requests from users, with texts truncated to the context of the model.

    An item of a history has at most 120 characters, the item of an intention 600, a history its latest `max_his_len`
    items; all three limits are halved, at most five times, until the prompt fits. `num_truncated` counts these
    prompts.
    """

    def __init__(
        self,
        dataset: InteractionDataset,
        prompts: dict[str, list[PromptTemplate]],
        chat: LocalChat | Endpoint,
        max_his_len: int,
    ):
        self.dataset, self.prompts, self.chat, self.max_his_len = dataset, prompts, chat, max_his_len
        self.num_truncated = 0

    def plan(self, users: list[str]) -> Plan:
        """Return the requests for users.

        Users without items before the last training item get no preferences; users with fewer than three items have
        no test item and get no test intention.
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
        """Build the request of a task from `history` or from `item`, never both: prompts contain nothing else."""
        template = self.prompts[task][number % len(self.prompts[task])].prompt
        title = to_single_line(self.dataset.title(item)) if item is not None else ""
        for halvings in range(6):
            latest = history[-max(1, self.max_his_len >> halvings) :]
            lines = [f"- {self._text(item_id, HISTORY_ITEM_LENGTH >> halvings)}" for item_id in latest]
            prompt = template.format(
                history="\n".join(lines),
                recent="\n".join(lines[-NUM_RECENT:]),
                item=self._text(item, ITEM_LENGTH >> halvings) if item is not None else "",
            )
            if self.chat.fits(prompt):
                self.num_truncated += halvings > 0
                return Request(prompt, template, title)
        raise InputError(f"the prompt of task {task!r} exceeds the model's context; shorten it in --prompt_file")

    def _text(self, item: str, max_length: int) -> str:
        return to_single_line(self.dataset.text(item))[:max_length]


def ask_all(chat: LocalChat | Endpoint, requests: list[Request], journal: ResponseCache, attempts: int) -> None:
    """Ask until each request has an accepted text or `attempts` rejected ones; every answer goes to the journal.

    Raises:
        InputError: the model cannot be asked; the message states how many answers the journal has.
    """
    num_done = sum(journal.is_done(request, attempts) for request in requests)
    bar = tqdm(total=len(requests), initial=num_done, desc="ask", unit="text", disable=None)
    last_print = time.monotonic()
    pending: list[Request] = []

    def on_answer(index: int, answer: Answer) -> None:
        nonlocal num_done, last_print
        request = pending[index]
        text = clean_answer(answer.text, answer.is_complete)
        journal.add(request, text, rejection_reason(text, request))
        if journal.is_done(request, attempts):
            num_done += 1
            bar.update()
        if bar.disable and time.monotonic() - last_print > PROGRESS_INTERVAL:
            last_print = time.monotonic()
            print(f"{num_done:,} of {len(requests):,} texts", flush=True)

    try:
        while pending := [request for request in requests if not journal.is_done(request, attempts)]:
            questions = [Question(request.prompt, journal.num_rejected[request.key]) for request in pending]
            chat.ask(questions, on_answer)
    except InputError as error:
        advice = f"{len(journal):,} answers are saved in {journal.path}: run the same command to resume"
        raise InputError(f"{error}; {advice}" if len(journal) else str(error)) from None
    finally:
        bar.close()


def collect(dataset: InteractionDataset, plan: Plan, texts: dict[str, str]) -> tuple[UserTexts, Counter[str]]:
    """Return (texts of all users, section -> number of users without a text).

    A user has preferences if at least one text was accepted, and an intention if both of its texts were.
    """
    user_texts, num_missing = UserTexts(), Counter()
    for (section, user), requests in plan.items():
        accepted = [texts[request.key] for request in requests if request.key in texts]
        if section == "preferences" and accepted:
            user_texts.preferences[user] = accepted
        elif section != "preferences" and len(accepted) == len(requests):
            history, item = intention_context(dataset, user, section)
            user_texts.intentions[section][user] = Intention(item, history, *accepted)
        else:
            num_missing[section] += 1
    return user_texts, num_missing


@cli_main
def main() -> None:
    args = parse_args()
    started = time.monotonic()
    trust_remote_code(args.trust_remote_code)
    disable_progress_bar()  # for loading weights; asking shows its own

    # ---- Data, prompts, and the check whether the output exists already ----
    dataset = open_interactions(args.data_path, args.dataset, needs=["items"])
    prompts = read_prompts(args.prompt_file, FIELDS)
    users = list(dataset.histories)[: args.users]
    output = args.output or dataset.folder / f"{dataset.name}.user.json"
    output_file(output)
    run_file, journal_path = output.with_suffix(".run.json"), output.with_suffix(".journal.jsonl")
    outputs = {"--output": output, "the file of the run": run_file, "the journal": journal_path}
    check_outputs(outputs, {"--prompt_file": args.prompt_file, **dataset.files})
    made_with = {
        "histories": dataset.sha256("histories"),
        "items": dataset.sha256("items"),
        "prompts": sha256(repr(prompts).encode()).hexdigest(),
        **{flag: getattr(args, flag) for flag in ANSWER_FLAGS},
    }
    if is_up_to_date(output, run_file, {**made_with, "users": len(users)}):
        print(f"{output} exists and was made with these settings: nothing to do")
        return

    # ---- Ask ----
    chat = load_chat(args, Sampling(args.max_new_tokens, args.temperature, args.seed))
    planner = Planner(dataset, prompts, chat, args.max_his_len)
    plan = planner.plan(users)
    requests = list({request.key: request for section in plan.values() for request in section}.values())
    print(f"{len(requests):,} texts for {len(users):,} users; {planner.num_truncated:,} prompts truncated", flush=True)
    with ResponseCache(journal_path, made_with) as journal:
        if len(journal):
            print(f"{len(journal):,} answers from {journal_path}")
        if isinstance(chat, Endpoint):
            print_recipient(chat, plan, journal, args.attempts)
        ask_all(chat, requests, journal, args.attempts)
    texts, num_missing = collect(dataset, plan, journal.texts)
    reasons = format_counts(journal.reasons)
    if not texts.preferences and not any(texts.intentions.values()):
        raise InputError(f"no answer of {args.model} was accepted ({reasons}); choose another --model")

    # ---- Write ----
    counts = {"preferences": len(texts.preferences)} | {part: len(texts.intentions[part]) for part in PARTS}
    write_json(
        run_file,
        {
            "made_with": {**made_with, "users": len(users)},
            "users_with": counts,
            "users_without": dict(num_missing),
            "answers": len(journal),
            "answers_rejected": dict(journal.reasons.most_common()),
            **run_metadata(vars(args), started),
        },
        indent=1,
    )
    write_user_texts(output, texts)
    journal_path.unlink()

    print(f"{len(journal):,} answers, {journal.reasons.total():,} of them rejected ({reasons})")
    for section, count in counts.items():
        name = section if section == "preferences" else f"{section} intentions"
        print(f"{name}: {count:,} users, {num_missing[section]:,} without an accepted answer")
    print_examples(dataset, texts)
    print(f"\n-> {output}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="parent folder of <dataset>/ (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="default: <data_path>/<dataset>/<dataset>.user.json")
    parser.add_argument("--users", type=int, help="number of users, the first of the dataset (default: all)")
    parser.add_argument(
        "--prompt_file", type=Path, default=LCREC_PROMPT_FILE, help="prompt templates, YAML (default: %(default)s)"
    )
    parser.add_argument(
        "--max_his_len", type=int, default=20, help="latest items of a history in a prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--model", help=f"chat model: folder, hub name, or its name at the endpoint (default: {LOCAL_MODEL})"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of an answer (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0,
        help="sampling temperature; 0: greedy, then 0.7 for retries (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--attempts", type=int, default=3, help="answers per text until one is accepted (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, help="questions per batch, local model only (default: 16)")
    parser.add_argument(
        "--endpoint",
        help="OpenAI-compatible server, such as http://localhost:8000/v1; it gets the users' histories and item texts",
    )
    parser.add_argument("--api_key_env", help="environment variable with its key (default: OPENAI_API_KEY)")
    parser.add_argument("--concurrency", type=int, help="number of concurrent requests (default: 8)")
    parser.add_argument("--requests_per_minute", type=float, help="rate limit (default: none)")
    parser.add_argument("--timeout", type=float, help="seconds for a response (default: 60)")
    parser.add_argument("--retries", type=int, help="retries after a transient error (default: 6)")
    args = one_line_errors(parser).parse_args()

    local, remote = ("batch_size",), ("api_key_env", "concurrency", "requests_per_minute", "timeout", "retries")
    for flag in local if args.endpoint else remote:
        if getattr(args, flag) is not None:
            raise InputError(
                f"--{flag} has no effect {'with' if args.endpoint else 'without'} --endpoint; leave it out"
            )
    if args.endpoint and not args.model:
        raise InputError("--endpoint needs --model, the name of the model there")
    for flag in ("users", "max_his_len", "max_new_tokens", "attempts", "batch_size", "concurrency"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: should be at least 1")
    for flag in ("requests_per_minute", "timeout"):
        if getattr(args, flag) is not None and not 0 < getattr(args, flag) < float("inf"):
            raise InputError(f"--{flag} {getattr(args, flag)}: should be above 0")
    if not 0 <= args.temperature <= 2 or (args.retries or 0) < 0:
        raise InputError("--temperature should be between 0 and 2, --retries at least 0")
    args.model = args.model or LOCAL_MODEL
    return args


def load_chat(args: argparse.Namespace, sampling: Sampling) -> LocalChat | Endpoint:
    """Load the local chat model, or connect to the endpoint; InputError if the model or the key does not exist."""
    if not args.endpoint:
        if args.model == LOCAL_MODEL and not Path(LOCAL_MODEL).is_dir():
            raise InputError(
                f"{LOCAL_MODEL}: no such folder; run python -m convert.smollm2 --output_dir {LOCAL_MODEL}"
            )
        return LocalChat(args.model, sampling, args.batch_size or 16)
    key = os.environ.get(args.api_key_env or "OPENAI_API_KEY")
    if args.api_key_env and not key:
        # The value of the flag is not printed: it can be the key itself, given by mistake.
        raise InputError("--api_key_env: no such environment variable; it should contain the key")
    options = {flag: getattr(args, flag) for flag in ("concurrency", "requests_per_minute", "timeout", "retries")}
    options = {flag: value for flag, value in options.items() if value is not None}
    return Endpoint(args.endpoint, args.model, sampling, key, **options)


def print_recipient(endpoint: Endpoint, plan: Plan, journal: ResponseCache, attempts: int) -> None:
    """Print which server gets the texts of how many users, and a warning if they leave this machine unencrypted.

    Nothing is printed if the journal has all answers: no request is sent.
    """
    pending = {user for (_, user), requests in plan.items() if not all(journal.is_done(r, attempts) for r in requests)}
    if not pending:
        return
    print(f"histories and item texts of {len(pending):,} users are sent to {endpoint.host}", flush=True)
    if endpoint.is_unencrypted:
        content = "histories and the API key travel" if endpoint.headers else "histories travel"
        message = f"warning: {content} unencrypted over http to {endpoint.host}; prefer https"
        print(message, file=sys.stderr, flush=True)


def is_up_to_date(output: Path, run_file: Path, made_with: dict) -> bool:
    """Return whether `output` exists and was made with these settings; InputError if with others."""
    if not output.exists():
        return False
    if run_file.exists() and read_json(run_file, "the settings of a user file").get("made_with") == made_with:
        return True
    raise InputError(f"{output}: exists, but was not made with these settings; move it, or name another --output")


def format_counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common()) or "none"


def print_examples(dataset: InteractionDataset, texts: UserTexts) -> None:
    """Print a preference and both texts of an intention, of the first users with them."""
    for user, (preference, *_) in list(texts.preferences.items())[:1]:
        print(f"\nuser {user} prefers: {preference}")
    part = "test" if texts.intentions["test"] else "train"
    for user, intention in list(texts.intentions[part].items())[:1]:
        print(f"user {user} was looking for: {intention.of_user}")
        print(f"description of the item: {intention.of_item}\ntitle of the item: {dataset.title(intention.item)}")


if __name__ == "__main__":
    main()
