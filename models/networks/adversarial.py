"""`adversarial`: a plain residual classifier; what makes it robust is how it is trained (Madry et al. 2018)."""

from __future__ import annotations

from torch import Tensor, nn

from models.networks.backbone import Backbone, BackboneConfig
from models.networks.pixels import Pixels
from models.networks.spec import NetworkConfig


class AdversarialConfig(NetworkConfig):
    """Settings of `AdversarialNetwork`."""

    backbone: BackboneConfig = BackboneConfig()


class AdversarialNetwork(nn.Module):
    """Pixels (n, h, w, c) in 0..255 -> logits (n, k)."""

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        self.pixels = Pixels(config.mean, config.std)
        self.backbone = Backbone(config.backbone, config.channels)
        self.head = nn.Linear(self.backbone.width, config.classes)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(self.pixels(pixels)))
        return logits.float()
