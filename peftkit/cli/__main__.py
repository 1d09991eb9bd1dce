"""`python -m peftkit.cli`."""

from peftkit.cli.app import main

main()
