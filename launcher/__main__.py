"""`python -m launcher` is `onecurve`."""

from launcher.cli import main

if __name__ == "__main__":
    main()
