"""The defenses that training knows: member kind -> its training loss. A new defense adds its file and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from training import adversarial, bayesian, certified, edge, metric
from training.recipe import MemberKind
from training.step import TrainingLoss

DEFENSES: Mapping[MemberKind, TrainingLoss] = {
    "adversarial": adversarial.training_loss,
    "bayesian": bayesian.training_loss,
    "certified": certified.training_loss,
    "edge": edge.training_loss,
    "metric": metric.training_loss,
}
