"""The model of most tests: every kind of layer of EfficientNetV2, in a size that trains in milliseconds.

Known in processes that import this file: the tests', and the fork server's.
"""

from learning import models

TINY = (((True, 1, 1, 32, 16, 1), (True, 4, 2, 16, 32, 2), (False, 4, 2, 32, 48, 2)), 0.25, 1.0, 0.2)
models.EXTRA_MODELS["efficientnet_v2_tiny"] = TINY
models.register("efficientnet_v2_tiny", *TINY)
