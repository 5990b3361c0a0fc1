"""RealSR-R1, the course: VLCoT and GRPO for real-world super-resolution, small enough to read.

Modules, each importing only earlier ones: degradation, photos, scenes, perceptual, tokenizer, reader, weights, pretrain,
probe → vlcot → decoding, policy → sft → experts, rewards → grpo → cost, middle, budget → restore → chameleon, jacobi,
reference → viz, evaluate, compare → metrics, benchsets, peers, benchtable, benchmark → ablate, ablate_sft, ablate_figure →
sources, captioners, annotate, shards → course. `from realsr_r1 import restore` gives the module, which can be called like its function.
"""

import logging
import os

# Before torch loads: waiting threads sleep. Two that spin on a busy machine slow each other down a hundredfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from realsr_r1 import _torchvision  # noqa: F401  must run before anything imports torchvision
from realsr_r1.version import __version__  # noqa: F401

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # comes with pyiqa, is not used on a CPU, and says so at every import
