"""`python -m crbd`."""

from __future__ import annotations

import sys

from crbd.cli.main import main

sys.exit(main())
