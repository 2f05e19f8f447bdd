"""Questions to a running server through the OpenAI client, and the rate at which it answers many at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import TypedDict

import openai


class Sampling(TypedDict):
    """Parameters of a request that decide how tokens are drawn."""

    temperature: float
    top_p: float
    seed: int


# Greedy text of a small model repeats itself; a fixed seed keeps what is shown the same from run to run.
SAMPLING: Sampling = {"temperature": 0.7, "top_p": 0.9, "seed": 0}


def connect(api_url: str, timeout: float = 120.0) -> openai.OpenAI:
    """A client for the server at `api_url`; the loopback interface is reached without any proxy."""
    transport = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=api_url, api_key="none", http_client=transport, max_retries=0, timeout=timeout)


def served_name(client: openai.OpenAI) -> str:
    """The name under which the server offers its model."""
    return client.models.list().data[0].id


def complete(client: openai.OpenAI, prompt: str, max_tokens: int) -> str:
    """Completion of a prompt."""
    answer = client.completions.create(model=served_name(client), prompt=prompt, max_tokens=max_tokens, **SAMPLING)
    return answer.choices[0].text


def chat(client: openai.OpenAI, message: str, max_tokens: int) -> str:
    """Answer to one user message."""
    answer = client.chat.completions.create(
        model=served_name(client),
        messages=[{"role": "user", "content": message}],
        max_tokens=max_tokens,
        **SAMPLING,
    )
    return answer.choices[0].message.content or ""


def stream(client: openai.OpenAI, prompt: str, max_tokens: int) -> Iterator[str]:
    """Completion, piece by piece as the server sends it."""
    pieces = client.completions.create(
        model=served_name(client), prompt=prompt, max_tokens=max_tokens, stream=True, **SAMPLING
    )
    for piece in pieces:
        if piece.choices and piece.choices[0].text:
            yield piece.choices[0].text


async def _generate(client: openai.AsyncOpenAI, model: str, prompt: str, max_tokens: int) -> int:
    answer = await client.completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    if answer.usage is None:
        raise RuntimeError("the server sent no usage figures, so its tokens cannot be counted.")
    return answer.usage.completion_tokens


async def _burst(api_url: str, model: str, prompts: Sequence[str], max_tokens: int) -> float:
    transport = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=api_url, api_key="none", http_client=transport, max_retries=0, timeout=300.0
    ) as client:
        started = time.perf_counter()
        tokens = await asyncio.gather(*(_generate(client, model, prompt, max_tokens) for prompt in prompts))
        return sum(tokens) / (time.perf_counter() - started)


def generation_rate(api_url: str, model: str, prompts: Sequence[str], max_tokens: int) -> float:
    """Generated tokens per second, all prompts in flight at once, each answered with exactly `max_tokens` tokens."""
    return asyncio.run(_burst(api_url, model, prompts, max_tokens))
