"""A training run whose rank 1 is sent SIGTERM in its second step."""

import sys

from tests.faults.planted import AtMoment

if __name__ == "__main__":
    from megastab.pretrain import main

    AtMoment("take_step", 1, "SIGTERM").plant()
    sys.exit(main())
