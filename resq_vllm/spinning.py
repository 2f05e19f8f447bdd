"""How long the worker's threads wait for their next loop at full speed before they give their core back.

Between two decode steps vLLM's scheduler, in a process of its own, chooses what runs next, and all the worker's threads
but one have nothing to do. GNU OpenMP's spin for 300,000 rounds by then, 4 ms and more: where they hold every core, the
scheduler waits for its share of one. On 2 cores (Zen 4, 1B shape) that is 4.2 to 5.9 of a step's 26 to 33 ms; with the
rounds below 1.4 to 1.6.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping

from resq_vllm.log import log_once

# 0.4 ms (Zen 4) to 1 ms (Intel, whose pause instruction takes longer): between two layers' loops they wait for up to
# 0.4 ms, as Python finds the caches full of weights, and between two steps for more.
SPINS = 20_000
SPIN_VARIABLE, POLICY_VARIABLE, BINDING_VARIABLE = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "VLLM_CPU_OMP_THREADS_BIND"


def shorten_spinning() -> None:
    """Have workers that are started from now on spin for SPINS rounds, if their threads take every core.

    By the environment variable GOMP_SPINCOUNT, which libgomp reads when it is loaded; a user's own choice (that one, or
    OMP_WAIT_POLICY) stays. Intel's OpenMP ignores it: for that one vLLM sets KMP_BLOCKTIME.
    """
    # Elsewhere nothing says which cores are usable.
    if sys.platform != "linux" or SPIN_VARIABLE in os.environ or POLICY_VARIABLE in os.environ:
        return
    if not takes_every_core(os.environ, os.sched_getaffinity(0)):
        return
    os.environ[SPIN_VARIABLE] = str(SPINS)
    log_once(
        logging.INFO,
        f"ResQ: worker threads take every core, so between steps they spin for {SPINS:,} rounds only and leave the "
        f"rest to vLLM's scheduler; {SPIN_VARIABLE} sets another number",
    )


def takes_every_core(environment: Mapping[str, str], cores: set[int]) -> bool:
    """Whether threads bound as the environment says leave none of ``cores`` free.

    vLLM's default, "auto", keeps a core per rank; "nobind" leaves the threads to OpenMP, which starts one on every
    core. Lists that vLLM will refuse are none of this function's business.
    """
    binding = environment.get(BINDING_VARIABLE, "auto")
    if binding == "nobind":
        return True
    try:
        return cores <= {core for part in binding.replace("|", ",").split(",") for core in _cores(part)}
    except ValueError:
        return False


def _cores(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)
