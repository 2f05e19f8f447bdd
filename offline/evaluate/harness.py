"""Our models as lm-eval's language models: any causal model in torch, or a checkpoint served by vLLM."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PretrainedConfig

from offline.evaluate.vllm_engine import machine_options
from resq_vllm.errors import ResQError

logger = logging.getLogger("resq")


class CausalModel:
    """What lm-eval needs of a transformers model, around any function from token ids to logits.

    Args:
        config: of the architecture; the context length is read from it.
        logits: LongTensor [batch, length], padded on the right -> logits [batch, length, vocab], any float type.
        device: where token ids go.

    """

    def __init__(
        self, config: PretrainedConfig, logits: Callable[[torch.Tensor], torch.Tensor], device: str | torch.device
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self._logits = logits
        self._warned = False

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self._logits(input_ids))

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        max_length: int,
        stopping_criteria: Callable[[torch.Tensor, Any], Any],
        do_sample: bool | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Greedy continuation of one sequence [1, length] to at most ``max_length`` tokens, prompt included.

        Without a KV cache: every token runs the whole sequence. Raises ValueError for sampling or a batch.
        """
        if do_sample or len(input_ids) != 1:
            raise ValueError("this model continues one sequence at a time, greedily")
        if not self._warned:
            logger.warning("generating without a KV cache, as this reference model keeps none: slow")
            self._warned = True
        ids = input_ids
        while ids.shape[1] < max_length:
            token = self._logits(ids)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            if bool(torch.as_tensor(stopping_criteria(ids, None)).all()):
                break
        return ids


def torch_lm(model: Any, tokenizer: Any) -> HFLM:
    """A loaded model as an lm-eval model.

    ``model``: a :class:`CausalModel` or a transformers causal language model, the fake-quantized ones included. One
    sequence at a time: fake-quantized attention takes no mask, so nothing may be padded on the left.
    """
    if not isinstance(model, CausalModel):
        # transformers knows no quantization method "resq", and lm-eval would ask it for one.
        model = _without_quantization_config(model)
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, softmax_dtype=torch.float32)


def _without_quantization_config(model: Any) -> Any:
    if getattr(model.config, "quantization_config", None) is not None:
        model.config = copy(model.config)
        del model.config.quantization_config
    return model


def vllm_lm(
    directory: Path, tensor_parallel: int = 1, enforce_eager: bool = False, trust_remote_code: bool = False
) -> Any:
    """The checkpoint in ``directory`` as lm-eval's vLLM model; raises ResQError when vLLM is not installed."""
    options = machine_options(tensor_parallel)
    try:
        from lm_eval.models.vllm_causallms import VLLM
    except ImportError as error:
        raise ResQError(
            f"the vllm engine cannot be imported ({error}); install vLLM or use the reference engine"
        ) from error
    return VLLM(
        pretrained=str(directory),
        tensor_parallel_size=tensor_parallel,
        enforce_eager=enforce_eager,
        batch_size="auto",
        trust_remote_code=trust_remote_code,
        **options,
    )
