"""What `quality.py` compares: how each method's model is made, and its bits per weight."""

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import REPOSITORY, run_of, write_json
from quantize import BY_LAYER, FLOAT16, OMNIQUANT, REPORT

from converters.calibration import CACHE, MEMBERS
from converters.fitting import FITTED_STAGES, STAGES, distill
from vllm_bmos.checkpoint.container import spec_bytes
from vllm_bmos.checkpoint.format import CONFIG_FILE
from vllm_bmos.checkpoint.reader import Checkpoint

QUANTIZE = REPOSITORY / "benchmarks" / "quantize.py"
CONVERT = REPOSITORY / "converters" / "hf_to_bmos.py"
PAPER, EXPERTS, CALIBRATION = "paper", "experts", "calibration"
COMPARISONS = (PAPER, EXPERTS, CALIBRATION)
# Stages whose experts are equal: any E is OneBit.
EQUAL_EXPERTS = tuple(stage for stage in (*STAGES, *FITTED_STAGES) if stage != distill.EXPERTS)
NAMES = {
    FLOAT16: "Float16",
    "gptq": "GPTQ, 2 bit, groups of 128",
    "pb-llm": "PB-LLM, 10 % salient",
    "billm": "BiLLM",
    OMNIQUANT: "OmniQuant class, 2 bit, groups of 128",
}


class MethodError(RuntimeError):
    """A method's command failed; its own messages are above."""


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        key: names it on the command line, on disk and in the results.
        name: for tables.
        baseline: a method of `quantize.py`, or None for BinaryMoS.
        stage: of the converter, for BinaryMoS.
        E: experts, for BinaryMoS.
        texts: calibration texts in place of those of the command line.
    """

    key: str
    name: str
    baseline: str | None = None
    stage: str | None = None
    E: int | None = None
    texts: tuple[str, ...] = ()

    @property
    def start(self) -> "Method | None":
        """The method whose model this one starts from, so that rows share it."""
        before = FITTED_STAGES.get(self.stage) if self.stage else None
        if before is None:
            return None
        return _ours(before, 1, *self.texts)  # until their own stage all experts are equal

    @property
    def starts(self) -> "Iterator[Method]":
        """All methods that lead to this one, the last of them first."""
        if self.start is not None:
            yield self.start
            yield from self.start.starts

    @property
    def trains(self) -> bool:
        """Whether it uses `--tokens` on top of the calibration windows."""
        return self.stage in (distill.KD_SCALES, distill.QAT, distill.EXPERTS)

    @property
    def looks_at_text(self) -> bool:
        """Whether calibration windows decide its result."""
        return self.baseline != FLOAT16 and self.stage not in STAGES


def methods(comparison: str, stage: str | None = None, texts: Sequence[str] = ()) -> list[Method]:
    """The methods of a comparison.

    Args:
        comparison: one of COMPARISONS.
        stage: of the ablation over calibration texts; `qat` if not given. The one over E is of
            the only stage whose experts differ.
        texts: which that ablation takes one by one, and together; C4 and Wikipedia if not given.

    Raises:
        ValueError: if two texts have the same name, which rows are known by.
    """
    if comparison == EXPERTS:
        return [_ours(distill.EXPERTS, E) for E in (1, 2, 4, 8)]
    if comparison == CALIBRATION:
        stage = stage or distill.QAT
        E = 1 if stage in EQUAL_EXPERTS else 4
        texts = texts or [str(CACHE / name) for name in MEMBERS]
        labels = [_label(text) for text in texts]
        if len(set(labels)) < len(labels):
            raise ValueError(f"--calibration: expected texts of different names, found {labels}.")
        return [*(_ours(stage, E, text) for text in texts), _ours(stage, E)]
    baselines = (FLOAT16, OMNIQUANT, *BY_LAYER)
    return [*(Method(name, NAMES[name], baseline=name) for name in baselines), *_stages()]


def _stages() -> Iterator[Method]:
    for stage in (*STAGES, *FITTED_STAGES):
        for E in (1,) if stage in EQUAL_EXPERTS else (1, 4):
            yield _ours(stage, E)


def _label(text: str) -> str:
    """What rows call a calibration text."""
    return Path(text).name.partition(".")[0]


def _ours(stage: str, E: int, text: str = "") -> Method:
    name = ("OneBit" if E == 1 else f"BinaryMoS, E={E}") + f", {stage}"
    key = f"{stage}-e{E}"
    if text:
        label = _label(text)
        return Method(f"{key}-{label}", f"{name}, {label} only", None, stage, E, (text,))
    return Method(key, name, None, stage, E)


def command(
    method: Method,
    model: Path,
    target: Path,
    fit: dict[str, Any],
    threads: int,
    start: Path | None = None,
) -> list[str]:
    """The command that makes a method's model; run again, it continues.

    Args:
        method: the method.
        model: the dense model.
        target: directory to write.
        fit: the settings of `quality.py` that decide the result.
        threads: that it may use.
        start: the model that it starts from, where there is one.
    """
    convert = [sys.executable, str(CONVERT), str(model), str(target), "--resume"]
    convert += ["--stage", str(method.stage), "--experts", str(method.E), "--jobs", str(threads)]
    if method.baseline is None and not method.looks_at_text:
        return convert
    flags = ["--length", str(fit["length"]), "--seed", str(fit["seed"])]
    if not method.trains:  # which is on --tokens
        flags += ["--windows", str(fit["windows"])]
    if start is not None:
        flags += ["--start-from", str(start)]
    for text in method.texts or fit["calibration"]:
        flags += ["--calibration", text]
    if method.baseline is not None:
        flags += ["--steps", str(fit["steps"]), "--batch", str(fit["batch"])]
        flags += ["--threads", str(threads)]
        return [sys.executable, str(QUANTIZE), method.baseline, str(model), str(target), *flags]
    return [*convert, *flags, *(("--tokens", str(fit["tokens"])) if method.trains else ())]


def make(
    method: Method,
    model: Path,
    target: Path,
    fit: dict[str, Any],
    threads: int,
    made: Mapping[str, Path],
) -> dict[str, Any] | None:
    """Make a method's model, and before it what it starts from, unless they are there.

    Args:
        method: the method.
        model: the dense model.
        target: directory to write; what it starts from is written beside it.
        fit: the settings of `quality.py` that decide the result.
        threads: that it may use.
        made: models that were made elsewhere, by the key of their method.

    Returns:
        `seconds` and `cpu_seconds` of the runs that led to the model, `peak_rss_bytes`, and
        whether these were the `whole` runs; None where that is not known.

    Raises:
        MethodError: if a command fails.
        ValueError: if what is there was begun with other settings, or by something else.
    """
    if method.key in made:
        check_made(method, made[method.key], fit)
        return None
    if method.start is None:
        return _make(method, model, target, fit, threads, None)
    start = made.get(method.start.key, target.with_name(method.start.key))
    before = make(method.start, model, start, fit, threads, made)
    own = _make(method, model, target, fit, threads, start)
    if before is None or own is None:
        return None
    effort = {what: round(before[what] + own[what], 1) for what in ("seconds", "cpu_seconds")}
    effort["peak_rss_bytes"] = max(before["peak_rss_bytes"], own["peak_rss_bytes"])
    return effort | {"whole": before["whole"] and own["whole"]}


def _make(
    method: Method,
    model: Path,
    target: Path,
    fit: dict[str, Any],
    threads: int,
    start: Path | None,
) -> dict[str, Any] | None:
    """Make one model, unless it is there; what that took, or None where it is not known."""
    record = target.with_name(f"{target.name}.settings.json")
    effort = target.with_name(f"{target.name}.effort.json")
    now = {"model": model.name, **settings_of(method, fit)}
    whole = not target.with_name(target.name + ".fit").exists() and not target.exists()
    if not whole:
        before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
        if before != now:
            raise ValueError(
                f"{method.key}: {target} was begun with {before or 'settings of its own'}, not "
                f"with {now}. Remove it, give another --work, or name it with --made."
            )
    if (target / (REPORT if method.baseline else CONFIG_FILE)).exists():
        return dict(json.loads(effort.read_text(encoding="utf-8"))) if effort.exists() else None
    effort.unlink(missing_ok=True)  # of a model that was removed
    write_json(record, now)  # before the model, which may be there when this process is killed
    began = time.monotonic()
    line = command(method, model, target, fit, threads, start)
    process = subprocess.Popen(line, stdout=sys.stderr)
    usage = run_of(process)
    if process.returncode != 0:
        raise MethodError(f"{method.key} ended with status {process.returncode}; see above")
    took = {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "whole": whole,
    }
    write_json(effort, took)
    return took


def settings_of(method: Method, fit: dict[str, Any]) -> dict[str, Any]:
    """Those of `quality.py`'s settings that decide a method's result."""
    if not method.looks_at_text:
        return {}
    used = {what: fit[what] for what in ("windows", "length", "seed")}
    used["texts"] = text_names(method.texts or fit["calibration"] or MEMBERS)
    if method.trains:
        used["tokens"] = fit["tokens"]
    if method.baseline == OMNIQUANT:
        used |= {what: fit[what] for what in ("steps", "batch")}
    return used


def text_names(texts: Iterable[str]) -> list[str]:
    """What calibration texts are called in records, wherever their files are."""
    return [text if text.startswith("hf:") else Path(text).name for text in texts]


def trained_tokens(target: Path) -> int:
    """On how many tokens a model was trained beyond calibration, in all stages that led to it."""
    if (target / REPORT).exists():
        return 0
    return int(Checkpoint(target).config.provenance.get("trained_tokens", 0))


def check_made(method: Method, target: Path, fit: dict[str, Any]) -> None:
    """Check that a model was made by a method, on the same calibration windows.

    The model says by itself how it was made: `quantization.json` or the checkpoint's provenance.

    Args:
        method: the method.
        target: the model.
        fit: the settings of `quality.py` that decide the result.

    Raises:
        ValueError: if it was made otherwise.
    """
    if (target / REPORT).exists():
        found = json.loads((target / REPORT).read_text(encoding="utf-8"))
        said: dict[str, Any] = {"method": found["method"]}
        wanted: dict[str, Any] = {"method": method.baseline}
    else:
        config = Checkpoint(target).config
        found = config.provenance
        said = {"stage": found.get("stage"), "E": config.num_experts}
        wanted = {"stage": method.stage, "E": method.E}
    if method.looks_at_text:
        shared = ("windows", "length", "seed")  # what else there is, other runs may have otherwise
        settings = settings_of(method, fit)
        wanted |= {what: settings[what] for what in (*shared, "texts")}
        record = found.get("calibration", {})
        said |= {what: record.get(what) for what in shared}
        said["texts"] = [text["name"] for text in record.get("texts", [])]
        if method.trains:  # whose record counts the windows of training
            said["windows"] = wanted["windows"]
    if said != wanted:
        raise ValueError(f"{method.key}: {target} was made by {said}, not by {wanted}.")


def bits_per_weight(target: Path) -> dict[str, float]:
    """Stored and published bits per quantized weight of a model that a method made.

    `bits` counts all that has to be stored for the quantized layers. `published_bits` is what the
    method's own paper counts; for OneBit and BinaryMoS that is the same.
    """
    report = target / REPORT
    if report.exists():
        found = json.loads(report.read_text(encoding="utf-8"))
        return {what: float(found[what]) for what in ("bits", "published_bits")}
    checkpoint = Checkpoint(target)
    inside = tuple(f"{module}." for module in checkpoint.config.modules)
    stored = sum(spec_bytes(s) for name, s in checkpoint.specs.items() if name.startswith(inside))
    bits = 8 * stored / sum(N * K for N, K in checkpoint.shapes.values())
    return {"bits": bits, "published_bits": bits}
