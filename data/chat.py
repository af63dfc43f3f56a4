"""Batched questions to a chat model: a local model, or one behind an OpenAI-compatible endpoint.

Both have one interface, `chat.ask(questions, on_answer)`, which calls `on_answer(index, answer)` as soon as
`questions[index]` is answered.
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
from ipaddress import ip_address
from typing import NamedTuple

import httpx2
import torch
from jinja2 import TemplateError
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from reclingua.models.language import load_model, load_tokenizer
from reclingua.utils.errors import InputError
from reclingua.utils.memory import run_with_oom_retry

RETRY_TEMPERATURE = 0.7  # a retried question must not get the same answer again
INITIAL_BACKOFF, MAX_BACKOFF, MAX_RETRY_AFTER = 1.0, 60.0, 600.0  # seconds
MAX_RESPONSE_BYTES = 1_000_000
TRANSIENT_STATUSES = {408, 409, 425, 429}  # retried, as are all from 500 up


class Question(NamedTuple):
    """A prompt for a chat model, and how often it was asked before."""

    prompt: str
    attempt: int = 0


class Answer(NamedTuple):
    """Text of a chat model; `is_complete` is False if the token limit cut it off."""

    text: str
    is_complete: bool


class Sampling(NamedTuple):
    """Sampling parameters; `temperature` 0 is greedy decoding, except for questions that are asked again."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 42

    def parameters(self, question: Question) -> tuple[float, int]:
        """Return (temperature, seed) of a question, which do not depend on its batch."""
        temperature = max(self.temperature, RETRY_TEMPERATURE) if question.attempt else self.temperature
        digest = sha256(f"{self.seed} {question.attempt} {question.prompt}".encode()).digest()
        return temperature, int.from_bytes(digest[:4]) // 2  # some servers accept 31 bits only


OnAnswer = Callable[[int, Answer], None]


class LocalChat:
    """Chat model in a folder (or of a hub name), asked in batches; on a GPU in bfloat16, on a CPU in float32.

    Raises:
        InputError: the model does not exist, or its tokenizer has no chat template.
    """

    def __init__(self, path: str, sampling: Sampling, batch_size: int = 16):
        self.sampling, self.batch_size = sampling, batch_size
        self.tokenizer = load_tokenizer(path)
        if not self.tokenizer.chat_template:
            raise InputError(f"{path}: the tokenizer has no chat template; choose a model that was tuned to chat")
        try:
            self._encode("Hello")
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"{path}: the chat template accepts no user message ({error})") from None
        has_gpu = torch.cuda.is_available()
        self.model = load_model(path, torch.bfloat16 if has_gpu else torch.float32).eval()
        self.model.to("cuda" if has_gpu else "cpu")
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.context_length = min(positions or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    def fits(self, prompt: str) -> bool:
        """Return whether prompt and answer fit into the context of the model."""
        return len(self._encode(prompt)) + self.sampling.max_new_tokens <= self.context_length

    def ask(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """Answer all questions, the longest first.

        Raises:
            InputError: out of memory with a single question.
        """
        lengths = [len(self._encode(question.prompt)) for question in questions]
        order = sorted(range(len(questions)), key=lambda i: -lengths[i])
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        for rows, answers in run_with_oom_retry(
            lambda rows: self._generate([questions[i] for i in rows]), batches, "question", "choose a smaller model"
        ):
            for row, answer in zip(rows, answers, strict=True):
                on_answer(row, answer)

    def _encode(self, prompt: str) -> list[int]:
        # enable_thinking turns the reasoning of some models off; other templates ignore it.
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def _generate(self, questions: list[Question]) -> list[Answer]:
        encoded = [self._encode(question.prompt) for question in questions]
        batch = self.tokenizer.pad({"input_ids": encoded}, padding_side="left", return_tensors="pt")
        # Greedy decoding of scores with Gumbel noise is sampling; the model's own sampling settings are turned off.
        output = self.model.generate(
            **batch.to(self.model.device),
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList(
                [_GumbelSampler([self.sampling.parameters(question) for question in questions])]
            ),
        )
        new_ids = output[:, batch["input_ids"].shape[1] :]
        eos_ids = torch.tensor(self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id)
        is_complete = torch.isin(new_ids, eos_ids.to(new_ids.device)).any(dim=1).tolist()
        texts = self.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        return [Answer(*answer) for answer in zip(texts, is_complete, strict=True)]


class _GumbelSampler(LogitsProcessor):
    """Logits processor that turns argmax into sampling, with one (temperature, seed) per row.

    The argmax of log-probabilities / temperature + Gumbel noise is a sample of the softmax (the Gumbel-max trick), and
    the noise is drawn per row: an answer does not depend on its batch. Temperature 0 leaves the scores unchanged.
    """

    def __init__(self, parameters: list[tuple[float, int]]):
        self.parameters = [(temperature, torch.Generator().manual_seed(seed)) for temperature, seed in parameters]
        self.top_p = TopPLogitsWarper(0.9)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, (temperature, generator) in enumerate(self.parameters):
            if temperature:
                log_noise = torch.empty(scores.shape[1]).exponential_(generator=generator).log()  # minus Gumbel
                nucleus = self.top_p(input_ids, scores[row : row + 1].float() / temperature)
                scores[row] = (nucleus[0] - log_noise.to(scores.device)).to(scores.dtype)
        return scores


class Endpoint:
    """Chat model behind `<url>/chat/completions`, the interface of vLLM, llama.cpp, Ollama and OpenAI.

    `host` is the server, host:port, that gets every prompt; `is_unencrypted` is True if prompts and key leave this
    machine over plain http.

    Args:
        key: sent as bearer token and never printed: asterisks replace it where the server repeats it.
        concurrency: number of concurrent requests.
        requests_per_minute: rate limit, including retries; None: no limit.
        timeout: seconds for a complete response.
        retries: how often a request is retried after a transient error, after 1, 2, 4 ... seconds (at most 60, with
            jitter), or as long as the server's Retry-After header states.
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
            raise InputError("--endpoint should contain no password; see --api_key_env")
        key = (key or "").strip()
        if not key.isascii() or not key.isprintable():
            raise InputError("the API key contains invalid characters; set the environment variable again")
        self.url, self.model, self.sampling = f"{url.rstrip('/')}/chat/completions", model, sampling
        self.host = parsed.netloc.decode()
        self.is_loopback = _is_loopback(parsed.host)
        self.is_unencrypted = parsed.scheme == "http" and not self.is_loopback
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._key = key
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.interval = 60 / requests_per_minute if requests_per_minute else 0.0  # seconds between two requests
        self.next_start = 0.0
        self.was_reached = False

    def fits(self, prompt: str) -> bool:
        """Return True: the server rejects prompts that are too long."""
        return True

    def ask(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """Answer all questions concurrently, in order of arrival.

        Raises:
            InputError: the server cannot be reached, rejects a request, or fails after all retries.
        """
        try:
            asyncio.run(self._ask(enumerate(questions), on_answer))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _ask(self, pending: Iterator[tuple[int, Question]], on_answer: OnAnswer) -> None:
        async def work() -> None:  # the workers share the iterator: each takes the next question
            for index, question in pending:
                on_answer(index, await self._answer(client, question))

        try:
            client = httpx2.AsyncClient(
                headers=self.headers,
                timeout=httpx2.Timeout(None, connect=10),
                limits=httpx2.Limits(max_connections=self.concurrency),
                trust_env=not self.is_loopback,  # what stays on this machine goes through no proxy
            )
        except (ImportError, ValueError) as error:  # an invalid proxy in the environment
            raise InputError(
                f"{self.url}: no connection can be made ({self._redact(error)}); check the proxy settings"
            ) from None
        async with client, asyncio.TaskGroup() as group:
            for _ in range(self.concurrency):
                group.create_task(work())

    async def _answer(self, client: httpx2.AsyncClient, question: Question) -> Answer:
        for attempt in range(self.retries + 1):
            await self._wait_for_slot()
            retry_after = 0.0
            try:
                async with asyncio.timeout(self.timeout):
                    status, headers, body = await self._post(client, question)
            except TimeoutError:
                failure = f"no response within {self.timeout:g} seconds"
            except httpx2.RequestError as error:
                failure = f"{type(error).__name__}: {self._redact(error) or 'connection lost'}"
                if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout) and not self.was_reached:
                    raise InputError(f"{self.url}: cannot be reached ({failure})") from None
            else:
                self.was_reached = True
                if status == 200:
                    answer = self._parse_answer(body)
                    if answer is not None:
                        return answer
                    failure = f"the response is no chat completion: {self._excerpt(body)}"
                else:
                    failure = f"status {status}: {self._excerpt(body)}"
                    if status < 500 and status not in TRANSIENT_STATUSES:
                        raise InputError(f"{self.url}: rejects the request with {failure}")
                    retry_after = _parse_retry_after(headers.get("retry-after", ""))
                    if retry_after > MAX_RETRY_AFTER:
                        raise InputError(f"{self.url}: requests a wait of {retry_after:.0f} seconds; {failure}")
            if attempt < self.retries:
                self.next_start = max(self.next_start, time.monotonic() + retry_after)
                await asyncio.sleep(min(MAX_BACKOFF, INITIAL_BACKOFF * 2**attempt) * random.uniform(0.5, 1))
        raise InputError(f"{self.url}: failed {self.retries + 1} times, the last time with {failure}")

    async def _wait_for_slot(self) -> None:
        """Wait until the next request can start; all workers share one rate limit."""
        while (delay := self.next_start - time.monotonic()) > 0:
            await asyncio.sleep(delay)
        self.next_start = time.monotonic() + self.interval

    async def _post(self, client: httpx2.AsyncClient, question: Question) -> tuple[int, httpx2.Headers, bytes]:
        temperature, seed = self.sampling.parameters(question)
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": question.prompt}],
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": temperature,
        }
        if temperature:
            request["seed"] = seed
        body = b""
        async with client.stream("POST", self.url, json=request) as response:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_RESPONSE_BYTES:
                    break
        return response.status_code, response.headers, body

    def _parse_answer(self, body: bytes) -> Answer | None:
        """Return the first choice of a chat completion; None if the body is none."""
        try:
            choice = json.loads(body)["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        if not isinstance(text, str | None):
            return None
        return Answer(self._redact(text or ""), reason != "length")

    def _excerpt(self, body: bytes) -> str:
        """Return the beginning of a response body in one printable line, without the key."""
        text = self._redact(" ".join(body.decode("utf-8", "replace").split()))
        return re.sub(r"[^ -~]", "?", text)[:200] or "an empty body"

    def _redact(self, text: object) -> str:
        # Keys shorter than 8 characters are placeholders such as "none", and occur in ordinary text.
        return str(text).replace(self._key, "***") if len(self._key) >= 8 else str(text)


def _is_loopback(host: str) -> bool:
    """Return whether a host is this machine: localhost, 127.0.0.0/8 or ::1."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _parse_retry_after(value: str) -> float:
    """Return the delay of a Retry-After header (seconds or a date) in seconds; 0 if there is none."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without time zone
        return 0.0
