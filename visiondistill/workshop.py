"""What is done around the training of one kind of product: `classifiers` of ours, others by their own packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from visiondistill.classifiers import Classifiers
from visiondistill.engine import Method, Result, Watch
from visiondistill.preflight import Preflight

if TYPE_CHECKING:
    from visiondistill.export import Exported
    from visiondistill.recipes import Plan


class Workshop(Protocol):
    """The checks before a run, the looks during it, the figures and the export after it.

    A method whose product is no classifier names its own by `Method.workshop`. Networks are what
    `Method.presented` makes of the product.

    Attributes:
        measured_by: the command that measures a run's product again, without the run folder at its end.
    """

    measured_by: str

    def preflight(self, plan: Plan, rehearse: bool = True) -> Preflight:
        """Gather the facts of a plan, and refuse what cannot go well.

        Args:
            rehearse: try the export of the product, too.

        Raises:
            SettingsError: it cannot.
        """
        ...

    def watch(self, plan: Plan) -> Watch | None:
        """How the product does, for `train` to log; None where nobody can tell."""
        ...

    def finish(
        self,
        plan: Plan,
        result: Result,
        network: nn.Module,
        weights: str,
        facts: Preflight,
        config: Mapping[str, Any],
        plots: bool,
    ) -> tuple[dict[str, Any], Exported | None]:
        """Measure, and on the first process write figures and export. Called on all of them.

        Args:
            network, weights: as of `Result.choose`.
            config: the resolved recipe.
            plots: export and draw, too; otherwise figures alone.
        """
        ...

    def export(
        self,
        plan: Plan,
        result: Result,
        network: nn.Module,
        weights: str,
        folder: Path | None,
        about: Mapping[str, Any],
        onnx: bool = False,
    ) -> Exported:
        """Export what a run made, from a checkpoint.

        Args:
            network, weights: as of `Result.choose`.
            folder: default `export` in the run folder.
            about: for the model card: the recipe, and what else there is to say.
            onnx: write model.onnx, too.

        Raises:
            SettingsError: it cannot be.
        """
        ...


def workshop_of(plan: Plan) -> Workshop:
    """The workshop of what a plan makes: of its last stage's method."""
    return workshop_of_kind(plan.kinds[-1])


def workshop_of_kind(method: Callable) -> Workshop:
    """The workshop of a method's class, or of a function that builds a method."""
    return getattr(method, "workshop", Method.workshop)() or Classifiers()
