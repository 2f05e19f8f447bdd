"""The command in a process, and questions to a server: greedy text, likelihoods of a text, and counters."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

from benchmarks.client import connect, served_name
from benchmarks.environment import cpu_binding
from benchmarks.server import VLLMServer
from offline.bundled import HELDOUT_TEXT


def resq(*arguments: str | Path) -> str:
    """Run the command with threads for two ranks; returns what it wrote."""
    # Named here, since the tests' own environment already binds threads for one rank.
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": cpu_binding(2)}
    command = [sys.executable, "-m", "offline.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def greedy(client: openai.OpenAI, prompt: str, tokens: int = 24) -> str:
    """Exactly ``tokens`` tokens after ``prompt``, the most likely one each time."""
    answer = client.completions.create(
        model=served_name(client),
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == tokens
    return answer.choices[0].text


def greedy_at_once(client: openai.OpenAI, prompts: list[str], tokens: int = 24) -> list[str]:
    """The same for all prompts, in flight together."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: greedy(client, prompt, tokens), prompts))


def log_likelihoods(server: VLLMServer, text: str) -> list[float]:
    """log p of every token of ``text`` but the first, given those before it."""
    client = connect(server.api_url)
    answer = client.completions.create(
        model=served_name(client), prompt=text, max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    values = found.token_logprobs[1:-1]  # nothing predicts the first token, and the last one is generated
    return [value for value in values if value is not None]


def perplexity(log_likelihood: list[float]) -> float:
    return math.exp(-sum(log_likelihood) / len(log_likelihood))


def passages(count: int, characters: int = 800) -> list[str]:
    """Pieces of the held-out text, spread over it: about 240 tokens each."""
    text = HELDOUT_TEXT.read_text(encoding="utf-8")
    step = (len(text) - characters) // count
    return [text[i * step : i * step + characters] for i in range(count)]


def served_perplexity(server: VLLMServer, count: int = 60) -> float:
    """Of so many passages together."""
    return perplexity([value for passage in passages(count) for value in log_likelihoods(server, passage)])


def counter(server: VLLMServer, name: str) -> float:
    """Sum of a Prometheus counter over its labels."""
    found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? ([0-9.e+]+)$", server.metrics_text(), re.MULTILINE)
    assert found, f"the server has no metric {name}"
    return sum(float(value) for value in found)
