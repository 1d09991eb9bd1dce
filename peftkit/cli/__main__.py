"""`python -m peftkit.cli`."""

from peftkit.cli.app import main

if __name__ == "__main__":
    main()
