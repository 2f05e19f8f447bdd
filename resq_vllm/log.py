"""The plugin's logger: a child of vLLM's, so its lines carry vLLM's format and obey VLLM_LOGGING_LEVEL."""

from __future__ import annotations

import logging
from functools import cache

LOGGER_NAME = "vllm.resq"

logger = logging.getLogger(LOGGER_NAME)


@cache
def log_once(level: int, message: str) -> None:
    """Log ``message`` the first time it is given in this process."""
    logger.log(level, "%s", message, stacklevel=2)
