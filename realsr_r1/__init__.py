"""RealSR-R1, the course: VLCoT and GRPO for real-world super-resolution, small enough to read.

Modules, each importing only earlier ones: degradation, photos, scenes, perceptual, tokenizer, reader,
pretrain, probe → vlcot → policy → sft, experts, rewards → grpo → restore → viz, evaluate, course. `from realsr_r1 import restore` gives the module, which can be called like its function.
"""

from realsr_r1 import _torchvision  # noqa: F401  must run before anything imports torchvision
from realsr_r1.version import __version__  # noqa: F401
