"""Weight quantization: per-output-channel symmetric codes for a low and a high part, by GPTQ or round-to-nearest."""

from offline.quantize.gptq import HessianFactor, factorise
from offline.quantize.hessian import HessianAccumulator, weighted_error
from offline.quantize.mixed import QuantizedLinear, quantize_linear

__all__ = ["HessianAccumulator", "HessianFactor", "QuantizedLinear", "factorise", "quantize_linear", "weighted_error"]
