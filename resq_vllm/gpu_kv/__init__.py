"""The packed KV cache on a GPU: the write after RoPE, and attention over the pages for decode and prefill, in Triton;
decodes over most models' pages in CUDA (cuda_decode.py).

The specification is resq_vllm.reference (kv_write, attention), the pages are resq_vllm.formats.kv_layout.
"""

from resq_vllm.gpu_kv.attention import attention
from resq_vllm.gpu_kv.cuda_decode import decode_kernel
from resq_vllm.gpu_kv.schedule import workspace_bytes
from resq_vllm.gpu_kv.warm_up import warm_up
from resq_vllm.gpu_kv.write import kv_write, write_and_rotate

__all__ = ["attention", "decode_kernel", "kv_write", "warm_up", "workspace_bytes", "write_and_rotate"]
