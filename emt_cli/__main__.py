"""`python -m emt_cli`: the `emt` program by the Python that it is installed in."""

from emt_cli.app import main

if __name__ == "__main__":
    main()
