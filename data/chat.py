"""Ask a chat model many questions: a model that runs here, or one behind an OpenAI-compatible endpoint.

Both are asked alike, `chat.ask(questions, keep)`, where `keep(at, answer)` gets the answer to `questions[at]` as soon
as there is one.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from typing import NamedTuple

import httpx2
import torch
from jinja2 import TemplateError
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from reclingua.models.language import load_model, load_tokenizer
from reclingua.utils.errors import InputError
from reclingua.utils.memory import run_with_oom_retry

RETRY_TEMPERATURE = 0.7  # asking again must not give the same answer again
FIRST_WAIT, LONGEST_WAIT, LONGEST_RETRY_AFTER = 1.0, 60.0, 600.0  # seconds
MOST_BYTES = 1_000_000  # of a reply
PASSING = {408, 409, 425, 429}  # and all from 500 up: worth another try


class Question(NamedTuple):
    """`attempt`: how often it has been asked before."""

    prompt: str
    attempt: int = 0


class Answer(NamedTuple):
    """`complete` is False where the limit of tokens cut the text off."""

    text: str
    complete: bool


class Sampling(NamedTuple):
    """How answers are drawn: `temperature` 0 takes the likeliest token, but where a question is asked again."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 42

    def of(self, question: Question) -> tuple[float, int]:
        """(temperature, seed) of one question, whatever it shares a batch with."""
        temperature = max(self.temperature, RETRY_TEMPERATURE) if question.attempt else self.temperature
        digest = sha256(f"{self.seed} {question.attempt} {question.prompt}".encode()).digest()
        return temperature, int.from_bytes(digest[:4]) // 2  # some servers take 31 bits


Keep = Callable[[int, Answer], None]


class LocalChat:
    """A chat model in a folder (or of a hub name), in batches, on a GPU in bfloat16 where there is one.

    Raises:
        InputError: there is no model, or its tokenizer has no chat template.
    """

    def __init__(self, path: str, sampling: Sampling, batch_size: int = 16):
        self.sampling, self.batch_size = sampling, batch_size
        self.tokenizer = load_tokenizer(path)
        if not self.tokenizer.chat_template:
            raise InputError(f"{path}: its tokenizer has no chat template; take a model that was tuned to chat")
        try:
            self._encode("Hello")
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"{path}: its chat template takes no message of a user ({error})") from None
        on_gpu = torch.cuda.is_available()
        self.model = load_model(path, torch.bfloat16 if on_gpu else torch.float32).eval()
        self.model.to("cuda" if on_gpu else "cpu")
        places = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.context = min(places or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    def fits(self, prompt: str) -> bool:
        """Whether prompt and answer have room in the model's context."""
        return len(self._encode(prompt)) + self.sampling.max_new_tokens <= self.context

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Answer all questions, the longest first.

        Raises:
            InputError: memory does not suffice for one question.
        """
        lengths = [len(self._encode(question.prompt)) for question in questions]
        order = sorted(range(len(questions)), key=lambda i: -lengths[i])
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        for rows, answers in run_with_oom_retry(
            lambda rows: self._generate([questions[i] for i in rows]), batches, "question", "take a smaller model"
        ):
            for row, answer in zip(rows, answers, strict=True):
                keep(row, answer)

    def _encode(self, prompt: str) -> list[int]:
        # Models that can think aloud before they answer are told not to; other templates ignore it.
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def _generate(self, questions: list[Question]) -> list[Answer]:
        encoded = [self._encode(question.prompt) for question in questions]
        batch = self.tokenizer.pad({"input_ids": encoded}, padding_side="left", return_tensors="pt")
        # The likeliest token of what `_Draw` makes of the scores: nothing of the model's own settings draws besides.
        output = self.model.generate(
            **batch.to(self.model.device),
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([_Draw([self.sampling.of(question) for question in questions])]),
        )
        new = output[:, batch["input_ids"].shape[1] :]
        ends = torch.tensor(self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id).to(new.device)
        complete = torch.isin(new, ends).any(dim=1).tolist()
        return [
            Answer(*each)
            for each in zip(self.tokenizer.batch_decode(new, skip_special_tokens=True), complete, strict=True)
        ]


class _Draw(LogitsProcessor):
    """Make the largest score of a row a draw with its temperature and seed, by Gumbel noise; temperature 0: none."""

    def __init__(self, rows: list[tuple[float, int]]):
        self.rows = [(t, torch.Generator().manual_seed(seed)) for t, seed in rows]
        self.likely = TopPLogitsWarper(0.9)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, (temperature, generator) in enumerate(self.rows):
            if temperature:
                noise = torch.empty(scores.shape[1]).exponential_(generator=generator).log()
                likely = self.likely(input_ids, scores[row : row + 1].float() / temperature)
                scores[row] = (likely[0] - noise.to(scores.device)).to(scores.dtype)
        return scores


class Endpoint:
    """A chat model behind `<url>/chat/completions`, as vLLM, llama.cpp, Ollama and OpenAI offer it.

    Args:
        key: sent as bearer token, and never shown: where the server repeats it, asterisks take its place.
        concurrency: requests under way at a time.
        requests_per_minute: at most so many are begun, tries of the same one included; None: no limit.
        timeout: seconds that a reply may take as a whole.
        retries: how often a request that failed in passing is tried again, after 1, 2, 4 ... seconds (at most 60, a
            random part of it left out), or as long as the server asks for.
    """

    def __init__(
        self,
        url: str,
        model: str,
        sampling: Sampling,
        key: str | None = None,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        timeout: float = 60,
        retries: int = 6,
    ):
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            parsed = httpx2.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
            raise InputError("--endpoint should be like http://host:port/v1")
        if parsed.userinfo:
            raise InputError("--endpoint should hold no password; see --api_key_env")
        key = (key or "").strip()
        if not key.isascii() or not key.isprintable():
            raise InputError("the API key holds characters that cannot be sent; set the environment variable again")
        self.url, self.model, self.sampling = f"{url.rstrip('/')}/chat/completions", model, sampling
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._key = key
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.pause = 60 / requests_per_minute if requests_per_minute else 0.0  # between two requests, in seconds
        self.next_start = 0.0
        self.reached = False

    def fits(self, prompt: str) -> bool:
        """Nobody says how long the context is; what is too long the server refuses."""
        return True

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Answer all questions, in the order in which the answers come.

        Raises:
            InputError: the server cannot be reached, refuses the request, or keeps failing.
        """
        try:
            asyncio.run(self._ask(enumerate(questions), keep))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _ask(self, waiting: Iterator[tuple[int, Question]], keep: Keep) -> None:
        async def work() -> None:
            for at, question in waiting:
                keep(at, await self._answer(client, question))

        try:
            client = httpx2.AsyncClient(
                headers=self.headers,
                timeout=httpx2.Timeout(None, connect=10),
                limits=httpx2.Limits(max_connections=self.concurrency),
            )
        except (ImportError, ValueError) as error:  # a proxy in the environment that is none
            raise InputError(f"{self.url}: no connection can be made ({self._hide(error)})") from None
        async with client, asyncio.TaskGroup() as group:
            for _ in range(self.concurrency):
                group.create_task(work())

    async def _answer(self, client: httpx2.AsyncClient, question: Question) -> Answer:
        for attempt in range(self.retries + 1):
            await self._turn()
            asked_to_wait = 0.0
            try:
                async with asyncio.timeout(self.timeout):
                    status, headers, body = await self._post(client, question)
            except TimeoutError:
                failure = f"no reply within {self.timeout:g} seconds"
            except httpx2.RequestError as error:
                failure = f"{type(error).__name__}: {self._hide(error) or 'the connection broke'}"
                if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout) and not self.reached:
                    raise InputError(f"{self.url}: cannot be reached ({failure})") from None
            else:
                self.reached = True
                if status == 200:
                    answer = self._read(body)
                    if answer is not None:
                        return answer
                    failure = f"the reply is no chat completion: {self._excerpt(body)}"
                else:
                    failure = f"status {status}: {self._excerpt(body)}"
                    if status < 500 and status not in PASSING:
                        raise InputError(f"{self.url}: refuses the request with {failure}")
                    asked_to_wait = _seconds(headers.get("retry-after", ""))
                    if asked_to_wait > LONGEST_RETRY_AFTER:
                        raise InputError(f"{self.url}: asks to wait {asked_to_wait:.0f} seconds; {failure}")
            if attempt < self.retries:
                self.next_start = max(self.next_start, time.monotonic() + asked_to_wait)
                await asyncio.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1))
        raise InputError(f"{self.url}: failed {self.retries + 1} times, the last time with {failure}")

    async def _turn(self) -> None:
        """Wait until the next request may start; all that are under way share the pace."""
        while (wait := self.next_start - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self.next_start = time.monotonic() + self.pause

    async def _post(self, client: httpx2.AsyncClient, question: Question) -> tuple[int, httpx2.Headers, bytes]:
        temperature, seed = self.sampling.of(question)
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": question.prompt}],
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": temperature,
        }
        if temperature:
            request["seed"] = seed
        body = b""
        async with client.stream("POST", self.url, json=request) as reply:
            async for piece in reply.aiter_bytes():
                body += piece
                if len(body) > MOST_BYTES:
                    break
        return reply.status_code, reply.headers, body

    def _read(self, body: bytes) -> Answer | None:
        """The first choice of a chat completion; None if that is not what the body holds."""
        try:
            choice = json.loads(body)["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        if not isinstance(text, str | None):
            return None
        return Answer(self._hide(text or ""), reason != "length")

    def _excerpt(self, body: bytes) -> str:
        text = self._hide(" ".join(body.decode("utf-8", "replace").split()))
        return re.sub(r"[^ -~]", "?", text)[:200] or "nothing"

    def _hide(self, text: object) -> str:
        # Keys of a few letters stand for "no key", and are found in any text.
        return str(text).replace(self._key, "***") if len(self._key) >= 8 else str(text)


def _seconds(retry_after: str) -> float:
    """How long a server asks to wait, in seconds or until a date; 0 where it does not say."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date that does not say its zone
        return 0.0
