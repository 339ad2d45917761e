"""`python -m keras_norm` is the command `keras-norm`."""

import sys

from keras_norm.cli import main

if __name__ == "__main__":
    sys.exit(main())
