"""The model card: front matter, what was measured, how to serve, whose licence."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from offline.card import declared_licence, has_chat_template, model_card
from offline.evaluate.perplexity import Perplexity
from offline.models.source import ModelSource
from tests.offline.models.tiny import save_tiny
from tests.offline.pack.tiny_checkpoint import EIGHT_BIT_HEAD, FOUR_BIT_HEAD, METADATA

RECIPE = METADATA.model_copy(update={"recipe": {"model": "maker/Base-1B", "method": "GPTQ", "nsamples": 128}})
BEFORE = Perplexity(10.0, "bundled held-out text", "windows", 16, 16368, 1024)
AFTER = Perplexity(10.5, "bundled held-out text", "windows", 16, 16368, 1024)


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    save_tiny("llama", tmp_path / "Base-1B")
    return ModelSource.open(tmp_path / "Base-1B")


def front_matter(card: str) -> dict[str, str]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    return dict(line.split(": ", 1) for line in match.group(1).splitlines())


def test_front_matter(source: ModelSource) -> None:
    fields = front_matter(model_card(source, RECIPE, "out", BEFORE, AFTER))
    assert fields["base_model"] == '"maker/Base-1B"'
    assert fields["base_model_relation"] == "quantized"
    assert fields["tags"].startswith("[resq, vllm")
    assert "license" not in fields


def test_perplexity_before_and_after(source: ModelSource) -> None:
    card = model_card(source, RECIPE, "out", BEFORE, AFTER)
    assert "| original | 10.000 |" in card
    assert "| this checkpoint | 10.500 (+5.0%) |" in card
    assert "16 windows of at most 1024 tokens, 16368 predicted tokens" in card


def test_without_measurement_there_is_no_accuracy(source: ModelSource) -> None:
    card = model_card(source, RECIPE, "out", None, None)
    assert "Accuracy" not in card
    assert "\n\n\n" not in card


def test_serve_command_is_exact(source: ModelSource) -> None:
    assert "\nvllm serve my-model-resq\n" in model_card(source, RECIPE, "my-model-resq", None, None)


@pytest.mark.parametrize("chat", [True, False])
def test_client_example_is_python_and_fits_the_tokenizer(chat: bool, source: ModelSource) -> None:
    if chat:
        (source.folder / "chat_template.jinja").write_text("{{ messages }}")
    example = model_card(source, RECIPE, "out", None, None).split("```python\n")[1].split("```")[0]
    ast.parse(example)
    assert 'model="out"' in example
    assert ("chat.completions" in example) == chat


def test_chat_template_inside_the_tokenizer_config(tmp_path: Path) -> None:
    assert not has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert has_chat_template(tmp_path)


def test_recipe_names_every_site_and_option(source: ModelSource) -> None:
    card = model_card(source, RECIPE, "out", None, None)
    assert "| qkv | 42 + 6 | 4 bits / 8 bits | 4 bits / 8 bits, one scale a token and part |" in card
    assert "| o | 56 + 8 | 4 bits / 8 bits | 8 bits, one scale a token |" in card
    assert "| down | 96 | 4 bits | 4 bits, one scale a token and block, Hadamard in 8 blocks |" in card
    assert "14 dims in 4 bits, 2 in 8 bits (1 layers); 8 bits (1 layers); 16 bits (1 layers)" in card
    assert "Left in 16 bits: model.layers.2.mlp.down_proj." in card
    assert "| nsamples | 128 |" in card


def test_lm_head_bits_are_said(source: ModelSource) -> None:
    assert "Embedding, norms and lm_head: 16 bits." in model_card(source, RECIPE, "out", None, None)
    assert "| lm_head |" not in model_card(source, RECIPE, "out", None, None)
    card = model_card(source, EIGHT_BIT_HEAD, "out", None, None)
    assert "Embedding and norms: 16 bits." in card
    assert "| lm_head | 48 | 8 bits | 8 bits, one scale a token and part |" in card
    assert ", lm_head in 8 bits, and a KV cache" in card
    card = model_card(source, FOUR_BIT_HEAD, "out", None, None)
    assert "Embedding and norms: 16 bits." in card
    assert "| lm_head | 42 + 6 | 4 bits / 8 bits | 8 bits / 8 bits, one scale a token and part |" in card
    assert ", lm_head in 4.5 bits, and a KV cache" in card


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\ntext", "apache-2.0"),
        ('---\ntags: [a]\nlicense: "llama3.2"  # see below\n---\n', "llama3.2"),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("no front matter", None),
    ],
)
def test_licence_of_the_source_card(front: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(front)
    assert declared_licence(tmp_path) == expected


def test_licence_is_passed_on(source: ModelSource) -> None:
    (source.folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (source.folder / "LICENSE").write_text("terms")
    card = model_card(source, RECIPE, "out", None, None)
    assert front_matter(card)["license"] == '"apache-2.0"'
    assert "its licence (apache-2.0) applies to them. Copied from there: LICENSE." in card
