"""``python -m rankalign`` is ``rankalign``."""

import sys

from rankalign.cli import main

sys.exit(main())
