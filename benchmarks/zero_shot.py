r"""Zero-shot accuracy of a dense or packed model on the paper's six tasks, by lm-eval, offline.

    python benchmarks/zero_shot.py MODEL --data DIR --tasks piqa arc_easy --limit 200

DIR holds one `TASK.jsonl` for each task, with {query, choices, gold} in every line; WinoGrande has
{context_options, continuation, gold}. The prompts are lm-eval's own (`query`, then "\nAnswer:"
where lm-eval asks a question), as far as the files' texts are: these come from MosaicML's set, so
results are close to those of lm-eval's stock tasks, not equal.

The average is over the metrics that the paper reports, by its Float16 rows: length-normalised
accuracy (acc_norm) where lm-eval has it, that is PIQA, HellaSwag and ARC, and plain accuracy (acc)
for BoolQ and WinoGrande. The JSON has both.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import DTYPES, common_parser, logger, machine_facts, positive_int, start, write_json
from perplexity import BACKENDS

ACC, ACC_NORM = "acc", "acc_norm"
# What the prompt ends in, and the metric that the paper reports.
TASKS = {
    "boolq": ("\nAnswer:", ACC),
    "piqa": ("\nAnswer:", ACC_NORM),
    "hellaswag": ("", ACC_NORM),
    "winogrande": ("", ACC),
    "arc_easy": ("\nAnswer:", ACC_NORM),
    "arc_challenge": ("\nAnswer:", ACC_NORM),
}
SUFFIX = "_offline"  # so that nobody takes them for lm-eval's stock tasks
LONGEST = 2048  # tokens of a question with its answer; longer ones lose their beginning


def task_config(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What lm-eval needs to know of a task."""
    from datasets import Dataset

    ending, _ = TASKS[name]
    config: dict[str, Any] = {
        "task": name + SUFFIX,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in (ACC, ACC_NORM)
        ],
    }
    if name == "winogrande":
        # Which beginning makes the same ending likelier: lm-eval takes the gold number as "text".
        config["doc_to_text"] = lambda row: row["gold"]
        config["doc_to_choice"] = lambda row: row["context_options"]
        config["doc_to_target"] = lambda row: row["continuation"]
        config["metric_list"] = config["metric_list"][:1]
    else:
        config["doc_to_text"] = lambda row: row["query"].rstrip() + ending
        config["doc_to_choice"] = lambda row: row["choices"]
        config["doc_to_target"] = lambda row: row["gold"]
    return config


def read_rows(data: Path, task: str) -> list[dict[str, Any]]:
    """The questions of a task.

    Raises:
        ValueError: if the file is not there or a line is not as expected.
    """
    file = data / f"{task}.jsonl"
    if not file.is_file():
        raise ValueError(f"--data: {file} is missing; leave {task} out of --tasks or supply it.")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    wanted = ("context_options", "continuation") if task == "winogrande" else ("query", "choices")
    for number, row in enumerate(rows, start=1):
        for key in (*wanted, "gold"):
            if key not in row:
                raise ValueError(f"{file}, line {number}: {key!r} is missing.")
    return rows


def load_vllm(model: Path, dtype: str) -> Any:
    """The model in vLLM, for lm-eval."""
    # One process, so that nothing outlives the last question.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(
        str(model),
        dtype=dtype,
        max_model_len=_longest(model),
        enable_prefix_caching=False,  # a cached prompt has no logits
        enforce_eager=True,
        max_num_seqs=16,
    )


def load_transformers(model: Path, dtype: str) -> Any:
    """The model in transformers, for lm-eval."""
    import torch
    from lm_eval.models.huggingface import HFLM

    import vllm_bmos.integrations.transformers  # noqa: F401 (registers the quantizer)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HFLM(str(model), dtype=dtype, device=device, max_length=_longest(model), batch_size=8)


def _longest(model: Path) -> int:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return min(LONGEST, int(config.get("max_position_embeddings", LONGEST)))


def evaluate(
    model: Any, data: Path, tasks: Sequence[str], limit: int | None
) -> dict[str, dict[str, Any]]:
    """Accuracies by task.

    Args:
        model: lm-eval's, from one of the loaders.
        data: directory of the tasks' files.
        tasks: names.
        limit: questions of each task, from its beginning; None takes all.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask

    given = {name: read_rows(data, name)[:limit] for name in tasks}
    found = simple_evaluate(
        model,
        tasks=[ConfigurableTask(config=task_config(name, rows)) for name, rows in given.items()],
        log_samples=False,
        bootstrap_iters=0,
    )
    result = {}
    for name, rows in given.items():
        scores = found["results"][name + SUFFIX]
        metrics = {m: scores[f"{m},none"] for m in (ACC, ACC_NORM) if f"{m},none" in scores}
        reported = metrics[TASKS[name][1]]
        error = (reported * (1 - reported) / len(rows)) ** 0.5
        result[name] = {
            **metrics,
            "reported": reported,
            "metric": TASKS[name][1],
            "standard_error": error,
            "questions": len(rows),
        }
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model and ask all questions."""
    from importlib.metadata import version

    for task in args.tasks:
        read_rows(args.data, task)  # before the model is loaded
    began = time.monotonic()
    load = {"vllm": load_vllm, "transformers": load_transformers}[args.backend]
    tasks = evaluate(load(args.model, args.dtype), args.data, args.tasks, args.limit)
    return {
        "model": args.model.name,
        "backend": args.backend,
        "dtype": args.dtype,
        "limit": args.limit,
        "lm_eval": version("lm_eval"),
        "tasks": tasks,
        "average": sum(task["reported"] for task in tasks.values()) / len(tasks),
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine_facts(args.threads),
    }


def main() -> int:
    """Run the command line; returns 2 for wrong use."""
    parser = common_parser((__doc__ or "").partition("\n")[0], "zero_shot.json")
    parser.add_argument("model", type=Path, help="model directory, packed or dense")
    parser.add_argument("--data", type=Path, required=True, help="directory of TASK.jsonl files")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--limit", type=positive_int, help="only the first questions of each task")
    parser.add_argument("--backend", choices=BACKENDS, default="vllm")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    args = parser.parse_args()
    start(args.threads)
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        result = run(args)
    except ImportError as error:
        logger.error("error: %s. pip install 'vllm-bmos[eval]' installs lm-eval.", error)
        return 2
    except ValueError as error:
        logger.error("error: %s", error)
        return 2
    for name, task in result["tasks"].items():
        print(
            f"{name:14} {task['metric']:9} {100 * task['reported']:5.1f} "
            f"+- {100 * task['standard_error']:.1f} %  ({task['questions']} questions)"
        )
    print(f"{'average':24} {100 * result['average']:5.1f} %, {args.backend} {args.dtype}")
    write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
