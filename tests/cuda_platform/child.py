"""`python -m tests.cuda_platform.child SPECS`: what vLLM decides on its CUDA platform, as JSON on the last line.

SPECS is JSON: {"capability": [major, minor], "engines": [{"model": folder, "options": of EngineArgs}]}.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cuda_platform import fake

# What a model of either shape can leave for the cache on the card of benchmarks/gpu_serve.sh.
KV_BYTES = 64 << 30


def decide(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """vLLM's decisions, in the order in which an engine takes them; nothing is allocated on a device."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    config = EngineArgs(model=model, skip_tokenizer_init=True, load_format="dummy", **options).create_engine_config()
    with set_current_vllm_config(config):
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            network = initialize_model(config)
        current_platform.update_block_size_for_backend(config)
        specs = get_kv_cache_spec(config)
        layers = [module for module in network.modules() if isinstance(module, Attention)]
        backends = list(dict.fromkeys(layer.get_attn_backend() for layer in layers))
        layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
        layout = resolve_kv_cache_layout(config, [layouts], specs.values())
        (kv,) = get_kv_cache_configs(config, [specs], [KV_BYTES])
        spec = next(iter(specs.values()))
        graphs = [backend.get_builder_cls().get_cudagraph_support(config, spec).name for backend in backends]
    mode = config.compilation_config.cudagraph_mode.name
    return {
        "platform": current_platform.device_name,
        "runner": 2 if config.use_v2_model_runner else 1,
        "linear_methods": sorted(
            {type(module.quant_method).__name__ for module in network.modules() if isinstance(module, LinearBase)}
        ),
        "backends": [layer.get_attn_backend().get_name() for layer in layers],
        "graphs": {"mode": mode, "support": graphs},
        "capture_sizes": config.compilation_config.cudagraph_capture_sizes,
        "fusion": getattr(config.quant_config, "fusion", None),
        "passes": [
            type(found).__name__
            for key, found in config.compilation_config.inductor_compile_config.items()
            if key == current_platform.pass_key
        ],
        "layout": layout.name,
        "block_size": config.cache_config.block_size,
        "num_gpu_blocks": kv.num_blocks,
        "kv_tokens": get_kv_cache_capacity(config, kv)[0],
    }


def main() -> None:
    """Print a list: for every engine its decisions, or {"refused": sentence} from vLLM or the plugin."""
    given = json.loads(sys.argv[1])
    fake.install(tuple(given["capability"]))
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    from resq_vllm.plugin import register

    register()
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"file://{Path(folder) / 'store'}", 0, "gloo")
            initialize_model_parallel(1, 1)
        for engine in given["engines"]:
            try:
                answers.append(decide(**engine))
            except ValueError as error:
                answers.append({"refused": str(error)})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
