"""Stand-ins that make vLLM's CPU build choose its CUDA platform, for checks of configuration in a process of its own.

`install()` before vLLM is imported. Platform, configuration, layers and KV-cache accounting are then vLLM's own code
for CUDA; no kernel can run and nothing may be allocated on the device. What stands in, and why:

- NVML, which reports one GPU of the given compute capability: platform detection asks it for the number of GPUs.
- the version of the distribution `vllm` without its "+cpu": detection takes that for a CPU build otherwise.
- vLLM's CUDA extension and FlashAttention 3: imported on the CUDA platform, absent in the CPU build. Its ops are looked
  up, never called; its questions about the chip are answered with yes.
- no visible device while vLLM looks for Triton: it then expects a driver to become active later.
- `torch.version.cuda` and the current device: read where layers and backends are chosen.
- `resq_vllm._C_cuda`: the library of our CUDA kernels, which a PyTorch without CUDA cannot load.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from types import ModuleType, SimpleNamespace

GPU_NAME = "NVIDIA H200"
GPU_BYTES = 143_771 << 20
CUDA_VERSION = "13.0"
EXTENSIONS = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C")


class Op:
    """An op of vLLM's CUDA extension, and each of its overloads."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Op:
        if name.startswith("_"):
            raise AttributeError(name)
        return Op(f"{self._name}.{name}")

    def __call__(self, *_: object) -> bool:
        if "supports" in self._name or "supported" in self._name:
            return True
        raise RuntimeError(f"{self._name} was called: there is no GPU here")


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """Make this process believe in one GPU. Call it before the first import of vLLM."""
    installed = importlib.metadata.version("vllm").partition("+")[0]
    real = importlib.metadata.version
    importlib.metadata.version = lambda distribution_name: (
        installed if distribution_name == "vllm" else real(distribution_name)
    )
    sys.modules.update({name: ModuleType(name) for name in EXTENSIONS})

    import torch

    torch.version.cuda = CUDA_VERSION
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.ops._C = Op("_C")  # type: ignore[attr-defined]
    register_fake = torch.library.register_fake

    def register_fake_of_real_ops(op: object, *arguments: object, **options: object) -> object:
        if str(op).startswith("_C::"):
            return lambda function: function
        return register_fake(op, *arguments, **options)  # type: ignore[arg-type]

    torch.library.register_fake = register_fake_of_real_ops

    import vllm.third_party.pynvml as nvml

    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetCudaComputeCapability": capability,
        "nvmlDeviceGetName": GPU_NAME,
        "nvmlDeviceGetUUID": "GPU-0",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=GPU_BYTES),
    }
    for name, answer in answers.items():
        setattr(nvml, name, lambda *_, answer=answer: answer)

    visible = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import vllm.triton_utils  # noqa: F401

    del os.environ["CUDA_VISIBLE_DEVICES"]
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible

    library = ModuleType("resq_vllm._C_cuda")
    library.archs = "sm_80 sm_90a compute_90"  # type: ignore[attr-defined]
    library.runtime_version = 13000  # type: ignore[attr-defined]
    library.driver_version = lambda: 13000  # type: ignore[attr-defined]
    sys.modules["resq_vllm._C_cuda"] = library
