"""Runs the comparison prompts through vLLM in a process of its own: compiled, or on several ranks.

usage: python -m tests.engine.run_engine '{"path": ..., "dtype": ..., OPTION: ...}'

Option "adapter" is a LoRA adapter's folder; the others are vLLM's.

Prints the answers as JSON on the last line of stdout.
"""

import dataclasses
import json
import sys
from pathlib import Path

from torch._dynamo.utils import counters

from tests.engine.compare import vllm_answers

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    answers = vllm_answers(Path(options.pop("path")), options.pop("dtype"), **options)
    # With VLLM_ENABLE_V1_MULTIPROCESSING=0 the model runs, and is compiled, in this process.
    print(f"compiled graphs: {counters['stats']['unique_graphs']}")
    print(json.dumps([dataclasses.asdict(answer) for answer in answers]))
