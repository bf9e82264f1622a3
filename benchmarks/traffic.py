"""Mixed requests to an OpenAI server: what is asked, and whether the answers are right."""

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "base"
ADAPTERS = ("one", "two")
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()
TIMEOUT_SECONDS = 600.0
ERRORS = {str(status) for status in range(400, 600)}


@dataclass(frozen=True)
class Job:
    """One request and what must come of it.

    Attributes:
        kind: short, long, stream, abort, adapter, sampled, structured, chat or malformed.
        path: of the API, behind /v1.
        body: JSON of the request, or text that is sent as it is.
        status: the HTTP status that is right.
    """

    kind: str
    path: str
    body: dict[str, Any] | str
    status: int = 200


@dataclass
class Tally:
    """What became of the requests of one phase.

    Attributes:
        seconds: latency of each whole answer, by kind.
        first: seconds until the first piece of each stream.
        wrong: what differed from the idle server's answer.
        counts: requests by kind.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def make_jobs(tokens: int, seed: int = 0) -> list[Job]:
    """The fixed set of requests, all of which have one right answer."""
    draw = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    def completion(kind: str, prompt: str, **options: Any) -> Job:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return Job(kind, "completions", {**body, "ignore_eos": True, **options})

    shared = words(40)  # a prefix that is worth caching: more than a block of 128 tokens
    jobs = [completion("short", words(3)) for _ in range(8)]
    jobs += [completion("long", f"{shared} {words(4)}") for _ in range(6)]
    jobs += [completion("stream", words(5), stream=True) for _ in range(6)]
    jobs += [completion("abort", words(6), stream=True, max_tokens=4 * tokens) for _ in range(4)]
    for adapter in ADAPTERS:
        jobs += [completion("adapter", words(4), model=adapter) for _ in range(4)]
    jobs += [completion("sampled", words(4), temperature=0.8, seed=i) for i in range(6)]
    regex = {"regex": f"[a-h]{{{tokens}}}"}
    jobs += [completion("structured", words(4), structured_outputs=regex) for _ in range(4)]
    for _ in range(4):
        messages = [{"role": "user", "content": words(4)}]
        body = {"model": MODEL, "messages": messages, "max_tokens": tokens, "temperature": 0}
        jobs.append(Job("chat", "chat/completions", {**body, "ignore_eos": True}))
    malformed: list[tuple[dict[str, Any] | str, int]] = [
        ('{"model": "base", "prompt": ', 400),
        ({"model": MODEL, "prompt": "x", "max_tokens": -1}, 400),
        ({"model": MODEL, "prompt": "x" * 5000, "max_tokens": 4}, 400),
        ({"model": "nobody", "prompt": "x"}, 404),
        ({"model": MODEL, "prompt": "x", "temperature": "hot"}, 400),
        ({"model": MODEL, "prompt": "x", "structured_outputs": {"regex": "[a-"}}, 400),
    ]
    jobs += [Job("malformed", "completions", body, status) for body, status in malformed]
    return jobs


async def answer(client: httpx.AsyncClient, job: Job, tally: Tally | None = None) -> str:
    """The text of the whole answer, or its HTTP status if that is not 200."""
    content = job.body if isinstance(job.body, str) else json.dumps(job.body)
    headers = {"Content-Type": "application/json"}
    if isinstance(job.body, dict) and job.body.get("stream"):
        return await _stream(client, job, content, headers, tally)
    response = await client.post(f"/v1/{job.path}", content=content, headers=headers)
    if response.status_code != 200:
        return str(response.status_code)
    choice = response.json()["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


async def _stream(
    client: httpx.AsyncClient, job: Job, content: str, headers: dict[str, str], tally: Tally | None
) -> str:
    begin = time.perf_counter()
    pieces: list[str] = []
    url = f"/v1/{job.path}"
    async with client.stream("POST", url, content=content, headers=headers) as response:
        if response.status_code != 200:
            return str(response.status_code)
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            if tally is not None and not pieces:
                tally.first.append(time.perf_counter() - begin)
            pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
            if tally is not None and job.kind == "abort" and len(pieces) == 3:
                break  # leaving the context closes the connection
    return "".join(pieces)


async def idle_answers(url: str, jobs: list[Job]) -> list[str]:
    """The answer to each job of a server that has one at a time; none is aborted here.

    Raises:
        RuntimeError: if a request does not get the status that is right.
    """
    found = []
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS) as client:
        for job in jobs:
            text = await answer(client, job)
            if (text in ERRORS or job.status != 200) and text != str(job.status):
                raise RuntimeError(f"{job}: expected status {job.status}, found {text!r}")
            found.append(text)
    return found


async def load(
    url: str, jobs: list[Job], expected: list[str], clients: int, seconds: float, seed: int
) -> Tally:
    """Let so many clients send requests, each one after its last, and check every answer."""
    tally, end = Tally(), time.monotonic() + seconds

    async def one(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        while time.monotonic() < end:
            index = draw.randrange(len(jobs))
            await _checked(client, jobs[index], expected[index], tally)

    # A connection for each request: one that is kept may be closed by the server, after five idle
    # seconds, in the moment in which it is used again.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits) as client:
        await asyncio.gather(*(one(number) for number in range(clients)))
    return tally


async def _checked(client: httpx.AsyncClient, job: Job, right: str, tally: Tally) -> None:
    begin = time.perf_counter()
    try:
        found = await answer(client, job, tally)
    except httpx.HTTPError as error:
        found = f"{type(error).__name__}: {error}"
    tally.counts[job.kind] += 1
    tally.seconds.setdefault(job.kind, []).append(time.perf_counter() - begin)
    same = bool(found) and right.startswith(found) if job.kind == "abort" else found == right
    if not same:
        tally.wrong.append(f"{job}: expected {right!r}, found {found!r}")
