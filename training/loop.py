"""The training loop of one member: Fabric, one cycle, weight average, held-out checks, resumable at any moment."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from models.durable import replace_file
from models.networks import NETWORKS, build_network
from models.networks.bayesian import BayesianNetwork
from models.networks.certified import CertifiedNetwork, proven
from training.attacks.pgd import Logits, pgd, to_uint8
from training.augment import augment
from training.averaging import WeightAverage
from training.bayesian import TRAINING_MASKS, draw_masks
from training.checkpoint import StaleCheckpoint, load_checkpoint, save_checkpoint
from training.data import Images, InvalidData, Splits
from training.defenses import DEFENSES
from training.progress import Progress
from training.recipe import InvalidRecipe, MemberKind, Recipe, Schedule
from training.refused import TrainingRefused
from training.step import Batch, Trainee, step_generator

HELD_OUT_CHECK = 256
"""Held-out images of an epoch's check; enough to see a collapse, cheap enough for every epoch."""
HELD_OUT_STEPS = 5
RECORD = "phalanx"  # the entry of a weights file's metadata that says how it came about


class Diverged(TrainingRefused):
    """The loss is not finite."""


@dataclass
class Standing:
    """The best weight average so far, by held-out accuracy under attack (clean where the member is not hardened)."""

    score: float = -1.0
    epoch: int = -1
    clean: float = 0.0
    robust: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)


def train_member(
    recipe: Recipe,
    kind: MemberKind,
    splits: Splits,
    folder: Path,
    fabric: Fabric,
    progress: Progress,
    checkpoint_seconds: float = 30.0,
) -> Path:
    """Train one member and write `folder/<kind>.safetensors`; goes on from `folder/<kind>.ckpt` if there is one.

    A checkpoint is written after every epoch and every `checkpoint_seconds`; the rest follows from seed and step.
    """
    member, done = recipe.members[kind], folder / f"{kind}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    schedule, device = member.schedule, fabric.device
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # initial weights come from torch's global generator
        raw = build_network(kind, network_config(recipe, kind, splits)).to(device)
    optimizer = _optimizer(raw, schedule)
    average = WeightAverage(raw, schedule.ema_decay)
    network, fabric_optimizer = fabric.setup(raw, optimizer)

    def probe(*inputs: Tensor) -> Tensor:
        with fabric.autocast():
            output: Tensor = raw(*inputs)
        return output.float()

    trainee = Trainee(network, probe, raw)
    share = schedule.batch_size // fabric.world_size
    steps_an_epoch = len(splits.fit) // schedule.batch_size
    total = schedule.epochs * steps_an_epoch
    if steps_an_epoch == 0:
        raise InvalidData(f"{len(splits.fit)} training images do not fill one batch of {schedule.batch_size}")

    fingerprint = f"{recipe.fingerprint(kind)}:{splits.fingerprint}"
    trained_by = f"{fabric.world_size} processes of {torch.get_num_threads()} threads"
    checkpoint, step, best = folder / f"{kind}.ckpt", 0, Standing()
    if (state := load_checkpoint(checkpoint, fingerprint, device)) is not None:
        raw.load_state_dict(state["network"])
        average.network.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, best = state["step"], Standing(**state["best"])
        if state["trained_by"] != trained_by and fabric.is_global_zero:
            print(
                f"{kind}: begun by {state['trained_by']}, goes on with {trained_by}: the weights will not be bit for bit those of "
                f"an uninterrupted run",
                file=sys.stderr,
            )

    def state_now() -> dict[str, Any]:
        return {
            "fingerprint": fingerprint, "step": step, "network": raw.state_dict(), "average": average.network.state_dict(),
            "optimizer": optimizer.state_dict(), "best": vars(best), "trained_by": trained_by,
        }  # fmt: skip

    curves = SummaryWriter(folder / "tensorboard" / kind, purge_step=step) if fabric.is_global_zero else None
    pixels = torch.from_numpy(splits.fit.pixels)
    labels = torch.from_numpy(splits.fit.labels)
    saved_at = time.monotonic()
    progress.start(kind, total, step)
    while step < total:
        epoch = step // steps_an_epoch
        raw.train()
        for index in _batches(len(splits.fit), schedule.batch_size, recipe.seed, epoch, step % steps_an_epoch):
            mine = torch.from_numpy(index[fabric.global_rank * share : (fabric.global_rank + 1) * share])
            generator = step_generator(device, recipe.seed, kind, step, fabric.global_rank)
            images = pixels[mine].to(device)
            if member.augmented:
                images = augment(images, recipe.data.symmetry, recipe.data.shift, generator)
            batch = Batch(images.float(), labels[mine].to(device), recipe.epsilon, step / total)
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(batch.progress, schedule)
            outcome = DEFENSES[kind](trainee, batch, member, generator)
            fabric_optimizer.zero_grad()
            fabric.backward(outcome.loss)
            fabric_optimizer.step()
            average.update(raw, step)
            step += 1
            loss = float(outcome.loss.detach())
            if not np.isfinite(loss):
                raise Diverged(f"{kind}: the loss is {loss} at step {step}; lower the learning rate, or train in 32-true")
            if step % 10 == 0 or step == total:
                accuracy = float(outcome.accuracy)
                progress.advance(step, loss=loss, training=accuracy)
                if curves is not None:
                    curves.add_scalar("training/loss", loss, step)
                    curves.add_scalar("training/accuracy", accuracy, step)
            if time.monotonic() - saved_at >= checkpoint_seconds and step % steps_an_epoch:
                if fabric.is_global_zero:
                    save_checkpoint(checkpoint, state_now())
                saved_at = time.monotonic()
        clean, robust = held_out_accuracy(average.network, kind, recipe, splits.held_out, fabric)
        score = robust if recipe.hardened(kind) else clean
        if score >= best.score:
            weights = {name: value.detach().clone() for name, value in average.network.state_dict().items()}
            best = Standing(score, epoch, clean, robust, weights)
        progress.epoch(epoch + 1, schedule.epochs, clean, robust)
        if curves is not None:
            curves.add_scalar("held_out/clean", clean, step)
            curves.add_scalar("held_out/robust", robust, step)
            save_checkpoint(checkpoint, state_now())
            saved_at = time.monotonic()
    if fabric.is_global_zero:
        _write_weights(done, best, fingerprint)
    if curves is not None:
        curves.close()
    progress.finish()
    return done


def network_config(recipe: Recipe, kind: MemberKind, splits: Splits) -> dict[str, Any]:
    """The network's complete settings: the recipe's, and what follows from the training images."""
    pixels, config = splits.fit.pixels, NETWORKS[kind].config
    settings = {
        "classes": len(splits.classes),
        "channels": pixels.shape[3],
        "mean": [round(float(v), 3) for v in pixels.mean(axis=(0, 1, 2), dtype=np.float64)],
        "std": [round(float(v), 3) for v in pixels.std(axis=(0, 1, 2), dtype=np.float64)],
        **({"size": pixels.shape[1:3]} if "size" in config.model_fields else {}),
        **recipe.members[kind].network,
    }
    return config.model_validate(settings).model_dump(mode="json")


def one_cycle(progress: float, schedule: Schedule) -> float:
    """Learning rate at a share of training in [0, 1): up linearly, then down to 0 along a cosine (after Smith & Topin 2018).

    Between the two it stays at its peak, where the schedule says so.
    """
    if progress < schedule.warm_up:
        return schedule.learning_rate * max(progress / schedule.warm_up, 1e-3)
    begins = max(schedule.warm_up, schedule.fall_from)
    fallen = max(0.0, progress - begins) / (1 - begins)
    return schedule.learning_rate * 0.5 * (1 + float(np.cos(np.pi * fallen)))


@torch.no_grad()
def held_out_accuracy(average: nn.Module, kind: MemberKind, recipe: Recipe, images: Images, fabric: Fabric) -> tuple[float, float]:
    """(clean, robust) accuracy of the weight average on a few held-out images, robust under a short PGD, or proven by bounds.

    A cheap check of progress and for early stopping; published figures come from `phalanx-train evaluate`.
    """
    device = fabric.device
    chosen = np.linspace(0, len(images) - 1, min(HELD_OUT_CHECK, len(images))).astype(np.int64)
    pixels = torch.from_numpy(images.pixels[chosen]).to(device).float()
    y = torch.from_numpy(images.labels[chosen]).to(device)
    generator = step_generator(device, recipe.seed, f"{kind}-held-out")
    logits = _deterministic(average, generator, device)
    with fabric.autocast():
        clean = (logits(pixels).argmax(1) == y).float().mean()
        if not recipe.hardened(kind):
            return float(clean), 0.0
        if isinstance(average, CertifiedNetwork):
            return float(clean), float(proven(average(pixels, y, recipe.epsilon), y).float().mean())
        with torch.enable_grad():
            x = pgd(logits, pixels, y, recipe.epsilon, HELD_OUT_STEPS, recipe.epsilon / 2, generator)
        robust = (logits(to_uint8(x, pixels).float()).argmax(1) == y).float().mean()
    return float(clean), float(robust)


def _deterministic(network: nn.Module, generator: torch.Generator, device: torch.device) -> Logits:
    """The network as pixels -> logits; a stochastic one with masks drawn once."""
    if not isinstance(network, BayesianNetwork):
        return network
    masks = draw_masks(TRAINING_MASKS, network, generator, device)
    return lambda x: network(x, masks).softmax(dim=2).mean(dim=0).log()


def _batches(n: int, size: int, seed: int, epoch: int, first: int) -> Iterator[NDArray[np.int64]]:
    """Index batches of one epoch from batch number `first` on; the order depends on seed and epoch alone."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    for batch in range(first, n // size):
        yield order[batch * size : (batch + 1) * size]


def _optimizer(network: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    if schedule.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), lr=schedule.learning_rate)
    groups = _groups(network, schedule.weight_decay)
    return torch.optim.SGD(groups, lr=schedule.learning_rate, momentum=schedule.momentum, nesterov=True)


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels only; norms and biases go without."""
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _write_weights(path: Path, best: Standing, fingerprint: str) -> None:
    weights = {name: value.cpu().contiguous() for name, value in best.weights.items()}
    record = {
        "epoch": best.epoch,
        "held_out_clean": round(best.clean, 4),
        "held_out_robust": round(best.robust, 4),
        "fingerprint": fingerprint,
    }
    # one entry: safetensors writes several in no fixed order
    replace_file(path, save(weights, metadata={RECORD: json.dumps(record)}))


def read_weights(recipe: Recipe, kind: MemberKind, splits: Splits, folder: Path) -> bytes:
    """The weights that `train_member` wrote to `folder`; refused where they are of another recipe, or of other data."""
    path = folder / f"{kind}.safetensors"
    if not path.is_file():
        raise InvalidRecipe(f"no weights at {path}: train this member first (`phalanx-train train`)")
    content = path.read_bytes()
    try:
        with safe_open(path, "np") as file:
            record = json.loads((file.metadata() or {}).get(RECORD, "{}"))
    except SafetensorError as error:
        raise StaleCheckpoint(f"{path} is damaged ({error}); delete it and train this member again") from error
    if record.get("fingerprint") != f"{recipe.fingerprint(kind)}:{splits.fingerprint}":
        raise StaleCheckpoint(
            f"{path} was trained by another recipe, in another precision or on other data; "
            "train this member again, or name other --runs"
        )
    return content
