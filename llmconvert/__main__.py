"""`python -m llmconvert`."""

from llmconvert.cli.app import main

main()
