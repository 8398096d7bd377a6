"""`python -m onecurve` is the command `onecurve`."""

from onecurve.launcher.cli import main

if __name__ == "__main__":
    main()
