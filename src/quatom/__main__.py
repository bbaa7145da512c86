"""`python -m quatom` is the command line."""

from quatom.cli.main import main

if __name__ == "__main__":
    main()
