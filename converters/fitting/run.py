"""Runs the stages that fit on text, and gives their result to the converter as a source."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from converters.calibration import Calibration, load_texts, sample
from converters.fitting import FITTED_STAGES, distill, hessian
from converters.fitting.blocks import BlockModel
from converters.fitting.distill import DistillOptions
from converters.fitting.folder import FitFolder
from converters.fitting.hessian import HessianOptions, layer_of
from converters.pipeline import check_target, is_complete
from converters.plan import Plan
from converters.sources import Source
from converters.sources.base import PackedLayer
from converters.workspace import check_free
from vllm_bmos.checkpoint.format import FormatError

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FitOptions:
    """What the user can choose of a fit.

    Attributes:
        calibration: texts, see `converters.calibration.load_texts`; empty takes the default.
        windows: of calibration text.
        length: tokens in a window.
        seed: of all random choices.
        hessian: of the stage of this name.
        distill: of the stages kd-scales and qat.
    """

    calibration: tuple[str, ...] = ()
    windows: int = 32
    length: int = 1024
    seed: int = 0
    hessian: HessianOptions = field(default_factory=HessianOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)


class FittedSource(Source):
    """A dense source whose layers come from a fit.

    Args:
        dense: the dense source.
        stage: the last stage of the fit.

    Attributes:
        tensors: the fitted layers' tensors by full name; empty until the fit is done.
    """

    def __init__(self, dense: Source, stage: str) -> None:
        self.dense, self.tensors = dense, dict[str, torch.Tensor]()
        self.kind = dense.kind  # type: ignore[misc]
        self.path, self.files, self.store = dense.path, dense.files, dense.store
        self.config, self.modules = dense.config, dense.modules
        self.experts, self.scale_dtype = dense.experts, dense.scale_dtype
        self.license, self.output_norm = dense.license, dense.output_norm
        self.stage = stage

    @property
    def suffixes(self) -> tuple[str, ...]:
        """See `Source`."""
        return self.dense.suffixes

    def layer(self, module: str) -> PackedLayer:
        """The fitted layer; it has no zeros, as its signs were chosen."""
        return PackedLayer(layer_of(self.tensors, module), 0)


class Fit:
    """One fit: the plan of its conversion, and the work.

    Args:
        plan: of the same conversion by a data-free stage.
        stage: the last stage to run.
        options: see `FitOptions`.

    Attributes:
        plan: of the conversion of what is fitted.

    Raises:
        FormatError: if the source is not a dense model or has no tokenizer.
        CalibrationError: if a text cannot be used.
    """

    def __init__(self, plan: Plan, stage: str, options: FitOptions) -> None:
        if plan.source.stage is None:
            raise FormatError(
                f"--stage {stage}: {plan.source.path} is binary already; only a dense model can "
                "be fitted. Leave --stage out."
            )
        self.stage, self.options = stage, options
        self.text = self._sample(plan)
        self.source = FittedSource(plan.source, stage)
        provenance = {
            **plan.config.provenance,
            "stage": stage,
            "stages": list(stages_up_to(stage)),
            "calibration": self.text.record,
            "fit": {"hessian": asdict(options.hessian), **self._distillation()},
        }
        self.plan = replace(
            plan, source=self.source, config=replace(plan.config, provenance=provenance)
        )

    @property
    def _distills(self) -> bool:
        return bool({distill.QAT, distill.KD_SCALES}.intersection(stages_up_to(self.stage)))

    def _distillation(self) -> dict[str, Any]:
        return {"distill": asdict(self.options.distill)} if self._distills else {}

    def _sample(self, plan: Plan) -> Calibration:
        import tempfile

        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            for name, data in plan.side_files.items():
                (Path(folder) / name).write_bytes(data)
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder)
            except (OSError, ValueError) as error:
                raise FormatError(
                    f"{plan.source.path} has no tokenizer that transformers can load ({error}); "
                    "fitting on text needs one."
                ) from None
        options = self.options
        texts = load_texts(options.calibration)
        windows = options.windows
        if self._distills:
            windows = max(windows, options.distill.tokens // options.length)
        return sample(texts, tokenizer, windows, 4, options.length, options.seed)

    def run(self, target: Path, resume: bool, threads: int = 0) -> None:
        """Fit, or continue to; then `plan` can be converted.

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
            return
        check_free(target)
        facts: dict[str, Any] = {
            "plan": self.plan.fingerprint(),
            "torch": torch.__version__,
        }
        with FitFolder(target, facts, resume) as folder:
            for stage in stages_up_to(self.stage):
                logger.info("stage %s", stage)
                self.source.tensors = self._run_stage(stage, folder, threads)

    def _run_stage(self, stage: str, folder: FitFolder, threads: int) -> Tensors:
        dense = self.source.dense
        scale_dtype = getattr(torch, self.source.scale_dtype)
        if stage == "hessian":
            return hessian.fit(
                BlockModel(dense),
                self.text.train[: self.options.windows],
                self.source.experts,
                scale_dtype,
                folder,
                self.options.hessian,
                threads,
            )
        if stage in (distill.QAT, distill.KD_SCALES):
            done = folder.read(stage, "result")
            if done is None:
                done = distill.fit(
                    dense,
                    self.source.tensors,
                    self.text.train,
                    self.text.held_out,
                    folder.directory(stage),
                    self.options.distill,
                    self.options.seed,
                    train_signs=stage == distill.QAT,
                )
                folder.write(stage, "result", done)
            return done
        raise ValueError(f"unknown stage {stage!r}; the stages are {', '.join(FITTED_STAGES)}")

    def finish(self, target: Path) -> None:
        """Delete DST.fit: the checkpoint that was made of it is complete."""
        root = FitFolder.path(target.absolute())
        if root.exists():
            FitFolder.delete(root)


def stages_up_to(stage: str) -> Iterator[str]:
    """The stages that lead to one, in order."""
    before = FITTED_STAGES[stage]
    if before is not None:
        yield from stages_up_to(before)
    yield stage
