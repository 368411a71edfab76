"""Fine-tuning with forward passes alone: MeZO, and ZO2 for models that do not fit on the device.

Malladi, Gao, Nichani, Damian, Lee, Chen, Arora: *Fine-Tuning Language Models with Just Forward Passes*, NeurIPS
2023, arXiv 2305.17333. Wang, Ren, Xu, Wang, Xie, Keyes, Wang: *ZO2: Scalable Zeroth-Order Fine-Tuning for
Extremely Large Language Models with Limited GPU Memory*, arXiv 2503.12668.
"""

from optex.optimizers.mezo.language import language_model_blocks
from optex.optimizers.mezo.optimizer import MeZO
from optex.optimizers.mezo.streaming import BlockStreamer, Traffic

__all__ = ["BlockStreamer", "MeZO", "Traffic", "language_model_blocks"]
