"""What interval bounds prove of a system: that no image within epsilon gets another class, whoever attacks it, and how."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.ensemble import RuleName
from models.log_probability import TIE
from models.networks.certified import ROUNDING, CertifiedNetwork
from training.data import Images
from training.system import System


@torch.inference_mode()
def proven_on(system: System, images: Images, epsilon: float, batch_size: int = 256) -> NDArray[np.bool_] | None:
    """(n,) whether the label of all images within `epsilon` (in units of 0..255) is proven right; verdicts are not looked at.

    None where there is nothing to prove it by: all that is robust in the vote must be one network with bounds. In the mixed
    rule accurate voters may speak beside it, and are taken to say the worst there is. Computed in float64 on the CPU.
    """
    ensemble, networks = system.ensemble, system.members.networks
    speaking = [voter for voter in ensemble.voters if system.share(voter.name) > 0]
    robust = [voter for voter in speaking if voter.strength == "robust"]
    beside = len(speaking) > len(robust)
    if len(robust) != 1 or (beside and ensemble.rule != RuleName.MIXED):
        return None
    network = networks[robust[0].name]
    if not isinstance(network, CertifiedNetwork):
        return None
    exact, found = copy.deepcopy(network).cpu().double(), []
    alpha, sharpness = (ensemble.alpha, ensemble.scale) if beside else (1.0, 1.0)
    for start in range(0, len(images), batch_size):
        pixels = torch.from_numpy(images.pixels[start : start + batch_size]).double()
        y = torch.from_numpy(images.labels[start : start + batch_size])
        found.append(leads(exact(pixels, y, epsilon), y, sharpness / robust[0].temperature, alpha))
    return torch.cat(found).numpy()


def leads(bounds: Tensor, y: Tensor, sharpness: float, alpha: float) -> Tensor:
    """(n,) bool: the label wins (1 - alpha) p + alpha q, by more than a tie, for every p that accurate voters may give.

    q = softmax(sharpness z), and bounds (n, k) are those of z_j - z_y = b_j. So q_y >= 1 / sum_i exp(sharpness b_i) and
    q_y - q_j >= q_y (1 - exp(sharpness b_j)); the label wins if alpha times that is more than the 1 - alpha that p may add to j
    (the argument of MixedNUTS, Bai et al. 2024, with bounds for a certified radius).
    """
    own = y[:, None]
    reach = (sharpness * (bounds.double() + ROUNDING)).scatter(1, own, 0.0)
    q_y = (-reach.logsumexp(dim=1)).exp()
    nearest = reach.scatter(1, own, float("-inf")).amax(dim=1)
    return alpha * q_y * (1 - nearest.exp()) > 1 - alpha + 2 * TIE
