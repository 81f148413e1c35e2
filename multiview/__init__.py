"""What both stages agree on: cameras, rigs, samples, images, training."""

import sys
from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("torch") is None:  # first of all that is imported: a traceback would not say which Python is the right one
    told = "in this project's folder run `bash setup_mouse_env.sh` once, then `source .venv/bin/activate`"
    sys.exit(f"error: {sys.executable} has no torch; {told}")
