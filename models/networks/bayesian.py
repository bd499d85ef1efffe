"""`bayesian`: an accurate classifier with dropout after the backbone; its disagreement with itself is a detector."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from models.networks.backbone import Backbone, BackboneConfig
from models.networks.thermometer import PixelConfig, front


class BayesianConfig(PixelConfig):
    """Settings of `BayesianNetwork`."""

    backbone: BackboneConfig = BackboneConfig()
    samples: int = Field(32, description="dropout masks T drawn for an answer")
    keep: float = Field(0.7, gt=0, le=1, description="probability with which a mask keeps a feature")


class BayesianNetwork(nn.Module):
    """Pixels (n, h, w, c) and masks (T, d) of values 0 or 1/keep -> logits (T, n, k).

    The masks act after the backbone, which therefore runs once for all T sampled networks (Gal & Ghahramani 2016 on
    the last layer); they are an input, so that nothing random hides inside an exported graph.
    """

    def __init__(self, config: BayesianConfig) -> None:
        super().__init__()
        self.config = config
        self.pixels = front(config)
        self.backbone = Backbone(config.backbone, config.planes)
        self.head = nn.Linear(self.backbone.width, config.classes)

    @property
    def mask_width(self) -> int:
        """d, the number of features that a mask keeps or drops."""
        return self.backbone.width

    def forward(self, pixels: Tensor, masks: Tensor) -> Tensor:
        features = self.backbone(self.pixels(pixels))
        logits: Tensor = self.head(features[None, :, :] * masks[:, None, :])
        return logits.float()
