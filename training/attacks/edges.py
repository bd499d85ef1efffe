"""Other gradients through binary edges (BPDA, Athalye et al. 2018): one surrogate that fails proves nothing."""

from __future__ import annotations

from torch import Tensor, nn

from models.networks.edge import EdgeNetwork, sobel_magnitude
from models.networks.pixels import channels_first
from training.system import Members, System


class SoftEdges(EdgeNetwork):
    """The same weights behind smooth edges, forward as well as backward: sigmoid((magnitude - threshold) / width)."""

    def edges(self, pixels: Tensor) -> list[Tensor]:
        magnitude = sobel_magnitude(channels_first(pixels))
        width = self.config.surrogate_width
        return [((magnitude - threshold) / width).sigmoid() - 0.5 for threshold in self.config.thresholds]


def narrow_edges(system: System, factor: float) -> System:
    """The system with binary edges whose gradient comes from a sigmoid `factor` times as wide as in training."""
    return _with_edges(system, EdgeNetwork, factor)


def soft_edges(system: System, factor: float) -> System:
    """The system with edges that are smooth forward, too; what fools it may or may not fool the binary one."""
    return _with_edges(system, SoftEdges, factor)


def hears_edges(system: System) -> bool:
    """Whether a voter with a share in the rule sees edges."""
    heard = (voter.name for voter in system.ensemble.voters if system.share(voter.name) > 0)
    return any(isinstance(system.members.networks[name], EdgeNetwork) for name in heard)


def _with_edges(system: System, network: type[EdgeNetwork], factor: float) -> System:
    def seen_otherwise(member: nn.Module) -> nn.Module:
        if not isinstance(member, EdgeNetwork):
            return member
        width = factor * member.config.surrogate_width
        copy = network(member.config.model_copy(update={"surrogate_width": width}))
        copy.load_state_dict(member.state_dict())
        return copy.to(next(member.parameters()).device).eval().requires_grad_(False)

    networks = {name: seen_otherwise(member) for name, member in system.members.networks.items()}
    return System(system.ensemble, Members(networks, system.members.masks_seed))
