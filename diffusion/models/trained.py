"""A run's folder as a generator: for what no pipeline of diffusers can say, such as a transformer of pixels."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from diffusion.denoiser import Interval
from diffusion.generator import Generator, Sampler
from visiondistill.engine.state import fingerprint
from visiondistill.publish import reopen


class Trained(Generator):
    """What a run of this package made, built again from its recipe and its newest whole checkpoint.

    The run's data, and a teacher that it had, must still be there, and what its recipe names is imported. An
    export needs none of this: where the run has one, `Pipeline` opens it.

    Args:
        run: the run folder.
        use: "auto" takes the average where one was kept, "raw" what was trained.
        steps, sampler, guidance_scale, guidance_interval, guidance_rescale: as of `Generator`; default the run's own.
        changes: dotted keys of the run's recipe, for files that lie elsewhere by now: `{data.root: photos}`.

    Attributes:
        notes: which weights these are, and the sha256 of the whole generator, for a preflight.

    Raises:
        ValueError: no run folder, no whole checkpoint, a run that cannot be built again, was made by other settings,
            kept no average or made no generator; a sampler or guidance that the generator does not have.
    """

    PROVENANCE: ClassVar = ("run", "notes")

    def __init__(
        self,
        run: str,
        use: Literal["auto", "ema", "raw"] = "auto",
        steps: int | None = None,
        sampler: Sampler | None = None,
        guidance_scale: float | None = None,
        guidance_interval: Interval | None = None,
        guidance_rescale: float | None = None,
        changes: dict[str, Any] | None = None,
    ) -> None:
        opened = reopen(run, use, changes=changes)
        made = opened.product
        if not isinstance(made, Generator):
            raise ValueError(f"run={run}: it made a {type(made).__name__}, which is no generator: name another run")
        super().__init__(
            made.denoiser.eval(),
            made.shape,
            codec=made.codec.eval(),
            conditions=made.conditions,
            steps=steps or made.steps,
            sampler=sampler or made.sampler,
            **made.guidance_but(guidance_scale, guidance_interval, guidance_rescale),
        )
        total = sum(stage.steps for stage in opened.plan.stages)
        self.run = str(run)
        self.notes = (
            f"{opened.weights} weights of {run} after step {opened.restored.step} of {total}, "
            f"sha256 {fingerprint(self.state_dict())}",
        )
