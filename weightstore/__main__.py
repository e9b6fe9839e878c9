"""``python -m weightstore``: the command line."""

from weightstore.cli import main

if __name__ == "__main__":
    main(prog_name="weightstore")
