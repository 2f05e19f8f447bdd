"""Entry point ``vllm.general_plugins: resq``: makes ``quant_method: resq`` known to vLLM.

vLLM calls :func:`register` in every process it starts (API server, model inspection, engine core, workers), possibly
more than once, so it is idempotent and imports no layer code and no compiled library.
"""

from __future__ import annotations

from resq_vllm.formats.metadata import QUANT_METHOD
from resq_vllm.vllm_api import check_version, register_quantization_config


def register() -> None:
    """Register ``ResQConfig`` under the name "resq". Raises ResQError when vLLM is missing or lacks what is needed."""
    check_version()
    from resq_vllm.config import ResQConfig

    # Registering twice keeps one entry in vLLM's list of methods and points it at the same class.
    register_quantization_config(QUANT_METHOD)(ResQConfig)
