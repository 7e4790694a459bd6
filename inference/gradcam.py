"""Where in an image a model saw what it predicts: Grad-CAM, by the package grad-cam.

Source: Selvaraju et al., arXiv:1610.02391.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from augment.pixels import denormalise
from inference.trained import Trained
from settings.errors import ConfigError, first_line

POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d)


class GradCam:
    """Overlays of a model's images, red where the model saw most of a class.

    Raises:
        ConfigError: the package cannot be imported, or the model has no feature map to look at.
    """

    def __init__(self, trained: Trained):
        try:
            from pytorch_grad_cam import GradCAM
            from pytorch_grad_cam.utils.image import show_cam_on_image
            from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
        except ImportError as error:  # itself, or OpenCV's own libraries
            raise ConfigError(f"--gradcam: the package grad-cam cannot be used here ({first_line(error)})") from error
        self.trained, self.show, self.target = trained, show_cam_on_image, ClassifierOutputTarget
        self.layer = last_feature_map(trained)
        self.method: Any = GradCAM

    def overlays(self, images: Sequence[Tensor], classes: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Draw where each image (3, S, S), normalised, shows its class: uint8 (S, S, 3)."""
        batch = torch.stack(list(images))
        with self.method(model=self.trained.model, target_layers=[self.layer]) as cam:
            targets = [self.target(number) for number in classes]
            heats = cam(input_tensor=batch.to(self.trained.runtime.device), targets=targets)  # (N, S, S), 0 to 1
        self.trained.model.zero_grad(set_to_none=True)
        plain = denormalise(batch).permute(0, 2, 3, 1).numpy()
        return [
            self.show(pixels.astype(np.float32) / 255, heat, use_rgb=True, image_weight=0.6)
            for pixels, heat in zip(plain, heats)
        ]


@torch.no_grad()
def last_feature_map(trained: Trained) -> nn.Module:
    """Find the module that makes the model's last feature map (N, C, H, W) larger than 1 x 1, before it is pooled.

    In torchvision's convolutional networks that is the end of `features`, `layer4` or `trunk_output`.

    Raises:
        ConfigError: there is none, or tokens follow it, as in a vision transformer.
    """
    made: list[tuple[nn.Module, torch.Size]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not isinstance(module, POOLS):
            made.append((module, output.shape))

    hooks = [module.register_forward_hook(note) for module in trained.model.modules()]
    try:
        trained.model(torch.zeros(1, 3, trained.image_size, trained.image_size, device=trained.runtime.device))
    finally:
        for hook in hooks:
            hook.remove()
    maps = [i for i, (_, shape) in enumerate(made) if len(shape) == 4 and min(shape[2:]) > 1]
    if not maps or any(len(shape) == 3 for _, shape in made[maps[-1] :]):
        raise ConfigError(
            f"--gradcam: {trained.config.model} ends in no feature map at {trained.image_size} px, as convolutional "
            "networks do; leave it out"
        )
    return made[maps[-1]][0]
