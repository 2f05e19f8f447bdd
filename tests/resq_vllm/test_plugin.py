"""plugin.register: light, idempotent, and found by vLLM through its entry point."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

from resq_vllm import plugin
from resq_vllm.config import ResQConfig


def test_register_makes_resq_a_quantization_method_of_vllm() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    plugin.register()
    assert "resq" in QUANTIZATION_METHODS
    assert get_quantization_config("resq") is ResQConfig


def test_registering_again_changes_nothing() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    plugin.register()
    before = list(QUANTIZATION_METHODS)
    plugin.register()
    assert before == QUANTIZATION_METHODS
    assert before.count("resq") == 1
    assert get_quantization_config("resq") is ResQConfig


def test_register_imports_neither_layers_nor_the_compiled_library() -> None:
    code = (
        "import sys\n"
        "from resq_vllm.plugin import register\n"
        "register()\n"
        "heavy = ['vllm.model_executor.layers.linear', 'vllm.v1.attention.backend', 'resq_vllm.ops']\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_entry_point_is_installed() -> None:
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert points["resq"].value == "resq_vllm.plugin:register"
