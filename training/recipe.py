"""A recipe: everything that decides what training produces, as YAML checked by pydantic."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.ensemble import DetectorName
from models.networks import NETWORKS
from training.augment import Symmetry
from training.refused import TrainingRefused


class Frozen(BaseModel):
    """Settings: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataRecipe(Frozen):
    """Which images, and which share of them does what."""

    source: str = Field(description="a hub id, a folder that `datasets.load_dataset` reads, or a folder of class folders")
    revision: str | None = Field(None, description="revision of the hub data set")
    train: str = Field("train", description="split to train on, or several with a + between")
    test: str | int = Field("test", description="split that is only ever scored, or how many training images to hold out")
    calibration: str | int = Field(
        "validation", description="split of the detector tables, or how many training images to hold out"
    )
    held_out: float = Field(0.1, gt=0, lt=0.5, description="share of training images for early stopping, temperatures and weights")
    split_seed: int = Field(42, description="seed of the stratified splits")
    symmetry: Symmetry = Field("mirror", description="none, mirror (left-right), or dihedral (flips and right-angle rotations)")
    shift: int = Field(2, ge=0, description="largest random shift in pixels")

    @property
    def training_splits(self) -> list[str]:
        """The names in `train`, one a split."""
        return self.train.split("+")

    @model_validator(mode="after")
    def _every_image_has_one_use(self) -> Self:
        names = [*self.training_splits, *(name for name in (self.test, self.calibration) if isinstance(name, str))]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"train, test and calibration should share no split, but {', '.join(repeated)} is named twice; to train on it "
                f"and keep some of its images back, say how many, as in `calibration: 2000`"
            )
        return self


class AttackRecipe(Frozen):
    """The inner attack of adversarial training: PGD from a random start, the last iterate."""

    steps: int = Field(1, ge=1)
    epsilon_factor: float = Field(1.0, gt=0, description="inner radius as a multiple of the recipe's epsilon")
    step_factor: float = Field(1.25, gt=0, description="step as a multiple of the inner radius")


class Schedule(Frozen):
    """Optimisation: one cycle of the learning rate, averaged weights."""

    epochs: int = Field(30, ge=1)
    batch_size: int = Field(128, ge=2)
    learning_rate: float = Field(0.1, gt=0)
    warm_up: float = Field(0.2, gt=0, lt=1, description="share of steps in which the learning rate rises")
    fall_from: float = Field(0.0, ge=0, lt=1, description="share of steps from which it falls; at its peak until then")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="sgd: with Nesterov momentum and weight decay; adam: neither")
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ema_decay: float = Field(0.998, ge=0, lt=1, description="decay of the weight average per step")
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        for name in ("momentum", "weight_decay"):
            if self.optimizer == "adam" and getattr(self, name) != Schedule.model_fields[name].default:
                raise ValueError(f"adam has no {name} here: leave it out, or take `optimizer: sgd`")
        return self


class MemberRecipe(Frozen):
    """One member: its network, its defense's own settings, its schedule."""

    network: dict[str, Any] = Field(default_factory=dict, description="settings of the network of this kind")
    attack: AttackRecipe | None = Field(
        None, description="inner attack; absent: trained on clean images, or on bounds over the ball"
    )
    augmented: bool = Field(True, description="train on random symmetries and shifts, as `data:` names them")
    schedule: Schedule = Schedule()
    settings: dict[str, float] = Field(default_factory=dict, description="of the defense's own loss, see SETTINGS")


class CalibrationRecipe(Frozen):
    """The quick attack under which temperatures and voting weights are fitted."""

    images: int = Field(256, ge=10, description="held-out images attacked")
    steps: int = Field(10, ge=1, description="steps of margin-PGD, one start")
    rounds: int = Field(2, ge=1, description="how often the fitted systems are attacked afresh and fitted again")
    clean_tolerance: float = Field(0.0, ge=0, description="how far clean accuracy may fall below the most robust member's")
    deciding: tuple[DetectorName, ...] | None = Field(
        (DetectorName.MARGIN,), min_length=1, description="detectors that the verdict hangs on, null: all; the others are told only"
    )
    robust_slack: float = Field(0.004, ge=0, description="robust accuracy that may be given up for clean accuracy")


MemberKind = Literal["metric", "edge", "adversarial", "certified", "bayesian"]

SETTINGS: Mapping[MemberKind, tuple[str, ...]] = {
    "metric": ("compactness",),
    "edge": ("clean_share",),
    "adversarial": (),
    "certified": ("ramp",),
    "bayesian": (),
}
"""Keys of `settings:` that each defense's training loss reads."""


UNDEFENDED: frozenset[MemberKind] = frozenset({"bayesian"})
"""Kinds that may be trained on clean images alone."""

BOUNDED: frozenset[MemberKind] = frozenset({"certified"})
"""Kinds that are hardened by bounds over the ball, with no inner attack."""


Precision = Literal["32-true", "bf16-mixed"]
"""What the networks are trained in; calibration and evaluation are float32 throughout."""


class Recipe(Frozen):
    """A bundle's recipe. `epsilon` is the radius of the l-infinity ball in pixel units (4 means 4/255)."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    data: DataRecipe
    epsilon: float = Field(gt=0, le=255)
    seed: int = 0
    precision: Precision = "bf16-mixed"
    members: dict[MemberKind, MemberRecipe] = Field(min_length=1)
    calibration: CalibrationRecipe = CalibrationRecipe()
    licenses: dict[str, str] = Field(default_factory=dict, description="what is covered -> SPDX name, for the bundle's manifest")

    @field_validator("members")
    @classmethod
    def _sorted(cls, members: dict[MemberKind, MemberRecipe]) -> dict[MemberKind, MemberRecipe]:
        return dict(sorted(members.items()))

    @model_validator(mode="after")
    def _hardened(self) -> Recipe:
        for name, member in self.members.items():
            if name not in UNDEFENDED | BOUNDED and member.attack is None:
                raise ValueError(f"member {name} is hardened by adversarial training: give it an `attack:` section")
            if name in BOUNDED and member.attack is not None:
                raise ValueError(f"member {name} is hardened by bounds, not by an inner attack: leave `attack:` out")
        return self

    @model_validator(mode="after")
    def _known_settings(self) -> Recipe:
        """Found out here, and not when the members before it are trained."""
        for name, member in self.members.items():
            for key in member.settings:
                if key not in SETTINGS[name]:
                    raise ValueError(f"member {name}: unknown setting {key!r}; it has {', '.join(SETTINGS[name]) or 'none'}")
            if not 0 < member.settings.get("ramp", 1.0) <= 1:
                raise ValueError(f"member {name}: ramp: expected a share of training, above 0 and at most 1")
            from_data = {"classes": 2, "channels": 1, "mean": (0.0,), "std": (1.0,)}
            try:
                config = NETWORKS[name].config.model_validate(from_data | member.network)
            except ValidationError as error:
                detail = error.errors(include_url=False)[0]
                where = ".".join(map(str, detail["loc"]))
                raise ValueError(f"member {name}: network.{where}: {detail['msg'].removeprefix('Value error, ')}") from None
            thermometer = getattr(config, "thermometer", None)
            if thermometer is not None and thermometer.surrogate_reach < self.epsilon:
                raise ValueError(
                    f"member {name}: network.thermometer: surrogate_reach {thermometer.surrogate_reach:g} is less than epsilon, "
                    f"{self.epsilon:g}: the inner attack would not see all ramps in its reach"
                )
        return self

    def hardened(self, member: MemberKind) -> bool:
        """Whether the member is trained for the ball, not for clean images alone."""
        return member in BOUNDED or self.members[member].attack is not None

    def fingerprint(self, member: str) -> str:
        """SHA-256 over all that decides this member's weights; a checkpoint of another fingerprint is not resumed."""
        parts = (self.data, self.epsilon, self.seed, self.precision, member, self.members[member])  # type: ignore[index]
        return hashlib.sha256(
            "\n".join(p.model_dump_json() if isinstance(p, BaseModel) else repr(p) for p in parts).encode()
        ).hexdigest()


class InvalidRecipe(TrainingRefused):
    """A recipe that cannot be read, found or understood."""


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The option of `phalanx-train train`, `build` and `export` that takes the place of the recipe's `precision`."""
    parser.add_argument(
        "--precision", choices=get_args(Precision),
        help="of training; bf16-mixed is slow on CPUs without bfloat16 units (default: the recipe's, or else bf16-mixed)",
    )  # fmt: skip


def load_recipe(name_or_path: str, precision: Precision | None = None) -> Recipe:
    """A recipe by the name of one that ships (`eurosat`, `fashion-mnist`, `smoke`) or by the path of a YAML file.

    `precision`, where it is given, takes the place of the recipe's own.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InvalidRecipe(f"no recipe file at {path}")
        text = path.read_text(encoding="utf-8")
    else:
        shipped = resources.files("training") / "recipes"
        names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
        if name_or_path not in names:
            raise InvalidRecipe(f"no recipe {name_or_path!r}: shipped are {', '.join(names)}; or give the path of a .yaml file")
        text = (shipped / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    try:
        recipe = Recipe.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise InvalidRecipe(f"recipe {name_or_path} does not fit: {error}") from error
    return recipe if precision is None else recipe.model_copy(update={"precision": precision})
