"""Benchmarks and the demo: real `vllm` processes, measured side by side in one run."""
