"""vllm-bmos: serve 1-bit BinaryMoS language models with vLLM."""

__version__ = "0.1.0"
