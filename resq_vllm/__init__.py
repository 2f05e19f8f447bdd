"""ResQ (arXiv 2412.14363) for vLLM: 4/8-bit mixed-precision linear layers and a 4.5-bit KV cache.

Importing the package costs nothing: vLLM loads ``resq_vllm.plugin:register`` through the entry point group
``vllm.general_plugins``.
"""

__version__ = "0.1.0"
