"""The post-training methods that the paper compares with, one file an algorithm.

GPTQ, PB-LLM and BiLLM share a frame (feedback.py) and are run over a model by sequential.py.
omniquant.py calls a library. All of them leave a dense checkpoint with replaced weights
(fake quantization): its perplexity is the method's, its size and speed are not.
"""

from baselines.quantized import Quantized

__all__ = ["Quantized"]
