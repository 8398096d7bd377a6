"""`python -m onecurve` is the command `onecurve`."""

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by its path, as onecurve/process.py does: the package beside this file comes first, not the files beside it.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from onecurve.launcher.cli import main

if __name__ == "__main__":
    main()
