"""Runs the stages that fit on text, and gives their result to the converter as a source."""

import hashlib
import logging
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from converters.calibration import Calibration, cut, load_texts, sample
from converters.fitting import BY_BLOCK, block, check_fittable, distill, hessian, stages_up_to
from converters.fitting.block import BlockOptions
from converters.fitting.blocks import BlockModel
from converters.fitting.distributed import is_main, wait_for_all, world_size
from converters.fitting.experts import with_experts
from converters.fitting.folder import FitFolder
from converters.fitting.hessian import HessianOptions
from converters.fitting.self_text import PREFIX as SELF
from converters.fitting.self_text import self_text
from converters.fitting.training import DistillOptions, tokens_of
from converters.pipeline import check_space, check_target, is_complete
from converters.plan import DISCARDED, FOUND, PROCESSES, Plan
from converters.sources import Source
from converters.sources.fitted import FittedSource
from converters.workspace import check_free, work_directory
from vllm_bmos.checkpoint.format import MANIFEST_FILE, REQUIRED, FormatError
from vllm_bmos.checkpoint.reader import Checkpoint

logger = logging.getLogger(__name__)

RESULT = "result"  # the piece of the fit folder that holds a whole stage's tensors
DISTILLED = (distill.QAT, distill.KD_SCALES, distill.EXPERTS)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FitOptions:
    """What the user can choose of a fit.

    Attributes:
        calibration: texts, see `converters.calibration.load_texts`, or self:N for N tokens that
            the dense model writes; empty takes the default.
        start_from: a packed checkpoint that the stage starts from; without it, the stages that
            lead to it are run first.
        windows: of calibration text.
        length: tokens in a window.
        held_out: windows of held-out text to check on.
        seed: of all random choices.
        hessian: of the stage of this name.
        block: of the stage of this name.
        distill: of the stages kd-scales, qat and experts.
    """

    calibration: tuple[str, ...] = ()
    start_from: Path | None = None
    windows: int = 32
    length: int = 1024
    held_out: int = 4
    seed: int = 0
    hessian: HessianOptions = field(default_factory=HessianOptions)
    block: BlockOptions = field(default_factory=BlockOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)


class Fit:
    """One fit: the plan of its conversion, and the work.

    Args:
        plan: of the same conversion by a data-free stage.
        stage: the last stage to run.
        options: see `FitOptions`.

    Attributes:
        plan: of the conversion of what is fitted.
        pieces: the windows for training end to end, which may be shorter than the others.
        block_pieces: those of stage block.

    Raises:
        FormatError: if the source is not a dense model or has no tokenizer.
        CalibrationError: if a text cannot be used.
    """

    def __init__(self, plan: Plan, stage: str, options: FitOptions) -> None:
        stages = list(stages_up_to(stage)) if options.start_from is None else [stage]
        check_fittable(plan, stages)
        self.stage, self.options = stage, options
        self.source = FittedSource(plan.source, stage)
        self.stages = stages
        facts: dict[str, Any] = {}
        if options.start_from is not None:
            start = Checkpoint(options.start_from)
            self.source.tensors = _tensors_of(start, self.source)
            facts["start_from"] = _record(start)
        if not is_main():
            wait_for_all()  # what the first process downloads or generates is then there
        self.text = self._sample(plan)
        if is_main():
            wait_for_all()
        trainings = len(set(DISTILLED) & set(self.stages))
        trained = 0
        if trainings:
            self.pieces = self._cut(self.text.train, options.distill.length)
            # A step has windows of every process.
            facts[PROCESSES] = world_size()
            length = self.pieces.shape[1]
            trained = trainings * tokens_of(options.distill, length, world_size())
        if block.STAGE in self.stages:
            self.block_pieces = self._cut(self.text.train[: options.windows], options.block.length)
        before = facts.get("start_from", {"stages": [], "trained_tokens": 0})
        used = {"distill" if name in DISTILLED else name for name in self.stages}
        provenance = {
            **facts,
            "stage": stage,
            "stages": [*before["stages"], *self.stages],
            "trained_tokens": before["trained_tokens"] + trained,
            "calibration": self.text.record,
            "fit": {name: asdict(getattr(options, name)) for name in sorted(used)},
        }
        self.plan = replace(plan, source=self.source).with_provenance(provenance)

    def _sample(self, plan: Plan) -> Calibration:
        tokenizer = tokenizer_of(plan)
        options = self.options
        own = [name for name in options.calibration if name.startswith(SELF)]
        others = [name for name in options.calibration if not name.startswith(SELF)]
        texts = load_texts(others) if others or not own else []
        texts += [self_text(plan.source, tokenizer, name, options.seed) for name in own]
        windows = options.windows
        if set(DISTILLED) & set(self.stages):
            windows = max(windows, options.distill.tokens // options.length)
        text = sample(texts, tokenizer, windows, options.held_out, options.length, options.seed)
        if windows > options.windows and BY_BLOCK & set(self.stages):
            text.record["windows_by_block"] = min(options.windows, len(text.train))
        return text

    def _cut(self, windows: torch.Tensor, length: int) -> torch.Tensor:
        """Windows as shorter ones of a length, or as they are if they are no longer than that."""
        return cut(windows, min(length, windows.shape[1]), self.text.bos)

    def run(self, target: Path, resume: bool, threads: int = 0) -> None:
        """Fit, or continue to; then `plan` can be converted.

        Under torchrun every process runs this. The first one alone writes and does what has no
        use for more processes, while the others wait.

        Args:
            target: DST; the work is kept in DST.fit until `finish`.
            resume: whether to continue an interrupted fit.
            threads: 0 takes one per core.

        Raises:
            TargetError: if DST or DST.fit cannot be used.
        """
        target = target.absolute()
        check_target(self.plan, target)
        if resume and is_complete(self.plan, target):
            before = Checkpoint(target).config.provenance
            self.plan = self.plan.with_provenance({n: before[n] for n in FOUND if n in before})
            return
        if is_main():
            check_free(target)
            check_space(self.plan, work_directory(target))  # for the result, which is written last
        facts = {
            "plan": self.plan.fingerprint(),
            "torch": torch.__version__,
            "provenance": self.plan.config.provenance,  # in the plan, but there for people to read
        }
        folder = FitFolder(target, facts, resume)
        discarded = list(self.plan.config.provenance.get("start_from", {}).get(DISCARDED, []))
        with folder if is_main() else nullcontext(folder):  # other processes only read
            for stage in self.stages:
                start = self.source.tensors
                self._run_stage(stage, folder, threads)
                if stage in DISTILLED and _equal(start, self.source.tensors):
                    discarded.append(stage)
        if discarded:
            self.plan = self.plan.with_provenance({DISCARDED: discarded})
        E = self.source.experts
        self.source.tensors = with_experts(self.source.tensors, self.source.modules, E)

    def _run_stage(self, stage: str, folder: FitFolder, threads: int) -> None:
        """Set the source's tensors to a stage's result."""
        together = stage in DISTILLED
        if is_main():
            logger.info("stage %s", stage)
            if not together and folder.read(stage, RESULT) is None:
                folder.write(stage, RESULT, self._fit(stage, folder, threads))
        wait_for_all()
        done = folder.read(stage, RESULT)
        if done is None:
            done = self._distill(stage, folder, threads)
            if is_main():
                folder.write(stage, RESULT, done)
        self.source.tensors = done

    def _fit(self, stage: str, folder: FitFolder, threads: int) -> Tensors:
        """Run a stage that goes block by block."""
        model = BlockModel(self.source.dense)
        scale_dtype = getattr(torch, self.source.scale_dtype)
        train, options = self.text.train[: self.options.windows], self.options
        if stage == hessian.STAGE:
            return hessian.fit(model, train, 1, scale_dtype, folder, options.hessian, threads)
        start = with_experts(self.source.tensors, self.source.modules, 1)
        return block.fit(
            model,
            start,
            self.block_pieces,
            self.text.held_out,
            scale_dtype,
            folder,
            options.block,
            options.seed,
        )

    def _distill(self, stage: str, folder: FitFolder, threads: int) -> Tensors:
        """Run a stage that trains end to end, together with the other processes."""
        return distill.fit(
            self.source.dense,
            self.source.tensors,
            self.pieces,
            self.text.held_out,
            folder.directory(stage),
            self.options.distill,
            stage,
            self.source.experts,
            self.options.seed,
            threads,
        )

    def finish(self, target: Path) -> None:
        """Delete DST.fit: the checkpoint that was made of it is complete."""
        FitFolder.delete(FitFolder.path(target.absolute()))


def _equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def tokenizer_of(plan: Plan) -> Any:
    """The tokenizer of a source, from the files that the conversion would put beside the result.

    Raises:
        FormatError: if transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, data in plan.side_files.items():
            (Path(folder) / name).write_bytes(data)
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise FormatError(
                f"{plan.source.path} has no tokenizer that transformers can load ({error}); "
                "fitting on text needs one."
            ) from None


def _tensors_of(start: Checkpoint, source: Source) -> Tensors:
    """A packed checkpoint's layers, as a start for fitting a source.

    Raises:
        FormatError: if they are not the source's, or have another number of experts than one or E.
    """
    name = start.path
    if start.config.output_norm is not None or dict(start.shapes) != source.modules:
        raise FormatError(f"--start-from {name}: its layers are not those of {source.path}.")
    if start.config.num_experts not in (1, source.experts):
        raise FormatError(
            f"--start-from {name} has {start.config.num_experts} experts; expected 1 or "
            f"--experts {source.experts}."
        )
    return {
        full: start.tensor(full)
        for module in source.modules
        for full in start.specs
        if full.startswith(f"{module}.") and full.rpartition(".")[2] in REQUIRED
    }


def _record(start: Checkpoint) -> dict[str, Any]:
    """What the provenance says of the checkpoint that a fit started from."""
    data = (start.path / MANIFEST_FILE).read_bytes()
    before = start.config.provenance  # of any writer: only the format's own parts are certain
    stages, trained = before.get("stages"), before.get("trained_tokens")
    discarded = before.get(DISCARDED)
    return {
        **before,
        DISCARDED: discarded if isinstance(discarded, list) else [],
        "stages": stages if isinstance(stages, list) and stages else [before.get("stage")],
        "trained_tokens": trained if isinstance(trained, int) else 0,
        "name": start.path.resolve().name,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
