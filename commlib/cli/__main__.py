"""``python -m commlib.cli``, where the ``commlib`` command is not on the PATH."""

import sys

from commlib.cli import main

sys.exit(main())
