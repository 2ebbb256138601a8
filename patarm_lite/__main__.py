"""`python -m patarm_lite` is `patarm-lite`."""

import sys

from patarm_lite.cli import main

if __name__ == "__main__":
    sys.exit(main())
