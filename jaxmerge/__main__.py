"""`python -m jaxmerge`, the same as `jaxmerge`."""

import sys

from jaxmerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
