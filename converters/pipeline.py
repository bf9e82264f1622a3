"""Runs a plan: convert tensor by tensor, verify what was written, publish it in one rename."""

import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from converters.fitting.folder import FitFolder
from converters.fitting.threads import one_thread_per_op
from converters.locked import TargetError
from converters.model_card import model_card
from converters.plan import FOUND, ZEROS, Job, Plan
from converters.progress import Progress
from converters.side_files import README
from converters.workspace import Workspace, work_directory
from vllm_bmos.checkpoint.container import spec_bytes
from vllm_bmos.checkpoint.format import CONFIG_FILE, SCALES, TORCH_DTYPES
from vllm_bmos.checkpoint.reader import Checkpoint
from vllm_bmos.checkpoint.verify import check_finite, verify
from vllm_bmos.checkpoint.writer import CheckpointWriter, write_bytes, write_json

logger = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20  # headers, JSON files and the file system's own needs


def convert(plan: Plan, target: Path, *, resume: bool = False, workers: int = 0) -> dict[str, int]:
    """Convert `plan.source` to a packed checkpoint at `target`.

    Args:
        plan: from `make_plan`.
        target: DST; it appears when everything is written and verified, or not at all.
        resume: continue an interrupted conversion of the same plan.
        workers: threads; 0 takes one per core.

    Returns:
        By module, the zeros of its weight that became +1, where there are any.

    Raises:
        FormatError: if the source is malformed.
        TargetError: if DST cannot be used, or has no room.
        OSError: if the disk fills up or is not writable.
    """
    target = target.absolute()
    check_target(plan, target)
    if resume and is_complete(plan, target):
        logger.info("%s is complete already", target)
        Workspace.delete(work_directory(target))
        return {}
    with Workspace(target, plan.fingerprint(), resume) as work:
        check_space(plan, work.root)
        writer = CheckpointWriter(work.checkpoint, plan.specs, plan.options.max_shard_size)
        try:
            _run(plan, work, writer, workers or len(os.sched_getaffinity(0)))
            zeros = {n: line["zeros"] for n, line in work.finished.items() if line["zeros"]}
            writer.finish()
        finally:
            writer.close()
        for name, data in plan.side_files.items():
            write_bytes(work.checkpoint / name, data)
        found = {ZEROS: sum(zeros.values())}
        write_bytes(work.checkpoint / README, model_card(plan, {}).encode())
        write_json(work.checkpoint / CONFIG_FILE, plan.model_config(found))
        progress = Progress("verify", plan.bytes)
        verify(work.checkpoint, lambda name: progress.add(spec_bytes(writer.specs[name])))
        progress.close()
        work.publish()
    return zeros


def check_target(plan: Plan, target: Path) -> None:
    """Raise TargetError if writing `target` could touch the source."""
    source = plan.source.path.resolve()
    if target.resolve() == source or source in target.resolve().parents:
        raise TargetError(f"{target} lies inside the source {source}. Choose another DST.")
    for folder in (work_directory(target), FitFolder.path(target)):
        if folder.resolve() in (source, *source.parents):
            raise TargetError(
                f"The source {source} lies in {folder}, where the converter works. Choose another "
                "DST."
            )


def is_complete(plan: Plan, target: Path) -> bool:
    """Whether an earlier run of this same plan has published `target`."""
    if not (target / CONFIG_FILE).is_file():
        return False
    found = Checkpoint(target)
    before = found.config.provenance
    provenance = {name: before[name] for name in FOUND if name in before}
    return found.model_config == plan.model_config(provenance) and found.specs == plan.specs


def check_space(plan: Plan, root: Path) -> None:
    """Raise TargetError if there is no room for what is still to be written to `root`."""
    allocated = sum(file.stat().st_blocks * 512 for file in root.rglob("*") if file.is_file())
    side = sum(map(len, plan.side_files.values()))
    needed = max(0, plan.bytes + side - allocated) + SPARE_BYTES
    folder = next(parent for parent in root.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TargetError(
            f"{folder}: the result needs {needed / 1e9:.2f} GB, the file system has "
            f"{free / 1e9:.2f} GB free. Make room or choose another DST."
        )


def _run(plan: Plan, work: Workspace, writer: CheckpointWriter, workers: int) -> None:
    """Do every job that an interrupted run has not done."""
    with one_thread_per_op(), ThreadPoolExecutor(workers) as pool:
        adopted = _adopted(plan, work, writer, pool)
        todo = [job for job in plan.jobs if job.name not in adopted]
        done = plan.source_bytes - sum(job.source_bytes for job in todo)
        if adopted:
            logger.info("resuming: %d of %d jobs are done", len(adopted), len(plan.jobs))
        progress = Progress("convert", plan.source_bytes, done)
        futures: dict[Future[dict[str, Any]], Job] = {
            pool.submit(_do, job, plan, writer): job for job in todo
        }
        try:
            for future in as_completed(futures):
                work.record(future.result())
                progress.add(futures[future].source_bytes)
        finally:  # after an error or Ctrl-C, jobs that run end and the rest never starts
            pool.shutdown(wait=True, cancel_futures=True)
            progress.close()


def _adopted(
    plan: Plan, work: Workspace, writer: CheckpointWriter, pool: ThreadPoolExecutor
) -> set[str]:
    """Names of the jobs whose journalled tensors are intact on the disk."""

    def intact(job: Job) -> bool:
        line = work.finished.get(job.name)
        return (
            line is not None
            and line["sha256"].keys() == job.specs.keys()
            and all(writer.adopt(name, sha256) for name, sha256 in line["sha256"].items())
        )

    kept = pool.map(intact, plan.jobs)
    return {job.name for job, keep in zip(plan.jobs, kept, strict=True) if keep}


def _do(job: Job, plan: Plan, writer: CheckpointWriter) -> dict[str, Any]:
    """Convert one job and write its tensors; return its journal line."""
    if not job.packs:
        sha256 = {job.name: writer.write_chunks(job.name, plan.source.store.chunks(job.name))}
        return {"job": job.name, "zeros": 0, "sha256": sha256}
    layer = plan.source.layer(job.name)
    sha256 = {}
    for suffix, tensor in layer.tensors.items():
        name = f"{job.name}.{suffix}"
        if suffix in SCALES:
            tensor = cast_scale(name, tensor, TORCH_DTYPES[job.specs[name].dtype])
        sha256[name] = writer.write(name, tensor)
    return {"job": job.name, "zeros": layer.zeros, "sha256": sha256}


def cast_scale(name: str, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round scales to the checkpoint's scale dtype.

    Raises:
        FormatError: if a value is not finite there.
    """
    rounded = scale.to(dtype)
    check_finite(name, rounded)
    return rounded
