"""`python -m jaxlin`: the command line."""

from jaxlin.cli import main

if __name__ == "__main__":
    main()
