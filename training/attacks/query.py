"""Query attacks: on one image at a time, with nothing but a running server's answers.

The attacker has what anybody has: GetEnsemble's description, the answers, as much of them as is disclosed, and some
clean images of other classes. He sends whole pixels, for nothing else is served, and never asks about the same ones
twice; an image of his has won when it is wrong and, as far as he can see, accepted, within epsilon. Who is not told the verdict
goes on from there, away from the boundary, where he has to fear that it is rejected.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pyautoattack.square import SquareAttack
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from service.config import Disclosure
from training.endpoint import Answers, Endpoint, EndpointRefused, Pixels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # foolbox imports what SciPy has deprecated
    from eagerpy.astensor import astensor, astensor_
    from eagerpy.tensor.tensor import Tensor as EagerTensor
    from foolbox.attacks.base import MinimizationAttack
    from foolbox.attacks.boundary_attack import BoundaryAttack
    from foolbox.attacks.hop_skip_jump import HopSkipJumpAttack
    from foolbox.criteria import Criterion
    from foolbox.models.base import Model
    from foolbox.types import Bounds

QUERIES = 2000
NOISE_STARTS = 25  # uniform images tried before clean ones of other classes
HALVINGS = 8  # of the line from a start to the clean image
NOISE_PIXELS = 0.5  # standard deviation of HopSkipJump's noise: less would be rounded away
CELLS = 8  # on a side of an image, for that noise
FIRST_ESTIMATE = 50  # queries for HopSkipJump's first direction, growing with the root of the step
NO_LESS = 1e-6  # a score that has not won is above 0
DEEPER = (1, 2, 4, 255)  # multiples of the nearest perturbation that wins, cut off at the ball: the last is its sign
NEIGHBOURS = 16  # of each that are asked about


@dataclass(frozen=True)
class QueryAttack:
    """`name` is one of ATTACKS, epsilon in pixel units, `queries` how many an image may take at most."""

    name: str
    epsilon: float
    queries: int = QUERIES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise EndpointRefused(f"expected a query attack of {', '.join(ATTACKS)}, got {self.name!r}")
        if self.queries < 1:
            raise EndpointRefused(f"expected 1 query an image or more, got {self.queries}")
        if self.radius < 1:
            raise EndpointRefused(f"expected an epsilon of 1 or more, as pixels are served whole, got {self.epsilon:g}")

    @property
    def radius(self) -> int:
        """Epsilon in whole pixels: between two of them nothing is served."""
        return math.floor(self.epsilon)


class Over(Exception):
    """The image has won, as far as can be told, or its queries are spent."""


class CalledOff(Exception):
    """Somebody else's image could not be attacked, or the person at the terminal has had enough."""


@dataclass(frozen=True)
class _Seen:
    """What the attacker learned of one image of his; `short` is how far it is from winning, above 0."""

    label: int
    won: bool
    accepted: bool
    short: float


class Attacker:
    """Who attacks one image (h, w, c): what may still be asked, all that was seen, and the nearest that had won."""

    def __init__(self, endpoint: Endpoint, clean: Pixels, truth: int, attack: QueryAttack, stop: threading.Event) -> None:
        self.endpoint, self.clean, self.truth, self.attack = endpoint, clean, truth, attack
        self.best, self.spent = clean, 0
        self.allowed, self.content = attack.queries, True  # with the first image that has won
        self._distance, self._stop = 256, stop
        self._seen: dict[bytes, _Seen] = {}

    @property
    def classes(self) -> int:
        return len(self.endpoint.served.classes)

    @property
    def told(self) -> bool:
        """Whether he sees what is rejected."""
        return self.endpoint.disclosure >= Disclosure.VERDICT or not self.endpoint.served.detectors

    @property
    def won(self) -> bool:
        """Whether the best is in the ball."""
        return self._distance <= self.attack.radius

    @property
    def start(self) -> Tensor:
        """The clean image (1, h, w, c) in 0..1."""
        return torch.from_numpy(self.clean[None]).float() / 255

    def ask(self, pixels: Pixels) -> list[_Seen]:
        """About images (n, h, w, c); those that were seen before cost nothing."""
        if self._stop.is_set():
            raise CalledOff
        keys = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]
        new = {key: i for i, key in enumerate(keys) if key not in self._seen}
        allowed = list(new.items())[: max(self.allowed - self.spent, 0)]
        if allowed:
            self._look(pixels[[i for _, i in allowed]], [key for key, _ in allowed])
        if len(allowed) < len(new) or (self.won and self.content):
            raise Over
        return [self._seen[key] for key in keys]

    def _look(self, pixels: Pixels, keys: Sequence[bytes]) -> None:
        answers = self.endpoint.answers(pixels)
        self.spent += len(pixels)
        short = short_of_winning(answers, self.truth, self.endpoint.served.rates.review)
        for image, key, label, accepted, far in zip(pixels, keys, answers.label, answers.accepted, short, strict=True):
            won = bool(label != self.truth and accepted)
            self._seen[key] = _Seen(int(label), won, bool(accepted), float(far))
            if won and (distance := distance_between(image, self.clean)) < self._distance:
                self.best, self._distance = image.copy(), distance


def short_of_winning(answers: Answers, truth: int, rate: float) -> NDArray[np.float64]:
    """How far answers are from wrong and accepted, as far as was disclosed; (n,), above 0 where they are not.

    max(log p_y - max_{j != y} log p_j, 0) + max(log rate - log p-value, 0); of verdicts 1 if right and 1/2 if caught.
    """
    if answers.probabilities is None:
        return np.asarray(np.where((answers.label != truth) & ~answers.accepted, 0.5, 1.0))
    log_p = np.log(np.maximum(answers.probabilities.astype(np.float64), np.finfo(np.float32).tiny))
    short = np.maximum(log_p[:, truth] - np.delete(log_p, truth, axis=1).max(axis=1), 0.0)
    if answers.p_value is not None:
        short += np.maximum(math.log(rate) - np.log(np.maximum(answers.p_value, np.finfo(np.float32).tiny)), 0.0)
    return np.asarray(np.maximum(short, NO_LESS))


def _square(attacker: Attacker, _: Iterator[Pixels]) -> None:
    """Square (Andriushchenko et al. 2020), on the score of `short_of_winning`: random squares, kept where it falls."""

    class Scores(nn.Module):
        """Images (n, c, h, w) in 0..1 -> (n, 2): the score, and the 0 that it would have to reach."""

        def forward(self, x: Tensor) -> Tensor:
            short = torch.tensor([seen.short for seen in attacker.ask(_whole(x.permute(0, 2, 3, 1)))])
            return torch.stack([short, torch.zeros_like(short)], dim=1)

    attack = SquareAttack(Scores(), eps=attacker.attack.radius / 255, n_queries=attacker.attack.queries, device="cpu")
    _again(attacker, lambda: attack.perturb(attacker.start.permute(0, 3, 1, 2), torch.zeros(1, dtype=torch.int64)))


def _hop_skip_jump(attacker: Attacker, others: Iterator[Pixels]) -> None:
    """HopSkipJump (Chen et al. 2020) in l-infinity; the line to the boundary is halved down to tenths of a pixel."""
    _minimise(attacker, _hopper(attacker), _start(attacker, others))


def _hopper(attacker: Attacker) -> MinimizationAttack:
    return _HopSkipJump(
        steps=attacker.attack.queries,
        initial_gradient_eval_steps=FIRST_ESTIMATE,
        gamma=attacker.clean.size**2 / 2550,
        constraint="linf",
    )


def _boundary(attacker: Attacker, others: Iterator[Pixels]) -> None:
    """The Boundary attack (Brendel et al. 2018), which walks along the boundary, nearer in l2."""
    _minimise(attacker, BoundaryAttack(), _start(attacker, others))


def attack_one(attacker: Attacker, others: Iterator[Pixels]) -> None:
    """Until the image has won, or its queries are spent; `others` are clean images of other classes, the nearest first."""
    with contextlib.suppress(Over):
        attacker.ask(attacker.clean[None])
        ATTACKS[attacker.attack.name](attacker, others)
    if attacker.won and not attacker.told and (attacker.best != attacker.clean).any():
        _deeper(attacker)


def _deeper(attacker: Attacker) -> None:
    """Nearer still with HopSkipJump, for a perturbation that aims well; then as much of it as leaves most neighbours wrong."""
    attacker.content, attacker.allowed = False, attacker.attack.queries - len(DEEPER) * (1 + NEIGHBOURS)
    with contextlib.suppress(Over):
        _minimise(attacker, _hopper(attacker), torch.from_numpy(attacker.best[None]).float() / 255)
    attacker.allowed, radius, most, best = attacker.attack.queries, attacker.attack.radius, 0.0, attacker.best
    delta = torch.from_numpy(best.astype(np.float32) - attacker.clean)
    with contextlib.suppress(Over):
        for multiple in reversed(DEEPER):
            aimed = (multiple * delta).clamp(-radius, radius)
            if attacker.ask((candidate := _in_ball(attacker, aimed))[None])[0].won:
                noise = radius * (2 * torch.rand((NEIGHBOURS, *delta.shape)) - 1)
                share = float(np.mean([seen.won for seen in attacker.ask(_in_ball(attacker, aimed + noise))]))
                if share > most:
                    most, best = share, candidate
    attacker.best = best


def _in_ball(attacker: Attacker, delta: Tensor) -> Pixels:
    """The clean image with a perturbation (..., h, w, c) in pixel units, cut off at the ball, in whole pixels."""
    return _whole((attacker.start[0] * 255 + delta.clamp(-attacker.attack.radius, attacker.attack.radius)) / 255)


ATTACKS: Mapping[str, Callable[[Attacker, Iterator[Pixels]], None]] = {
    "square": _square,
    "hopskipjump": _hop_skip_jump,
    "boundary": _boundary,
}


class _HopSkipJump(HopSkipJumpAttack):
    """foolbox's, of one image, with noise that survives the rounding of a server and is asked about in one request.

    The noise is alike in each of CELLS x CELLS cells: in that many dimensions fewer queries tell a direction, and the
    gradients of networks are mostly of low frequency (QEBA-S, Li et al. 2020).
    """

    def select_delta(self, originals: EagerTensor, distances: EagerTensor, step: int) -> EagerTensor:
        """The noise's l2 norm; published as distance / d, which moves no pixel by a whole one."""
        survives = NOISE_PIXELS * math.sqrt(math.prod(originals.shape[1:])) / 255
        published: EagerTensor = super().select_delta(originals, distances, step)
        return published.maximum(survives)

    def approximate_gradients(
        self, is_adversarial: Callable[[EagerTensor], EagerTensor], x_advs: EagerTensor, steps: int, delta: EagerTensor
    ) -> EagerTensor:
        """mean_b (phi_b - mean phi) u_b, phi_b = +-1 whether x + delta u_b has won (Chen et al. 2020, eq. 16); (1, h, w, c)."""
        x: Tensor = x_advs.raw  # (1, h, w, c)
        _, h, w, c = x.shape
        cells = 2 * torch.rand((steps, c, min(h, CELLS), min(w, CELLS))) - 1
        u = F.interpolate(cells, size=(h, w)).permute(0, 2, 3, 1)
        noisy = (x + delta.raw * u / u.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
        phi = 2 * is_adversarial(astensor(noisy)).raw.float() - 1  # (steps,)
        if phi.min() < phi.max():
            phi = phi - phi.mean()
        gradient = (phi[:, None, None, None] * (noisy - x)).mean(dim=0, keepdim=True)
        estimate: EagerTensor = astensor(gradient / (gradient.norm() + 1e-12))
        return estimate


def _minimise(attacker: Attacker, attack: MinimizationAttack, start: Tensor | None) -> None:
    """From a start (1, h, w, c) in 0..1 that has won, nearer and nearer to the clean image."""
    if start is not None:
        model, criterion = _Remote(attacker), _WrongAndAccepted(attacker)
        _again(attacker, lambda: attack.run(model, attacker.start, criterion, starting_points=start))


def _start(attacker: Attacker, others: Iterator[Pixels]) -> Tensor | None:
    """(1, h, w, c) in 0..1 that has won: uniform noise, else a clean image of another class, drawn towards the clean one."""
    noise = (torch.rand(attacker.start.shape) for _ in range(NOISE_STARTS))
    images = (torch.from_numpy(image[None]).float() / 255 for image in others)
    far = next((x for x in chain(noise, images) if attacker.ask(_whole(x))[0].won), None)
    if far is None:
        return None
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        won = attacker.ask(_whole(torch.lerp(attacker.start, far, middle)))[0].won
        low, high = (low, middle) if won else (middle, high)
    return torch.lerp(attacker.start, far, high)


def _again(attacker: Attacker, run: Callable[[], object]) -> None:
    """Until a run has nothing new to ask; Over ends it before."""
    spent = -1
    while spent < attacker.spent:
        spent = attacker.spent
        run()


class _Remote(Model):
    """Images (n, h, w, c) in 0..1 -> one-hot (n, k + 1): the class, or k where the attacker sees that it is not accepted."""

    def __init__(self, attacker: Attacker) -> None:
        self.attacker = attacker

    @property
    def bounds(self) -> Bounds:
        return Bounds(0, 1)

    def __call__(self, inputs: Any) -> Any:
        x, restore = astensor_(inputs)
        k = self.attacker.classes
        columns = [seen.label if seen.accepted else k for seen in self.attacker.ask(_whole(x.raw))]
        return restore(astensor(F.one_hot(torch.tensor(columns), k + 1).float()))


class _WrongAndAccepted(Criterion):
    """On _Remote's outputs (n, k + 1): neither the truth nor `not accepted`."""

    def __init__(self, attacker: Attacker) -> None:
        self.truth, self.caught = attacker.truth, attacker.classes

    def __repr__(self) -> str:
        return f"neither {self.truth} nor {self.caught}"

    def __call__(self, perturbed: Any, outputs: Any) -> Any:  # noqa: ARG002  # foolbox hands both to every criterion
        answers, restore = astensor_(outputs)
        columns = answers.argmax(axis=-1)
        return restore((columns != self.truth).logical_and(columns != self.caught))


class OwnDraws(TorchFunctionMode):
    """What this thread draws comes from a generator of its own: the libraries ask the global one, which threads share."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.rand or func is torch.randn:
            kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)


def _whole(x: Tensor) -> Pixels:
    """The nearest whole pixels of images in 0..1, channels last."""
    return (255 * x).round().clamp(0, 255).to(torch.uint8).contiguous().numpy()


def distance_between(one: Pixels, other: Pixels) -> int:
    """l-infinity, in pixel units."""
    return int(np.abs(one.astype(np.int16) - other).max())
