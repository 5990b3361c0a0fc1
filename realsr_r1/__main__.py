"""`python -m realsr_r1 …` is `realsr …`."""

import sys

from realsr_r1.cli import main

sys.exit(main())
