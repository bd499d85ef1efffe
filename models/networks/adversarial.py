"""`adversarial`: a plain residual classifier; what makes it robust is how it is trained (Madry et al. 2018)."""

from __future__ import annotations

from torch import Tensor, nn

from models.networks.backbone import Backbone, BackboneConfig
from models.networks.thermometer import PixelConfig, front


class AdversarialConfig(PixelConfig):
    """Settings of `AdversarialNetwork`."""

    backbone: BackboneConfig = BackboneConfig()


class AdversarialNetwork(nn.Module):
    """Pixels (n, h, w, c) in 0..255 -> logits (n, k)."""

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        self.pixels = front(config)
        self.backbone = Backbone(config.backbone, config.planes)
        self.head = nn.Linear(self.backbone.width, config.classes)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(self.pixels(pixels)))
        return logits.float()
