"""`certified`: cross-entropy on the worst case that interval bounds allow; what it classifies rightly there is proven."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.networks.certified import CertifiedNetwork, proven
from training.data import Images
from training.recipe import MemberRecipe
from training.step import Batch, Outcome, Trainee


def certified_loss(bounds: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    """CE(bounds, y), the bounds in the logits' place (Gowal et al. 2018, eq. 12 with kappa = 0).

    bounds: (n, k), upper bounds of z_j - z_y over the ball; 0 at the label itself.
    """
    return F.cross_entropy(bounds, y, label_smoothing=label_smoothing)


def training_loss(trainee: Trainee, batch: Batch, recipe: MemberRecipe, _: torch.Generator) -> Outcome:
    """One step of certified training; the ball grows to epsilon over the first share `ramp` (default 0.4) of training."""
    radius = batch.epsilon * min(1.0, batch.progress / recipe.settings.get("ramp", 0.4))
    bounds = trainee.network(batch.pixels, batch.labels, radius)
    loss = certified_loss(bounds, batch.labels, recipe.schedule.label_smoothing)
    return Outcome(loss, proven(bounds, batch.labels).float().mean())


@torch.inference_mode()
def proven_on(network: CertifiedNetwork, images: Images, epsilon: float, batch_size: int = 256) -> NDArray[np.bool_]:
    """(n,) whether bounds prove that every image within `epsilon` (in units of 0..255) is classified rightly."""
    device, found = network.head.weight.device, []
    for start in range(0, len(images), batch_size):
        pixels = torch.from_numpy(images.pixels[start : start + batch_size]).to(device).float()
        y = torch.from_numpy(images.labels[start : start + batch_size]).to(device)
        found.append(proven(network(pixels, y, epsilon), y))
    return np.asarray(torch.cat(found).cpu().numpy())
