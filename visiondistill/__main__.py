"""`python -m visiondistill`, also from a bare checkout."""

import sys

from visiondistill.cli import main

sys.exit(main())
