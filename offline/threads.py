"""How long idle threads of the command hold their cores.

GNU OpenMP's spin for 300,000 rounds after every loop. Where two commands share two cores, each waits for threads that
the other's spinning keeps from running: two `resq quantize --rtn` of the bundled model took 272 s, one alone 6 s.
With 2,000 rounds two with GPTQ at once take 31 s and one alone 16.6 s, as before (16.4 and 17.6 s); with 20,000
rounds two take 108 s; with none one alone takes 23 s.
"""

from __future__ import annotations

import os

from resq_vllm.spinning import POLICY_VARIABLE, SPIN_VARIABLE

SPINS = 2_000


def spin_briefly() -> None:
    """Have OpenMP's threads, and those of processes started from here, spin for SPINS rounds; before torch is imported.

    By the environment variable GOMP_SPINCOUNT; a user's own choice (that one, or OMP_WAIT_POLICY) stays.
    """
    if POLICY_VARIABLE not in os.environ:
        os.environ.setdefault(SPIN_VARIABLE, str(SPINS))
