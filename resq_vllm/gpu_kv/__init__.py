"""The packed KV cache on a GPU, in Triton: the write after RoPE, and attention over the pages for decode and prefill.

The specification is resq_vllm.reference (kv_write, attention), the pages are resq_vllm.formats.kv_layout.
"""

from resq_vllm.gpu_kv.attention import attention
from resq_vllm.gpu_kv.schedule import workspace_bytes
from resq_vllm.gpu_kv.warm_up import warm_up
from resq_vllm.gpu_kv.write import kv_write, write_and_rotate

__all__ = ["attention", "kv_write", "warm_up", "workspace_bytes", "write_and_rotate"]
